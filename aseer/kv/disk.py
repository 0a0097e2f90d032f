"""The pool's disk tier: what is read back has the checksum of what was written.

The checksums need not outlive the process: neither does the disk's directory.
"""

from __future__ import annotations

import logging
import zlib
from typing import Any

from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import (
    NativeConnectorL2Adapter,
)

_log = logging.getLogger("aseer.kv")


class CheckedAdapter(NativeConnectorL2Adapter):  # type: ignore[misc]  # untyped
    """A disk tier that finds what it reads back changed to be missing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sums: dict[Any, int] = {}  # of what is on the disk, or on its way there
        self._storing: dict[int, list[Any]] = {}
        self._loading: dict[int, tuple[list[Any], list[Any]]] = {}
        super().__init__(*args, **kwargs)

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> Any:
        self._sums.update(
            (key, zlib.crc32(memory.byte_array))
            for key, memory in zip(keys, objects, strict=True)
        )
        task: int = super().submit_store_task(keys, objects)
        self._storing[task] = keys
        return task

    def pop_completed_store_tasks(self) -> Any:
        done = super().pop_completed_store_tasks()
        for task, result in done.items():
            keys = self._storing.pop(task)
            if not result.is_successful():
                self._forget(keys)
        return done

    def delete(self, keys: list[Any]) -> None:
        super().delete(keys)
        self._forget(keys)

    def _forget(self, keys: list[Any]) -> None:
        for key in keys:
            self._sums.pop(key, None)

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> Any:
        task = super().submit_load_task(keys, objects)
        self._loading[task] = (keys, objects)
        return task

    def query_load_result(self, task_id: Any) -> Any:
        found = super().query_load_result(task_id)
        if found is None:
            return None
        keys, objects = self._loading.pop(task_id)
        for i, (key, memory) in enumerate(zip(keys, objects, strict=True)):
            if found.test(i) and zlib.crc32(memory.byte_array) != self._sums.get(key):
                _log.warning("the disk gave back other bytes for %s", key)
                found.clear(i)
        return found
