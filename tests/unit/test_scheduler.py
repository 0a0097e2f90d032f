"""Who runs next, where, and for how long: policies as traces."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aseer.core.residency import NOWHERE, Holders
from aseer.policies import POLICIES
from aseer.scheduler import (
    RECOMPUTE_TOKENS_PER_REQUEST,
    Scheduler,
    chunk_tokens,
    place_by_affinity,
)
from aseer.types import GroupId, InstanceId
from tests.unit.builders import info_of, no_kv, waiting_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aseer.config import PolicyName
    from aseer.core.waiting import Waiting
    from aseer.types import Assignment, RequestId

A, B, C = InstanceId(0), InstanceId(1), InstanceId(2)


def scheduler_of(
    policy: PolicyName = "context-aware",
    *num_kv_blocks: int,
    chunk_size: int = 8,
    max_num_seqs: int = 100,
    starvation_interval: int = 0,
) -> Scheduler:
    """With instances of so many blocks of 4 tokens; one large one if none is given."""
    scheduler = Scheduler(
        POLICIES[policy],
        chunk_size=chunk_size,
        starvation_interval=starvation_interval,
    )
    for i, blocks in enumerate(num_kv_blocks or (10_000,)):
        scheduler.fleet.add(info_of(i, num_kv_blocks=blocks, max_num_seqs=max_num_seqs))
    return scheduler


def order_of(assignments: list[Assignment]) -> list[str]:
    return [a.request_id for a in assignments]


def places_of(assignments: list[Assignment]) -> list[tuple[str, int]]:
    return [(a.request_id, a.instance_id) for a in assignments]


def release(scheduler: Scheduler, assignment: Assignment) -> None:
    scheduler.fleet.release(assignment.instance_id, assignment.num_reserved_blocks)


# How long: a chunk ends where prompt + generated = k x granularity + 1


def test_a_chunk_ends_one_token_into_a_block() -> None:
    for num_tokens in range(1, 200):
        for chunk_size in range(1, 70):
            tokens = chunk_tokens(num_tokens, 10_000, chunk_size, 16)
            assert (num_tokens + tokens) % 16 == 1
            assert tokens >= 1


def test_a_chunk_is_as_long_as_allowed_and_at_most_a_block_if_that_is_short() -> None:
    for num_tokens in range(1, 200):
        for chunk_size in range(1, 70):
            tokens = chunk_tokens(num_tokens, 10_000, chunk_size, 16)
            assert tokens <= max(chunk_size, 16)
            assert tokens > chunk_size - 16


def test_resumed_chunks_are_whole_multiples_of_blocks() -> None:
    num_tokens, lengths = 10, []
    for _ in range(4):
        lengths.append(chunk_tokens(num_tokens, 10_000, 64, 16))
        num_tokens += lengths[-1]
    assert lengths == [55, 64, 64, 64]


def test_the_last_chunk_is_what_remains() -> None:
    assert chunk_tokens(100, 64, 64, 16) == 64
    assert chunk_tokens(100, 65, 64, 16) == 61  # 161 = 10 x 16 + 1
    assert chunk_tokens(161, 4, 64, 16) == 4


def test_a_block_longer_than_the_rest_is_not_overrun() -> None:
    assert chunk_tokens(100, 10, 2, 256) == 10


def test_no_chunk_size_means_undivided() -> None:
    assert chunk_tokens(100, 5000, 0, 16) == 5000


def test_a_request_that_cannot_be_resumed_gets_all_its_tokens_at_once() -> None:
    scheduler = scheduler_of()
    scheduler.add(waiting_of("a", 0), 100)
    scheduler.add(waiting_of("b", 0, divisible=False), 100)
    divided, undivided = scheduler.schedule(no_kv)
    assert (divided.max_tokens, undivided.max_tokens) == (5, 100)
    assert undivided.num_reserved_blocks == (4 + 100) // 4


def test_kv_is_reserved_for_prompt_generated_and_chunk() -> None:
    scheduler = scheduler_of()
    scheduler.add(waiting_of("a", 0, num_generated=9), 100)
    (assignment,) = scheduler.schedule(no_kv)
    assert (assignment.max_tokens, assignment.num_reserved_blocks) == (8, 5)
    # 13 + 8 tokens, of which the last one's KV is never written


@pytest.mark.parametrize(
    ("num_generated", "estimate", "most"),
    [(0, 10, 13), (0, 100, 61), (4, 20, 17), (20, 10, 21), (90, 95, 10)],
)
def test_a_chunk_is_as_long_as_the_response_is_expected_to_become(
    num_generated: int, estimate: int, most: int
) -> None:
    scheduler = scheduler_of("context-aware", chunk_size=64)
    scheduler.add(waiting_of("a", 1, num_generated=num_generated), 100)
    scheduler.set_length_estimate(GroupId("a"), estimate)
    (assignment,) = scheduler.schedule(no_kv)
    left = max(estimate, min(2 * num_generated, 100)) - num_generated
    assert min(left, 61) <= assignment.max_tokens <= most


def test_the_oracles_chunks_end_with_the_response() -> None:
    scheduler = scheduler_of("longest-first", chunk_size=64)
    scheduler.add(waiting_of("a", known_length=10), 100)
    scheduler.add(waiting_of("b"), 100)
    unknown, known = scheduler.schedule(no_kv)
    assert (known.max_tokens, unknown.max_tokens) == (13, 61)


def test_first_come_first_served_knows_nothing_of_lengths() -> None:
    scheduler = scheduler_of("fcfs", chunk_size=64)
    scheduler.add(waiting_of("a", known_length=10), 10)
    assert scheduler.schedule(no_kv)[0].max_tokens == 61


# Who: context-aware (Seer, Algorithm 2)


def test_probes_go_first_as_they_came() -> None:
    scheduler = scheduler_of("context-aware")
    for group, num_generated in [("a", 30), ("b", 10), ("c", 20)]:
        scheduler.add(waiting_of(group, 1), 100)
        scheduler.add(waiting_of(group, 0, num_generated=num_generated), 100)
    assert order_of(scheduler.schedule(no_kv))[:3] == ["a/0", "b/0", "c/0"]


def test_without_probes_the_group_with_the_largest_estimate_goes_first() -> None:
    scheduler = scheduler_of("context-aware")
    for group, estimate in [("a", 40), ("b", 90), ("c", 60)]:
        for index in (1, 2):
            scheduler.add(waiting_of(group, index), estimate)
    assert order_of(scheduler.schedule(no_kv)) == [
        *("b/1", "b/2"),
        *("c/1", "c/2"),
        *("a/1", "a/2"),
    ]


def test_a_group_nobody_finished_in_counts_as_the_longest() -> None:
    scheduler = scheduler_of("context-aware")
    scheduler.add(waiting_of("a", 1), 70)  # learnt
    scheduler.add(waiting_of("b", 1, max_tokens=100), 100)  # its max_tokens
    assert order_of(scheduler.schedule(no_kv)) == ["b/1", "a/1"]


def test_a_new_estimate_changes_the_order_at_once() -> None:
    scheduler = scheduler_of("context-aware")
    scheduler.add(waiting_of("a", 1), 100)
    scheduler.add(waiting_of("b", 1), 100)
    scheduler.set_length_estimate(GroupId("a"), 20)
    assert order_of(scheduler.schedule(no_kv)) == ["b/1", "a/1"]


def test_within_a_group_the_most_tokens_go_first_then_the_first_to_arrive() -> None:
    scheduler = scheduler_of("context-aware")
    for index, num_generated in [(3, 8), (2, 0), (1, 8), (4, 4)]:
        scheduler.add(waiting_of("a", index, num_generated=num_generated), 100)
    assert order_of(scheduler.schedule(no_kv)) == ["a/1", "a/3", "a/4", "a/2"]


def test_a_request_is_expected_to_become_twice_as_long_as_it_is() -> None:
    scheduler = scheduler_of("context-aware")
    scheduler.add(waiting_of("a", 1), 10)
    scheduler.add(waiting_of("a", 2, num_generated=30), 10)  # 60, whatever its group
    scheduler.add(waiting_of("b", 1), 50)
    scheduler.add(waiting_of("c", 1), 70)
    scheduler.add(waiting_of("d", 1, num_generated=25), 50)  # 50, but it is under way
    order = order_of(scheduler.schedule(no_kv))
    assert order == ["c/1", "a/2", "d/1", "b/1", "a/1"]


def test_nobody_is_expected_to_become_longer_than_allowed() -> None:
    scheduler = scheduler_of("context-aware")
    scheduler.add(waiting_of("a", 1, num_generated=90, max_tokens=100), 10)
    scheduler.add(waiting_of("b", 1, max_tokens=150), 110)
    assert order_of(scheduler.schedule(no_kv)) == ["b/1", "a/1"]


def test_where_siblings_are_unlike_everybody_is_begun_before_anybody_goes_on() -> None:
    scheduler = scheduler_of("context-aware")
    scheduler.set_siblings_alike(alike=False)
    scheduler.add(waiting_of("a", 0, num_generated=20), 30)  # a probe
    scheduler.add(waiting_of("b", 1, num_generated=8), 100)
    scheduler.add(waiting_of("b", 2, num_generated=6, is_new=True), 100)
    scheduler.add(waiting_of("c", 1, is_new=True), 30)
    assert order_of(scheduler.schedule(no_kv)) == ["a/0", "b/2", "c/1", "b/1"]


def test_where_siblings_are_unlike_most_expected_to_be_left_goes_first() -> None:
    scheduler = scheduler_of("context-aware")
    scheduler.set_siblings_alike(alike=False)
    for group, num_generated, estimate in [
        ("a", 30, 100),  # 120, as it should become five times as long as it is
        ("b", 20, 20),  # 80
        ("c", 25, 120),  # 100
        ("d", 200, 250),  # 100, all that it may
        ("e", 100, 50),  # 200, the same
        ("f", 290, 20),  # 10
    ]:
        scheduler.add(
            waiting_of(group, 1, num_generated=num_generated, max_tokens=300), estimate
        )
    order = [request[0] for request in order_of(scheduler.schedule(no_kv))]
    # Of 64 to 127 tokens left, those who have the most tokens go on.
    assert order == ["e", "d", "a", "c", "b", "f"]


def test_the_order_changes_with_what_is_seen_of_siblings_and_back() -> None:
    scheduler = scheduler_of("context-aware", 4)
    scheduler.add(waiting_of("a", 1, num_generated=20), 100)
    scheduler.add(waiting_of("b", 1, is_new=True), 30)
    scheduler.set_siblings_alike(alike=False)
    assert scheduler.upcoming(2) == ["b/1", "a/1"]
    scheduler.set_siblings_alike(alike=True)
    assert scheduler.upcoming(2) == ["a/1", "b/1"]


def test_a_finished_probe_does_not_make_another_request_a_probe() -> None:
    scheduler = scheduler_of("context-aware")
    scheduler.add(waiting_of("a", 1), 10)
    scheduler.add(waiting_of("b", 1), 90)
    assert order_of(scheduler.schedule(no_kv)) == ["b/1", "a/1"]


# Who: the other policies


def test_fcfs_keeps_the_order_of_arrival_also_for_resumed_requests() -> None:
    scheduler = scheduler_of("fcfs")
    for group, index in [("b", 0), ("a", 1), ("c", 0)]:
        scheduler.add(waiting_of(group, index), 100)
    scheduler.add(waiting_of("a", 0, num_generated=50), 100)
    assert order_of(scheduler.schedule(no_kv)) == ["a/0", "a/1", "b/0", "c/0"]


def test_the_oracle_takes_what_has_most_tokens_left() -> None:
    scheduler = scheduler_of("longest-first")
    scheduler.add(waiting_of("a", 0, known_length=50), 100)
    scheduler.add(waiting_of("a", 1, known_length=90, num_generated=60), 100)
    scheduler.add(waiting_of("b", 0, known_length=40), 100)
    scheduler.add(waiting_of("c", 0, known_length=70), 100)
    assert order_of(scheduler.schedule(no_kv)) == ["c/0", "a/0", "b/0", "a/1"]


def test_the_oracle_uses_the_estimate_where_nobody_knows() -> None:
    scheduler = scheduler_of("longest-first")
    scheduler.add(waiting_of("a", 0, known_length=50), 100)
    scheduler.add(waiting_of("b", 0), 60)
    scheduler.add(waiting_of("c", 0), 40)
    assert order_of(scheduler.schedule(no_kv)) == ["b/0", "a/0", "c/0"]


# Starvation


def test_every_nth_assignment_goes_to_the_longest_waiting() -> None:
    scheduler = scheduler_of("context-aware", starvation_interval=3)
    for group, estimate in [("a", 10), ("b", 20), ("c", 30), ("d", 40), ("e", 50)]:
        scheduler.add(waiting_of(group, 1), estimate)
    order = order_of(scheduler.schedule(no_kv))
    assert order == ["e/1", "d/1", "a/1", "c/1", "b/1"]
    #                                ^ has waited longest, though it ranks last


def test_waiting_counts_from_the_last_chunk() -> None:
    scheduler = scheduler_of("context-aware", starvation_interval=1)
    scheduler.add(waiting_of("b", 1), 10)
    scheduler.add(waiting_of("a", 1, num_generated=80), 90)
    assert order_of(scheduler.schedule(no_kv)) == ["b/1", "a/1"]


def test_a_turn_stays_owed_until_there_is_room() -> None:
    scheduler = scheduler_of("context-aware", 12, starvation_interval=2)
    scheduler.add(waiting_of("z", 1, num_prompt_tokens=40), 10)  # 12 blocks
    scheduler.add(waiting_of("a", 1), 90)
    (first,) = scheduler.schedule(no_kv)
    assert first.request_id == "a/1"
    scheduler.add(waiting_of("b", 1), 90)
    assert scheduler.schedule(no_kv) == []  # the instance is kept for z/1
    release(scheduler, first)
    assert order_of(scheduler.schedule(no_kv)) == ["z/1"]


def test_the_oldest_keeps_its_age_when_it_does_not_fit() -> None:
    scheduler = scheduler_of("context-aware", 12, 12, starvation_interval=1)
    scheduler.add(waiting_of("a", 1), 90)
    scheduler.add(waiting_of("b", 1), 90)
    first, _ = scheduler.schedule(no_kv)
    scheduler.add(waiting_of("y", 1, num_prompt_tokens=40), 10)  # 12 blocks: waits
    scheduler.add(waiting_of("z", 1, num_prompt_tokens=40), 90)
    for _ in range(3):
        assert scheduler.schedule(no_kv) == []
    release(scheduler, first)
    assert order_of(scheduler.schedule(no_kv)) == ["y/1"]


def test_no_interval_means_no_such_turns() -> None:
    scheduler = scheduler_of("context-aware", starvation_interval=0)
    for n, group in enumerate("abcdef"):
        scheduler.add(waiting_of(group, 1), 10 * n)
    assert order_of(scheduler.schedule(no_kv)) == [f"{g}/1" for g in "fedcba"]


# Room


def test_nothing_is_assigned_beyond_the_blocks() -> None:
    scheduler = scheduler_of("fcfs", 7)
    for group in "abcdef":
        scheduler.add(waiting_of(group), 100)  # 8 tokens' KV: 2 blocks
    assert order_of(scheduler.schedule(no_kv)) == ["a/0", "b/0", "c/0"]
    assert len(scheduler) == 3


def test_nothing_is_assigned_beyond_the_places() -> None:
    scheduler = scheduler_of("fcfs", 100, max_num_seqs=2)
    for group in "abc":
        scheduler.add(waiting_of(group), 100)
    assert order_of(scheduler.schedule(no_kv)) == ["a/0", "b/0"]


def test_without_instances_everything_waits() -> None:
    for policy in POLICIES.values():
        scheduler = Scheduler(policy, chunk_size=8)
        scheduler.add(waiting_of("a"), 100)
        assert scheduler.schedule(no_kv) == []
        assert "a/0" in scheduler


def test_smaller_requests_go_on_where_the_large_one_does_not_wait() -> None:
    scheduler = scheduler_of("fcfs", 9, 9)
    scheduler.add(waiting_of("a"), 100)
    scheduler.add(waiting_of("b"), 100)
    scheduler.schedule(no_kv)  # 7 blocks left on each
    scheduler.add(waiting_of("c", num_prompt_tokens=32), 100)  # 9 blocks
    for group in "defg":
        scheduler.add(waiting_of(group), 100)
    assert places_of(scheduler.schedule(no_kv)) == [("d/0", 1), ("e/0", 1), ("f/0", 1)]
    assert len(scheduler) == 2  # c, and g for which B is full and A is kept


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    # Small requests keep coming, and each frees too little for the large one.
    scheduler = scheduler_of("fcfs", 12)
    scheduler.add(waiting_of("a", 0), 100)
    scheduler.add(waiting_of("a", 1), 100)
    running = scheduler.schedule(no_kv)
    scheduler.add(waiting_of("b", num_prompt_tokens=40), 100)  # 12 blocks
    trace = []
    for n in range(2):
        scheduler.add(waiting_of("c", n), 100)
        release(scheduler, running.pop())
        trace.append(order_of(scheduler.schedule(no_kv)))
    assert trace == [[], ["b/0"]]


def test_a_round_that_meets_too_many_large_requests_ends() -> None:
    scheduler = scheduler_of("fcfs", 12, 12)
    for group in "ab":
        scheduler.add(waiting_of(group), 100)
    scheduler.schedule(no_kv)
    for group in "cdef":
        scheduler.add(waiting_of(group, num_prompt_tokens=40), 100)
    scheduler.add(waiting_of("g"), 100)
    assert scheduler.schedule(no_kv) == []


def test_a_request_larger_than_an_instance_gets_one_alone() -> None:
    scheduler = scheduler_of("fcfs", 10)
    scheduler.add(waiting_of("a", num_prompt_tokens=100), 100)
    scheduler.add(waiting_of("b"), 100)
    (assignment,) = scheduler.schedule(no_kv)
    assert (assignment.request_id, assignment.num_reserved_blocks) == ("a/0", 10)


def test_granularity_of_a_pool_replaces_the_block_size() -> None:
    scheduler = Scheduler(POLICIES["fcfs"], chunk_size=40, granularity=32)
    scheduler.fleet.add(info_of(0))
    scheduler.add(waiting_of("a"), 100)
    (assignment,) = scheduler.schedule(no_kv)
    assert assignment.max_tokens == 29  # 4 + 29 = 32 + 1


# Where: affinity


def place(
    tokens: Mapping[InstanceId, int],
    *num_running: int,
    num_pooled: int = 0,
    pools: str = "",
    nodes: str = "",
    num_far: int = 0,
    siblings_on: Sequence[int] = (),
) -> int:
    """Where a request with that KV goes, by how many each instance runs.

    Args:
        num_pooled: tokens in pool 0, stored on node 0. num_far: what they are worth on
            other nodes.
        pools, nodes: of each instance, a digit; "" = all in 0.
    """
    scheduler = Scheduler(POLICIES["fcfs"], chunk_size=8)
    for i, node in enumerate(nodes or "0" * len(num_running)):
        info = info_of(i, node=node)
        scheduler.add_instance(info, int(pools[i]) if pools else 0)
    holders = Holders(tokens, num_pooled, 0, num_far, 0)
    for i, running in enumerate(num_running):
        for _ in range(running):
            scheduler.fleet.reserve(InstanceId(i), 4)
    assert scheduler.fleet.select(4)
    return place_by_affinity(holders, scheduler.fleet, siblings_on)


def test_a_request_without_kv_goes_to_the_least_loaded() -> None:
    assert place({}, 3, 1, 2) == B


def test_a_request_stays_with_its_kv_while_loads_are_even() -> None:
    assert place({C: 4}, 1, 1, 1) == C
    assert place({C: 4}, 1, 1, 2) == C


def test_a_request_leaves_its_kv_when_the_wait_costs_more_than_to_recompute() -> None:
    price = RECOMPUTE_TOKENS_PER_REQUEST
    # Worth one request of imbalance, and one more for every `price` tokens.
    assert place({A: price - 1}, 1, 0) == A
    assert place({A: price - 1}, 2, 0) == B
    assert place({A: price}, 2, 0) == A
    assert place({A: price}, 3, 0) == B
    assert place({A: 5 * price}, 6, 0) == A
    assert place({A: 5 * price}, 7, 0) == B


def test_only_kv_that_would_be_lost_counts() -> None:
    price = RECOMPUTE_TOKENS_PER_REQUEST
    assert place({A: 5 * price, B: 4 * price}, 3, 0) == B
    assert place({A: 5 * price, B: 4 * price}, 2, 0) == A


def test_of_several_holders_the_one_with_the_most_is_home() -> None:
    assert place({A: 100, C: 200}, 1, 1, 1) == C


def test_of_equal_holders_the_less_loaded_is_home() -> None:
    assert place({A: 100, C: 100}, 2, 5, 1) == C


def test_what_is_in_the_pool_of_all_draws_a_request_nowhere() -> None:
    assert place({}, 3, 1, 2, num_pooled=5000) == B


def test_more_than_is_in_the_pool_is_worth_the_difference() -> None:
    price = RECOMPUTE_TOKENS_PER_REQUEST
    assert place({A: 5 * price}, 3, 0, num_pooled=3 * price) == A
    assert place({A: 5 * price}, 4, 0, num_pooled=3 * price) == B
    assert place({A: 100}, 2, 1, 0, num_pooled=200, pools="101") == B


def test_the_pools_least_loaded_instance_holds_it_as_well_as_any() -> None:
    price = RECOMPUTE_TOKENS_PER_REQUEST
    assert place({}, 2, 1, 0, num_pooled=price, pools="001") == B
    assert place({}, 9, 3, 0, num_pooled=price, pools="001") == C


def test_a_pool_without_a_candidate_draws_a_request_nowhere() -> None:
    assert place({}, 1, 0, num_pooled=5000, pools="11") == B


def test_kv_that_another_node_stored_is_worth_less() -> None:
    price = RECOMPUTE_TOKENS_PER_REQUEST
    # A's node stored it; B, on another, would load it at half of what it is worth.
    in_pool = {"num_pooled": 4 * price, "num_far": 2 * price, "nodes": "01"}
    assert place({}, 3, 0, **in_pool) == A
    assert place({}, 4, 0, **in_pool) == B
    assert place({}, 1, 0, **in_pool | {"nodes": "00"}) == B, "as good as A"
    assert place({B: 3 * price}, 2, 0, **in_pool) == A
    assert place({B: 3 * price}, 3, 0, **in_pool) == B


def test_a_request_goes_to_a_node_of_its_siblings_while_loads_are_even() -> None:
    assert place({}, 1, 0, 2, nodes="010", siblings_on=[0]) == A
    assert place({}, 2, 0, 2, nodes="010", siblings_on=[0]) == B
    assert place({}, 1, 0, 1, nodes="012", siblings_on=[0, 2]) == A
    assert place({}, 1, 0, 0, nodes="012", siblings_on=[0, 2]) == C
    assert place({}, 1, 0, nodes="01", siblings_on=[5]) == B, "that node is gone"


def test_kv_counts_for_more_than_siblings() -> None:
    price = RECOMPUTE_TOKENS_PER_REQUEST
    assert place({B: price}, 0, 1, nodes="01", siblings_on=[0]) == B
    assert place({B: price}, 0, 3, nodes="01", siblings_on=[0]) == A


def test_a_group_is_remembered_where_it_ran_last_until_it_is_forgotten() -> None:
    scheduler = Scheduler(POLICIES["fcfs"], chunk_size=8)
    for i, node in enumerate("ab"):
        scheduler.add_instance(info_of(i, node=node))
    scheduler.add(waiting_of("a", 0), 100)
    assert places_of(scheduler.schedule(no_kv)) == [("a/0", A)]
    for index in (1, 2):
        scheduler.add(waiting_of("a", index), 100)
    # Its sibling is on A's node, which the first of them makes too busy for the second.
    assert places_of(scheduler.schedule(no_kv)) == [("a/1", A), ("a/2", B)]
    scheduler.forget_group(GroupId("a"))
    scheduler.add(waiting_of("b", 0), 100)
    assert places_of(scheduler.schedule(no_kv)) == [("b/0", B)]
    scheduler.forget_group(GroupId("b"))
    scheduler.add(waiting_of("b", 1), 100)
    assert places_of(scheduler.schedule(no_kv)) == [("b/1", A)]


def test_a_full_home_is_left() -> None:
    scheduler = scheduler_of("fcfs", 10, 10)
    scheduler.fleet.reserve(A, 32)
    scheduler.fleet.reserve(B, 4)
    assert scheduler.fleet.select(12)
    assert place_by_affinity(Holders({A: 100_000}), scheduler.fleet) == B


def test_a_resumed_request_is_placed_by_the_kv_it_is_told_of() -> None:
    def holders(request_id: RequestId) -> Holders:
        return Holders({C: 8}) if request_id == "b/0" else NOWHERE

    scheduler = scheduler_of("fcfs", 100, 100, 100)
    for group in "abc":
        scheduler.add(waiting_of(group), 100)
    assert places_of(scheduler.schedule(holders)) == [
        ("a/0", 0),
        ("b/0", 2),
        ("c/0", 1),
    ]


# Where: baselines


def add_two_groups(scheduler: Scheduler) -> None:
    for group in "ab":
        for index in range(2):
            scheduler.add(waiting_of(group, index), 100)


def test_group_round_robin_deals_out_whole_groups_in_turn() -> None:
    scheduler = scheduler_of("group-round-robin", 10, 10)
    for group in "abc":
        for index in range(2):
            scheduler.add(waiting_of(group, index), 100)
    assert places_of(scheduler.schedule(no_kv)) == [
        *(("a/0", 0), ("a/1", 0)),
        *(("b/0", 1), ("b/1", 1)),
        *(("c/0", 0), ("c/1", 0)),
    ]


def test_least_loaded_places_each_request_by_itself() -> None:
    scheduler = scheduler_of("least-loaded", 10, 10)
    scheduler.fleet.reserve(A, 0)
    add_two_groups(scheduler)
    assert places_of(scheduler.schedule(no_kv)) == [
        *(("a/0", 1), ("a/1", 0)),
        *(("b/0", 1), ("b/1", 0)),
    ]


def test_group_least_unfinished_places_whole_groups_where_fewest_are_running() -> None:
    scheduler = scheduler_of("group-least-unfinished", 10, 10)
    for _ in range(3):
        scheduler.fleet.reserve(A, 0)
    add_two_groups(scheduler)
    scheduler.add(waiting_of("c"), 100)
    assert places_of(scheduler.schedule(no_kv)) == [
        *(("a/0", 1), ("a/1", 1)),
        *(("b/0", 1), ("b/1", 1)),
        ("c/0", 0),
    ]


@pytest.mark.parametrize(
    "policy", ["group-round-robin", "least-loaded", "group-least-unfinished"]
)
def test_baselines_hand_over_everything_undivided_and_unreserved(
    policy: PolicyName,
) -> None:
    scheduler = scheduler_of(policy, 10, max_num_seqs=2)
    for index in range(20):
        scheduler.add(waiting_of("a", index), 100)
    assignments = scheduler.schedule(no_kv)
    assert order_of(assignments) == [f"a/{i}" for i in range(20)]
    assert {(a.max_tokens, a.num_reserved_blocks) for a in assignments} == {(100, 0)}
    assert len(scheduler) == 0


@pytest.mark.parametrize("policy", ["group-round-robin", "group-least-unfinished"])
def test_a_group_whose_instance_is_lost_moves_together(policy: PolicyName) -> None:
    scheduler = scheduler_of(policy, 10, 10, 10)
    add_two_groups(scheduler)
    scheduler.schedule(no_kv)
    scheduler.fleet.remove(A)
    for index in range(2):
        scheduler.add(waiting_of("a", index, num_generated=7), 100)
    (_, first), (_, second) = places_of(scheduler.schedule(no_kv))
    assert first == second != A


# Book-keeping


def test_what_was_assigned_before_an_error_of_the_policy_is_not_lost() -> None:
    def expect(request: Waiting, estimate: int) -> int:
        if request.group_id == "b":
            raise RuntimeError("no idea")
        return estimate

    policy = replace(POLICIES["fcfs"], expect=expect)
    scheduler = Scheduler(policy, chunk_size=8)
    scheduler.add_instance(info_of(num_kv_blocks=100))
    for arrival, group in enumerate("abc"):
        scheduler.add(waiting_of(group, arrival=arrival), 100)
    assert order_of(scheduler.schedule(no_kv)) == ["a/0"]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no idea"):
            scheduler.schedule(no_kv)
    assert scheduler.fleet.num_running(InstanceId(0)) == 1
    scheduler.remove_group(GroupId("b"))
    assert order_of(scheduler.schedule(no_kv)) == ["c/0"]


def test_an_assigned_request_waits_no_more() -> None:
    scheduler = scheduler_of("fcfs")
    scheduler.add(waiting_of("a"), 100)
    scheduler.schedule(no_kv)
    assert "a/0" not in scheduler
    assert scheduler.schedule(no_kv) == []


def test_a_cancelled_groups_requests_are_not_assigned() -> None:
    scheduler = scheduler_of("fcfs")
    add_two_groups(scheduler)
    scheduler.remove_group(GroupId("a"))
    assert order_of(scheduler.schedule(no_kv)) == ["b/0", "b/1"]


def test_a_request_waits_once() -> None:
    scheduler = scheduler_of("fcfs")
    scheduler.add(waiting_of("a"), 100)
    with pytest.raises(ValueError, match="request 'a/0' waits already"):
        scheduler.add(waiting_of("a"), 100)
