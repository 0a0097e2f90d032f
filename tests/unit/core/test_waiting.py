"""The order of waiting requests, and rounds that pass over what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from aseer.core.waiting import MAX_PASSED, Waiting, WaitingQueue
from aseer.policies import rank_context_aware, rank_fcfs, rank_unlike
from aseer.types import GroupId
from tests.unit.builders import waiting_of

if TYPE_CHECKING:
    from collections.abc import Callable

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


# Two orders


def test_going_from_one_order_to_the_other_asks_nobody() -> None:
    num_asked = 0

    def counted(request: Waiting, length_estimate: int) -> tuple[int, ...]:
        nonlocal num_asked
        num_asked += 1
        return (-request.arrival,)

    queue = WaitingQueue(rank_fcfs, counted)
    for group in "abc":
        queue.add(waiting_of(group), 100)
    before = num_asked
    queue.choose(1)
    assert [r.group_id for r in queue.head(9)] == list("cba")
    queue.choose(0)
    assert [r.group_id for r in queue.head(9)] == list("abc")
    assert num_asked == before


def test_an_order_is_kept_up_to_date_while_the_other_is_chosen() -> None:
    queue = WaitingQueue(rank_context_aware, rank_unlike)
    for group in "abc":
        for index in (1, 2):
            queue.add(waiting_of(group, index, is_new=True), 100)
    queue.set_length_estimate(GroupId("b"), 300)
    queue.remove(waiting_of("a", 1))
    queue.add(waiting_of("c", 3, num_generated=200, max_tokens=1000), 100)
    assert [r.request_id for r in queue.head(9)] == ["c/3", "b/1", "a/2"]
    queue.choose(1)
    assert [r.request_id for r in queue.head(9)] == ["b/1", "a/2", "c/1"]


# Rank functions that misbehave


class Moody:
    """A rank function that does something else once, for one request."""

    def __init__(self, instead: Callable[[], object]) -> None:
        self.instead = instead
        self.victim: tuple[str, int] | None = None

    def __call__(self, request: Waiting, length_estimate: int) -> tuple[int, ...]:
        if (request.request_id, length_estimate) == self.victim:
            self.victim = None
            return cast("tuple[int, ...]", self.instead())
        return (-length_estimate, request.arrival)


def fail() -> object:
    raise RuntimeError("a policy's own bug")


MISBEHAVIOUR = {
    "raises": (fail, RuntimeError),
    "too long": (lambda: (1, 2, 3, 4, 5), ValueError),
    "no tuple": (lambda: 7, ValueError),
    "no numbers": (lambda: ("a",), ValueError),
    "too large": (lambda: (1 << 70,), ValueError),
}


@pytest.fixture(params=MISBEHAVIOUR)
def moody(request: pytest.FixtureRequest) -> tuple[Moody, type[Exception]]:
    instead, error = MISBEHAVIOUR[request.param]
    return Moody(instead), error


def filled(*ranks: Moody) -> WaitingQueue:
    queue = WaitingQueue(*ranks)
    for group in "abcd":
        for index in range(3):
            queue.add(waiting_of(group, index), 100)
    return queue


def everything(queue: WaitingQueue) -> list[str]:
    """By rank, then by age; the queue is empty after it."""
    head = [r.request_id for r in queue.head(99)]
    return [str(len(queue)), *head, *drain(queue)]


def test_a_rank_that_fails_for_a_new_request_changes_nothing(moody) -> None:
    rank, error = moody
    queue = filled(rank, Moody(fail))
    for victim in (("e/0", 0), ("e/0", 70), ("a/3", 0), ("a/3", 100)):
        rank.victim = victim
        with pytest.raises(error):
            queue.add(waiting_of(victim[0][0], int(victim[0][2])), victim[1] or 100)
        assert victim[0] not in queue
    assert everything(queue) == everything(filled(Moody(fail)))


def test_a_rank_that_fails_for_a_new_estimate_changes_nothing(moody) -> None:
    rank, error = moody
    queue = filled(rank)
    for victim in ("a/0", "a/1", "c/2"):
        rank.victim = (victim, 500)
        with pytest.raises(error):
            queue.set_length_estimate(GroupId(victim[0]), 500)
        assert queue.length_estimate(GroupId(victim[0])) == 100
    rank.victim = ("a/2", 500)
    with pytest.raises(error):
        queue.add(waiting_of("a", 7), 500)
    assert "a/7" not in queue
    assert everything(queue) == everything(filled(Moody(fail)))


def test_a_rank_that_uses_the_queue_finds_it_whole() -> None:
    rank = Moody(lambda: None)
    queue = filled(rank)

    def remove_and_add() -> tuple[int, ...]:
        queue.remove_group(GroupId("a"))
        queue.add(waiting_of("b", 9), 100)
        return (-500, 0)

    rank.instead, rank.victim = remove_and_add, ("a/1", 500)
    with pytest.raises(ValueError, match="no request of that group waits"):
        queue.set_length_estimate(GroupId("a"), 500)
    assert len(queue) == 10
    assert "b/9" in drain(queue)
