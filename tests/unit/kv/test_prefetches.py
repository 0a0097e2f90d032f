"""Loads from disk give their places back, whatever becomes of them."""

from __future__ import annotations

from aseer.kv.prefetches import MAX_LOAD_S, MAX_LOADS, Prefetches


def test_a_load_counts_what_was_not_there_before():
    loads = Prefetches()
    loads.begin("a", 2, now=0.0)
    loads.begin("b", 5, now=0.0)
    found = {"a": 6, "b": None}
    assert loads.settle(found.__getitem__, now=1.0) == 4
    assert loads.settle({"b": 4}.__getitem__, now=2.0) == 0  # some were dropped since
    assert loads.settle({}.__getitem__, now=3.0) == 0


def test_a_load_that_is_never_over_or_not_known_gives_its_place_back():
    loads = Prefetches()
    for i in range(MAX_LOADS):
        loads.begin(f"job-{i}", 0, now=0.0)
    assert not loads.has_room
    pending = dict.fromkeys((f"job-{i}" for i in range(1, MAX_LOADS)), None)
    assert loads.settle(pending.__getitem__, now=1.0) == 0  # job-0 is not known
    assert loads.has_room
    loads.begin("next", 0, now=1.0)
    assert not loads.has_room
    assert loads.settle(lambda _: None, now=MAX_LOAD_S) == 0
    assert loads.has_room
