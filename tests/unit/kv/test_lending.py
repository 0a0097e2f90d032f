"""A pool server's memory, as other nodes' servers use it; LMCache is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from aseer.kv.messages import Pull
from tests.unit.stand_ins import imported

MODULE = "aseer.kv.lending"
SUCCESS = "success"
ORDER = Pull(7, 0, "tcp://10.0.0.1:1", "m", 1, "salt", b"", 2.0)


class Key(NamedTuple):
    name: str
    object_group_id: int = 0


class Manager:
    """LMCache's L1: what is in memory, who reads it, and who writes it."""

    def __init__(self, **there: bytes) -> None:
        self.there = {Key(name): bytearray(value) for name, value in there.items()}
        self.read: list[Key] = []
        self.full: set[Key] = set()
        self.reserved: dict[Key, tuple[bytearray, str]] = {}
        self.layouts: list[tuple[list[Key], Any, str]] = []

    def reserve_read(self, keys: list[Key]) -> Any:
        self.read += [key for key in keys if key in self.there]
        return {k: ("", _memory(self.there.get(k))) for k in keys}

    def finish_read(self, keys: list[Key]) -> None:
        for key in keys:
            self.read.remove(key)

    def reserve_write(
        self, keys: list[Key], is_temporary: list[bool], layout: Any, tag: str
    ) -> Any:
        assert is_temporary == [False] * len(keys)
        self.layouts.append((keys, layout, tag))
        free = [key for key in keys if key not in self.full]
        self.reserved |= {key: (bytearray(4), tag) for key in free}
        return {
            key: (SUCCESS, _memory(self.reserved[key][0]))
            if key in free
            else ("", None)
            for key in keys
        }

    def finish_write(self, keys: list[Key], *, tag: str) -> None:
        for key in keys:
            self.there[key], its_tag = self.reserved.pop(key)
            assert tag == its_tag

    def finish_write_and_delete(self, keys: list[Key], *, tag: str) -> None:
        for key in keys:
            assert self.reserved.pop(key)[1] == tag


class Layouts:
    def __init__(self, groups: dict[int, str]) -> None:
        self._groups = groups

    def find_group_layout_descs(self, model: str, world_size: int) -> dict[int, str]:
        return self._groups if (model, world_size) == ("m", 1) else {}


def _memory(content: bytearray | None) -> Any:
    return None if content is None else SimpleNamespace(byte_array=content)


@pytest.fixture
def store_of(monkeypatch):
    error = SimpleNamespace(SUCCESS=SUCCESS)
    names = {"lmcache.v1.distributed.error": {"L1Error": error}}
    module = imported(monkeypatch, MODULE, names)

    def make(manager: Manager, groups: dict[int, str] | None = None) -> Any:
        return module.L1Store(
            manager,
            Layouts({0: "layout"} if groups is None else groups),
            lambda what: [Key(what.model)],
            lambda keys: {key for key in keys if key in manager.there},
            set(),
        )

    return make


def test_layouts_are_compared_by_their_words(store_of):
    one = store_of(Manager(), {0: "a", 1: "b"}).layout("m", 1)
    assert one == store_of(Manager(), {1: "b", 0: "a"}).layout("m", 1)
    assert one != store_of(Manager(), {0: "a", 1: "c"}).layout("m", 1)
    assert store_of(Manager()).layout("another", 1) is None


def test_what_is_there_is_lent_until_it_is_given_back(store_of):
    manager = Manager(a=b"aaaa", c=b"cccc")
    store = store_of(manager)
    keys = [Key("a"), Key("b"), Key("c")]
    assert (store.keys(ORDER), store.missing(keys)) == ([Key("m")], [1])
    lent = store.lend(keys)
    assert {i: bytes(view) for i, view in lent.items()} == {0: b"aaaa", 2: b"cccc"}
    assert manager.read == [Key("a"), Key("c")]
    store.take_back([])
    store.take_back([Key("c"), Key("a")])
    assert manager.read == []


def test_what_is_pulled_is_written_and_seen_once_it_is_whole(store_of):
    manager = Manager()
    store = store_of(manager, {0: "layout", 1: "other"})
    keys = [Key("a", 1), Key("b", 0), Key("c", 1), Key("d", 0)]
    manager.full = {keys[3]}
    places = store.reserve(ORDER, keys)
    tag = "aseer-pull-7"
    assert manager.layouts == [
        ([keys[1], keys[3]], "layout", tag),
        ([keys[0], keys[2]], "other", tag),
    ]
    assert set(places) == {0, 1, 2}
    assert store._pulling == {*keys[:3]}
    places[0][:] = b"AAAA"
    places[1][:] = b"BBBB"
    assert manager.there == {}
    store.settle(ORDER, [keys[0], keys[1]], [keys[2]])
    assert manager.there == {keys[0]: b"AAAA", keys[1]: b"BBBB"}
    assert (manager.reserved, store._pulling) == ({}, set())


def test_another_pulls_places_are_its_own(store_of):
    manager = Manager()
    store = store_of(manager)
    store.reserve(ORDER, [Key("a")])
    with pytest.raises(AssertionError):  # by LMCache's own check of who writes
        store.settle(Pull(8, *[None] * 7), [Key("a")], [])
    store.settle(ORDER, [], [])
    assert store._pulling == {Key("a")}
