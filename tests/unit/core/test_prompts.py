"""A prompt is reserved once for siblings that are sure to share it."""

from __future__ import annotations

from aseer.core.prompts import SharedPrompts
from aseer.policies import POLICIES
from aseer.scheduler import Scheduler
from aseer.types import GroupId, InstanceId, RequestId
from tests.unit.builders import info_of, no_kv, waiting_of

A, B = InstanceId(0), InstanceId(1)
G, H = GroupId("g"), GroupId("h")
R, S, T = RequestId("g/0"), RequestId("g/1"), RequestId("g/2")
U, V = RequestId("g/3"), RequestId("h/0")


def test_a_prompt_is_found_once_a_sibling_has_a_token() -> None:
    prompts = SharedPrompts()
    assert not prompts.start(G, A, R, 5)
    assert not prompts.start(G, A, S, 5)  # at the same time: it may not find it
    prompts.begin(G, A, R)
    assert prompts.start(G, A, T, 5)
    assert not prompts.start(G, B, U, 5)
    assert not prompts.start(H, A, V, 5)
    assert list(prompts.holders(G)) == [A]
    assert (prompts.num_blocks(A), prompts.num_blocks(B)) == (15, 5)


def test_one_copy_stays_reserved_while_anyone_runs_who_found_it() -> None:
    prompts = SharedPrompts()
    prompts.start(G, A, R, 5)
    prompts.start(G, A, S, 5)
    prompts.begin(G, A, R)
    prompts.start(G, A, T, 5)
    assert prompts.end(G, A, R) == 0  # what T found stays
    assert prompts.end(G, A, S) == 5  # its own copy goes with it
    assert not prompts.start(G, A, R, 5)  # T has not begun
    assert prompts.end(G, A, T) == 5
    assert prompts.end(G, A, R) == 5
    assert prompts.num_blocks(A) == 0


def test_a_lost_instance_has_no_prompts() -> None:
    prompts = SharedPrompts()
    prompts.start(G, A, R, 5)
    prompts.begin(G, A, R)
    prompts.drop_instance(A)
    prompts.begin(G, A, R)  # late
    assert prompts.end(G, A, R) == 0
    assert list(prompts.holders(G)) == []
    assert not prompts.start(G, A, R, 5)


def scheduler_of(*num_kv_blocks: int) -> Scheduler:
    """With instances that share prompts, of so many blocks of 4 tokens."""
    scheduler = Scheduler(POLICIES["context-aware"], chunk_size=8)
    for i, blocks in enumerate(num_kv_blocks):
        scheduler.add_instance(info_of(i, num_kv_blocks=blocks, shares_prompts=True))
    return scheduler


def test_siblings_fit_beside_a_prompt_where_it_would_not_fit_again() -> None:
    scheduler = scheduler_of(16)
    scheduler.add(waiting_of("g", 0, num_prompt_tokens=41), 100)
    (probe,) = scheduler.schedule(no_kv)  # 48 tokens' KV: 10 blocks, and 2 of its own
    assert (probe.num_reserved_blocks, scheduler.num_prompt_blocks(A)) == (2, 10)
    scheduler.add(waiting_of("g", 1, num_prompt_tokens=41), 100)
    assert scheduler.schedule(no_kv) == []  # 12 blocks, and 4 are left
    scheduler.begin(G, A, R)
    (sibling,) = scheduler.schedule(no_kv)
    assert (sibling.num_reserved_blocks, scheduler.num_prompt_blocks(A)) == (2, 10)
    assert scheduler.fleet.num_free_blocks(A) == 2
    for request_id, left in ((R, 4), (S, 16)):
        scheduler.end(G, A, request_id, 2)
        assert scheduler.fleet.num_free_blocks(A) == left


def test_a_sibling_goes_where_its_long_prompt_is() -> None:
    scheduler = scheduler_of(1000, 1000)
    scheduler.add(waiting_of("g", 0, num_prompt_tokens=1001), 100)
    scheduler.schedule(no_kv)
    scheduler.begin(G, A, R)
    for index in range(1, 8):
        scheduler.add(waiting_of("g", index, num_prompt_tokens=1001), 100)
    places = [a.instance_id for a in scheduler.schedule(no_kv)]
    # As long as it has not 1 + 1000 // 256 requests more than the other.
    assert places == [A, A, A, A, B, A, B]


def test_without_prefix_caching_everybody_reserves_the_prompt() -> None:
    scheduler = Scheduler(POLICIES["context-aware"], chunk_size=8)
    scheduler.add_instance(info_of(0, num_kv_blocks=16))
    for index in range(2):
        scheduler.add(waiting_of("g", index, num_prompt_tokens=41), 100)
    (probe,) = scheduler.schedule(no_kv)
    scheduler.begin(G, A, R)
    assert scheduler.schedule(no_kv) == []
    assert (probe.num_reserved_blocks, scheduler.num_prompt_blocks(A)) == (12, 0)
