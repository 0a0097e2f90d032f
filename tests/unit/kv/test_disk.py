"""The pool's disk tier, on a disk that forgets, fails and changes what it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.stand_ins import imported

MODULE = "aseer.kv.disk"


class Found(set):
    """LMCache's bitmap: which of a load's objects were there."""

    def test(self, i: int) -> bool:
        return i in self

    def clear(self, i: int) -> None:  # type: ignore[override]
        self.discard(i)


class Disk:
    """LMCache's adapter: tasks are done when the test has them done."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.failing: set[str] = set()
        self.is_busy = False
        self._stores: dict[int, list[str]] = {}
        self._loads: dict[int, list[str]] = {}

    def submit_store_task(self, keys: list[str], objects: list[Any]) -> int:
        for key, memory in zip(keys, objects, strict=True):
            if key not in self.failing:
                self.files[key] = bytes(memory.byte_array)
        self._stores[len(self._stores)] = keys
        return len(self._stores) - 1

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        done, self._stores = self._stores, {}
        return {
            task: SimpleNamespace(is_successful=lambda k=keys: not self.failing & {*k})
            for task, keys in done.items()
        }

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            self.files.pop(key, None)

    def submit_load_task(self, keys: list[str], objects: list[Any]) -> int:
        for key, memory in zip(keys, objects, strict=True):
            memory.byte_array[:] = self.files.get(key, b"\0" * len(memory.byte_array))
        self._loads[len(self._loads)] = keys
        return len(self._loads) - 1

    def query_load_result(self, task: int) -> Found | None:
        if self.is_busy:
            return None
        keys = self._loads.pop(task)
        return Found(i for i, key in enumerate(keys) if key in self.files)


def memory(content: bytes) -> Any:
    return SimpleNamespace(byte_array=bytearray(content))


@pytest.fixture
def disk(monkeypatch):
    base = "lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter"
    names = {base: {"NativeConnectorL2Adapter": Disk}}
    return imported(monkeypatch, MODULE, names).CheckedAdapter()


def stored(disk: Any, **contents: bytes) -> None:
    disk.submit_store_task(list(contents), [memory(c) for c in contents.values()])
    disk.pop_completed_store_tasks()


def loaded(disk: Any, *keys: str) -> Any:
    return disk.query_load_result(
        disk.submit_load_task(list(keys), [memory(b"....") for _ in keys])
    )


def test_what_changed_on_the_disk_is_missing_and_the_rest_is_not(disk, caplog):
    stored(disk, a=b"aaaa", b=b"bbbb")
    assert loaded(disk, "a", "b") == {0, 1}
    disk.files["a"] = b"aaaX"
    assert loaded(disk, "a", "b", "never") == {1}
    assert [r.getMessage() for r in caplog.records] == [
        "the disk gave back other bytes for a"
    ]


def test_what_was_not_stored_whole_is_not_believed_later(disk):
    disk.failing.add("b")
    stored(disk, a=b"aaaa", b=b"bbbb")
    disk.files["b"] = b"bbbb"  # it came after all, and nobody says when
    assert loaded(disk, "a", "b") == set()


def test_what_was_deleted_is_not_believed_if_it_comes_back(disk):
    stored(disk, a=b"aaaa")
    disk.delete(["a", "never"])
    disk.files["a"] = b"aaaa"
    assert loaded(disk, "a") == set()
    stored(disk, a=b"aaaa")
    assert loaded(disk, "a") == {0}


def test_a_load_that_goes_on_is_asked_for_again(disk):
    stored(disk, a=b"aaaa")
    task = disk.submit_load_task(["a"], [memory(b"....")])
    disk.is_busy = True
    assert disk.query_load_result(task) is None
    disk.is_busy = False
    assert disk.query_load_result(task) == {0}
