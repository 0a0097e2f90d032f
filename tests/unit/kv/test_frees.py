"""Frees are told in order, a bounded part at a time, and wait in bounded memory."""

from __future__ import annotations

from aseer.kv.frees import FreeQueue
from aseer.kv.messages import Free


def free_of(num_bytes: int) -> Free:
    return Free("m", 1, "salt", bytes(num_bytes), 0)


def test_what_is_told_at_once_is_bounded_and_nothing_is_skipped():
    queue = FreeQueue(max_told_bytes=10, max_waiting_bytes=100)
    given = [free_of(n) for n in (4, 6, 1, 30, 2)]
    for what in given:
        queue.add(what)
    taken = [queue.take() for _ in range(5)]
    assert [[len(what.tokens) for what in told] for told in taken] == [
        [4, 6],
        [1],
        [30],  # alone: it will not get smaller
        [2],
        [],
    ]
    assert [what for told in taken for what in told] == given


def test_what_does_not_fit_is_dropped_until_there_is_room_again():
    queue = FreeQueue(max_told_bytes=10, max_waiting_bytes=12)
    for num_bytes in (8, 5, 4):
        queue.add(free_of(num_bytes))
    assert [len(what.tokens) for what in queue.take()] == [8]
    queue.add(free_of(8))
    assert [len(what.tokens) for what in queue.take()] == [4]
    queue.clear()
    assert queue.take() == []
    queue.add(free_of(12))
    assert len(queue.take()) == 1
