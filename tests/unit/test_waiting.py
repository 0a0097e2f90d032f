"""The order of waiting requests, and rounds that pass over what does not fit."""

from __future__ import annotations

import pytest

from aseer.policies import rank_context_aware, rank_fcfs
from aseer.types import GroupId
from aseer.waiting import MAX_PASSED, WaitingQueue
from tests.unit.core import waiting_of

PLENTY = 1 << 30


def drain(queue: WaitingQueue) -> list[str]:
    """Everything, first to last."""
    queue.begin_round()
    order = []
    while (request := queue.first(PLENTY)) is not None:
        order.append(request.request_id)
        queue.remove(request)
    return order


def first_of(queue: WaitingQueue, room: int) -> str | None:
    request = queue.first(room)
    return request.request_id if request else None


def test_requests_come_in_rank_order_whatever_the_order_of_adding() -> None:
    queue = WaitingQueue(rank_fcfs)
    for group, index in [("b", 1), ("a", 2), ("c", 0), ("a", 0), ("b", 0), ("a", 1)]:
        queue.add(waiting_of(group, index), 100)
    assert drain(queue) == ["a/0", "a/1", "a/2", "b/0", "b/1", "c/0"]
    assert len(queue) == 0


def test_a_changed_estimate_moves_the_whole_group() -> None:
    queue = WaitingQueue(rank_context_aware)
    for group in "ab":
        for index in (1, 2):
            queue.add(waiting_of(group, index), 100)
    queue.set_length_estimate(GroupId("b"), 500)
    queue.set_length_estimate(GroupId("b"), 300)
    assert drain(queue) == ["b/1", "b/2", "a/1", "a/2"]


def test_an_estimate_given_with_a_request_moves_its_group_too() -> None:
    queue = WaitingQueue(rank_context_aware)
    queue.add(waiting_of("a", 1), 100)
    queue.add(waiting_of("b", 1), 50)
    queue.add(waiting_of("b", 2), 200)
    assert drain(queue) == ["b/1", "b/2", "a/1"]


def test_the_head_is_the_first_of_the_first_groups() -> None:
    queue = WaitingQueue(rank_context_aware)
    for group, estimate in [("a", 100), ("b", 300), ("c", 200)]:
        for index in (2, 1):
            queue.add(waiting_of(group, index), estimate)
    assert [r.request_id for r in queue.head(2)] == ["b/1", "c/1"]
    assert [r.request_id for r in queue.head(9)] == ["b/1", "c/1", "a/1"]
    assert queue.head(0) == []
    assert drain(queue)[0] == "b/1", "looking changes nothing"


def test_the_oldest_has_waited_longest_since_it_was_added() -> None:
    queue = WaitingQueue(rank_fcfs)
    for group in "cab":
        queue.add(waiting_of(group), 100)
    oldest = []
    while (request := queue.oldest()) is not None:
        oldest.append(request.request_id)
        queue.remove(request)
    assert oldest == ["c/0", "a/0", "b/0"]


def test_a_request_from_the_middle_of_its_group_is_gone_everywhere() -> None:
    queue = WaitingQueue(rank_fcfs)
    requests = [waiting_of("a", i) for i in range(3)]
    for request in reversed(requests):
        queue.add(request, 100)
    queue.remove(requests[1])
    assert "a/1" not in queue
    assert drain(queue) == ["a/0", "a/2"]


def test_a_request_that_comes_back_counts_as_it_is_now() -> None:
    queue = WaitingQueue(rank_context_aware)
    for index in (1, 2):
        queue.add(waiting_of("a", index, num_generated=20), 100)
    queue.begin_round()
    request = queue.first(PLENTY)
    assert request is not None
    queue.remove(request)
    queue.add(waiting_of("a", 1, num_generated=10), 100)  # started over, say
    assert drain(queue) == ["a/2", "a/1"]


def test_a_request_waits_once() -> None:
    queue = WaitingQueue(rank_fcfs)
    queue.add(waiting_of("a"), 100)
    with pytest.raises(ValueError, match="request 'a/0' waits already"):
        queue.add(waiting_of("a", num_generated=5), 100)


def test_a_removed_group_is_gone_with_all_its_requests() -> None:
    queue = WaitingQueue(rank_fcfs)
    for group in "ab":
        for index in (0, 1):
            queue.add(waiting_of(group, index), 100)
    queue.remove_group(GroupId("a"))
    queue.remove_group(GroupId("unknown"))
    assert len(queue) == 2
    assert drain(queue) == ["b/0", "b/1"]


def test_a_group_that_is_passed_over_is_out_of_the_round_with_its_siblings() -> None:
    queue = WaitingQueue(rank_fcfs)
    for group in "ab":
        for index in (0, 1):
            queue.add(waiting_of(group, index), 100)
    queue.begin_round()
    assert first_of(queue, room=10) == "a/0"
    queue.pass_over(needs=50)
    assert first_of(queue, room=10) == "b/0"
    queue.pass_over(needs=40)
    assert first_of(queue, room=10) is None
    assert queue.num_passed == 2


def test_the_next_round_passes_over_what_still_does_not_fit_unseen() -> None:
    queue = WaitingQueue(rank_fcfs)
    for group in "ab":
        queue.add(waiting_of(group), 100)
    queue.begin_round()
    queue.first(10)
    queue.pass_over(needs=50)
    queue.begin_round()
    assert first_of(queue, room=49) == "b/0"
    queue.begin_round()
    assert first_of(queue, room=50) == "a/0"


def test_a_new_request_is_met_before_what_was_passed_over_if_it_ranks_before() -> None:
    queue = WaitingQueue(rank_context_aware)
    queue.add(waiting_of("a", 1), 100)
    queue.begin_round()
    queue.first(10)
    queue.pass_over(needs=50)
    queue.add(waiting_of("b", 0), 100)
    queue.begin_round()
    assert first_of(queue, room=10) == "b/0"


def test_a_passed_over_group_whose_head_changed_is_looked_at_again() -> None:
    queue = WaitingQueue(rank_fcfs)
    queue.add(waiting_of("a", 1), 100)
    queue.begin_round()
    queue.first(10)
    queue.pass_over(needs=50)
    queue.add(waiting_of("a", 0), 100)
    queue.begin_round()
    assert first_of(queue, room=10) == "a/0"


def test_a_round_ends_when_enough_was_passed_over() -> None:
    queue = WaitingQueue(rank_fcfs)
    groups = "abcdefgh"
    for group in groups:
        queue.add(waiting_of(group), 100)
    queue.begin_round()
    seen = []
    while (request := queue.first(10)) is not None:
        seen.append(request.group_id)
        queue.pass_over(needs=50)
    assert seen == list(groups[:MAX_PASSED])


def test_what_was_passed_over_is_not_lost_when_better_ones_crowd_it_out() -> None:
    queue = WaitingQueue(rank_context_aware)
    for n, group in enumerate("abcdefghij"):
        queue.add(waiting_of(group, 1), 100 + n)  # each ranks before the others
        queue.begin_round()
        while queue.first(10) is not None:
            queue.pass_over(needs=50)
    assert drain(queue) == [f"{group}/1" for group in "jihgfedcba"]


def test_the_last_of_many_estimates_counts() -> None:
    queue = WaitingQueue(rank_context_aware)
    for group in "ab":
        queue.add(waiting_of(group, 1), 100)
    for estimate in (500, 7, 99, 100, 101):
        queue.set_length_estimate(GroupId("a"), estimate)
    assert drain(queue) == ["a/1", "b/1"]
