"""What is changed of LMCache, on stand-ins for its classes."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.kv import patches
from tests.unit.kv.test_disk import Disk
from tests.unit.stand_ins import imported, stand_in

DISK = "lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter"
STORAGE = "lmcache.v1.distributed.storage_manager"
TRANSFER = "lmcache.v1.multiprocess.modules.engine_driven_transfer"
TYPES = "lmcache.v1.multiprocess.custom_types"
OF_SERVER = "lmcache.v1.multiprocess.modules.server_transfer"
OF_ENGINE = "lmcache.v1.multiprocess.transfer_context.pickle"


class Pickles:
    """Of both sides: loads what it is sent."""

    def commit_store(self, *_: Any, **__: Any) -> bool:
        raise AssertionError("KV was sent, or taken, as a pickle")

    prepare_retrieve = commit_store


class Transfers:
    """Which memory the engines have reserved."""

    def __init__(self) -> None:
        self.released: list[int] = []
        self.discarded: list[tuple[str, str]] = []
        self._pending_shm_lock = threading.Lock()
        self._pending_shm_writes = {(1, "x"): ["a"], (2, "y"): ["b"], (1, "z"): ["c"]}
        manager = SimpleNamespace(finish_write_and_delete=self._discard)
        storage = SimpleNamespace(_l1_managers_by_id={0: manager})
        self._ctx = SimpleNamespace(storage_manager=storage)

    def _discard(self, keys: list[str], *, tag: str) -> None:
        self.discarded += [(key, tag) for key in keys]

    def _release_entry(self, instance_id: int, entry: Any) -> None:
        self.released.append(instance_id)


@pytest.fixture
def lmcache(monkeypatch):
    copy = type("Transfers", (Transfers,), {})
    return stand_in(
        monkeypatch,
        {
            DISK: {"NativeConnectorL2Adapter": Disk},
            STORAGE: {"_L1_WRITE_TAG": "writes"},
            TRANSFER: {"EngineDrivenTransferModule": copy},
            TYPES: {"PrepareRetrieveResponse": SimpleNamespace},
            OF_SERVER: {"PickleTransferStrategy": type("Server", (Pickles,), {})},
            OF_ENGINE: {"EngineDrivenContextPickle": type("Engine", (Pickles,), {})},
        },
    )


def test_memory_that_a_dead_engine_had_reserved_is_discarded_and_no_others(lmcache):
    assert patches.discard_unfilled_memory()
    transfers = lmcache[TRANSFER].EngineDrivenTransferModule()
    transfers._release_entry(1, None)
    assert transfers.discarded == [("a", "writes"), ("c", "writes")]
    assert transfers._pending_shm_writes == {(2, "y"): ["b"]}
    assert transfers.released == [1]


def test_the_disk_tier_is_the_one_that_checks(lmcache, monkeypatch):
    disk = imported(monkeypatch, "aseer.kv.disk", {})
    assert patches.check_what_the_disk_gives()
    assert lmcache[DISK].NativeConnectorL2Adapter is disk.CheckedAdapter


def test_an_engine_neither_sends_nor_takes_a_pickle(lmcache):
    assert patches.refuse_pickles_in_engine()
    engine = lmcache[OF_ENGINE].EngineDrivenContextPickle()
    assert engine.commit_store("key") is False
    assert engine.prepare_retrieve("key") is None


def test_a_server_takes_no_pickle_and_says_so_once(lmcache, monkeypatch, caplog):
    hooks: list[Any] = []
    monkeypatch.setattr("sys.addaudithook", hooks.append)
    assert patches.refuse_pickles_in_server()
    server = lmcache[OF_SERVER].PickleTransferStrategy()
    assert [server.commit_store(key=i, data=b"") for i in range(3)] == [False] * 3
    answer = server.prepare_retrieve(key=1)
    assert (answer.success, answer.data, answer.context) == (False, b"", {})
    assert len(caplog.records) == 1
    assert len(hooks) == 1


def test_no_pickle_in_a_server_may_name_a_thing(monkeypatch):
    for event, args in (("open", ("x", "r", 0)), ("import", ("os",))):
        patches._refuse(event, args)
    with pytest.raises(patches.PickleRefused, match=r"asks for os\.system"):
        patches._refuse("pickle.find_class", ("os", "system"))


def test_a_process_gets_its_own_patches_alone(lmcache, monkeypatch):
    imported(monkeypatch, "aseer.kv.disk", {})
    monkeypatch.setattr("sys.addaudithook", lambda _: None)
    server = lmcache[OF_SERVER].PickleTransferStrategy()
    assert patches.apply("engine") == ["refuse_pickles_in_engine"]
    assert lmcache[DISK].NativeConnectorL2Adapter is Disk
    with pytest.raises(AssertionError):
        server.commit_store()
    assert patches.apply("server") == [
        "refuse_pickles_in_server",
        "discard_unfilled_memory",
        "check_what_the_disk_gives",
    ]
    assert server.commit_store() is False
