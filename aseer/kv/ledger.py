"""What a pool server has where, as LMCache tells it: in DRAM (L1), on disk (L2).

Nothing here imports LMCache; its keys are taken as they are.
"""

from __future__ import annotations

import threading
from typing import Any

from aseer.kv.messages import PoolCounts
from aseer.kv.settings import version_of


class Ledger:
    """Which keys are where, and the bytes moved; thread-safe.

    The methods `on_...` are those of LMCache's listeners, whose threads call them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dram: set[Any] = set()
        self._disk: dict[Any, int] = {}
        self._freeing: set[Any] = set()
        self._object_bytes = 0
        self._num = dict.fromkeys(("stored", "evicted", "freed", "read", "pulled"), 0)
        self.pulling: set[Any] = set()
        """Keys that are taken from another node's server."""
        self._written = 0

    def counts(self, capacity: int, object_bytes: int) -> PoolCounts:
        """All so far."""
        with self._lock:
            size = self._object_bytes = object_bytes or self._object_bytes
            return PoolCounts(
                stored=self._num["stored"] * size,
                evicted=self._num["evicted"] * size,
                freed=self._num["freed"] * size,
                resident=len(self._dram) * size,
                capacity=capacity,
                disk_written=self._written,
                disk_read=self._num["read"] * size,
                disk_resident=sum(self._disk.values()),
                pulled=self._num["pulled"] * size,
                per_chunk=size,
            )

    def any_in_dram(self) -> Any:
        """A key; None if DRAM is empty."""
        with self._lock:
            return next(iter(self._dram), None)

    def in_dram(self, keys: set[Any]) -> set[Any]:
        """Of these keys, the ones in DRAM."""
        with self._lock:
            return keys & self._dram

    def held(self, keys: set[Any]) -> tuple[list[Any], list[Any]]:
        """Of these keys, the ones in DRAM and on disk."""
        with self._lock:
            on_disk = [key for key in keys if key in self._disk]
            return list(keys & self._dram), on_disk

    def older_than(self, version: int) -> set[Any]:
        """Keys of weight versions below one."""
        with self._lock:
            keys = self._dram | self._disk.keys()
        versions = {key: version_of(key.cache_salt) for key in keys}
        return {key for key, v in versions.items() if v is not None and v < version}

    def begin_freeing(self, keys: list[Any]) -> None:
        """What is deleted next is not evicted."""
        with self._lock:
            self._freeing.update(keys)

    def end_freeing(self) -> None:
        """What is deleted next is evicted."""
        with self._lock:
            self._freeing.clear()

    def on_l1_keys_write_finished(self, keys: list[Any]) -> None:
        with self._lock:
            num_pulled = sum(key in self.pulling for key in keys)
            self._num["pulled"] += num_pulled
            self._num["stored"] += len(keys) - num_pulled
            self._dram.update(keys)

    def on_l1_keys_finish_write_and_reserve_read(self, keys: list[Any]) -> None:
        with self._lock:
            self._num["read"] += len(keys)
            self._dram.update(keys)

    def on_l1_keys_deleted_by_manager(self, keys: list[Any]) -> None:
        with self._lock:
            for key in keys:
                if key in self._dram:
                    self._dram.remove(key)
                    why = "freed" if key in self._freeing else "evicted"
                    self._num[why] += 1

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        with self._lock:
            for key, size in zip(keys, sizes, strict=True):
                self._disk[key] = self._disk.get(key, 0) + size
                self._written += size

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        with self._lock:
            for key in keys:
                self._disk.pop(key, None)
