"""Events in, commands out: whole rollouts as traces.

Blocks have 4 tokens, prompts 4, chunks at most 8: a first chunk makes 5 tokens (to 9 =
2 x 4 + 1) and takes 3 blocks.
"""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aseer.policies import Policy
from aseer.runtime.recorder import Recorder
from aseer.types import GroupId, InstanceId, InstanceLoad
from tests.unit.builders import (
    aborts_in,
    chunks_in,
    controller_of,
    finished_in,
    info_of,
    placed,
    report_of,
    task_of,
)

if TYPE_CHECKING:
    from aseer.controller import Controller
    from aseer.core.commands import Command
    from aseer.core.waiting import Waiting
    from aseer.types import Response

A, B = InstanceId(0), InstanceId(1)
G, H = GroupId("g"), GroupId("h")


def with_instances(*num_kv_blocks: int, **settings: object) -> Controller:
    controller = controller_of(**settings)
    for i, blocks in enumerate(num_kv_blocks):
        controller.instance_up(info_of(i, num_kv_blocks=blocks), 0.0)
    return controller


def test_all_probes_of_the_groups_added_together_go_first() -> None:
    controller = with_instances(12)
    commands = controller.add_groups([task_of(g) for g in "gh"], 0.0)
    assert placed(commands) == [("g/0", 0), ("h/0", 0), ("g/1", 0), ("h/1", 0)]
    controller.check_integrity()


def test_what_is_learnt_decides_who_goes_next() -> None:
    """Algorithm 2 from beginning to end, on an instance with room for one request."""
    controller = with_instances(3)
    now = 0.0
    log = []
    commands = controller.add_groups([task_of(g, num_requests=3) for g in "gh"], now)
    lengths = {"g": 2, "h": 4}  # h is longer; max_tokens is 100
    while (chunks := chunks_in(commands)) and (now := now + 1):
        (chunk,) = chunks
        log.append(chunk.request_id)
        tokens = range(lengths[chunk.group_id])
        commands = controller.progress(
            [report_of(chunk.chunk_id, tokens, end="stop")], now
        )
    # Both probes; then h, of which more is expected; then g.
    assert log == ["g/0", "h/0", "h/1", "h/2", "g/1", "g/2"]
    assert controller.num_unfinished == 0


def test_a_group_with_a_prior_needs_no_probe_and_ranks_by_it() -> None:
    controller = with_instances(3)
    tasks = [
        task_of("f", length_prior=2),
        task_of("g", length_prior=5),
        task_of("h"),
    ]
    log = []
    commands = controller.add_groups(tasks, 0.0)
    while chunks := chunks_in(commands):
        (chunk,) = chunks
        log.append(chunk.request_id)
        end = report_of(chunk.chunk_id, [1] * 3, end="stop")
        commands = controller.progress([end], 1.0)
    # h's probe; then the longest: g by its prior, and h by what its probe showed.
    assert log == ["h/0", "g/0", "g/1", "h/1", "f/0", "f/1"]


def test_a_chunk_with_a_missing_report_is_aborted_and_runs_again() -> None:
    """Its place is free only once its instance says that it has stopped."""
    controller = with_instances(3)
    commands = controller.add_groups([task_of(num_requests=2)], 0.0)
    assert placed(commands) == [("g/0", 0)]
    missing = report_of(0, [3], start=2, num_cached_tokens=0)
    assert aborts_in(controller.progress([missing, missing], 1.0)) == [(0, 0)]
    controller.check_integrity()
    commands = controller.progress([report_of(0, start=3, end="aborted")], 2.0)
    assert len(placed(commands)) == 1
    controller.check_integrity()


def test_a_doubled_report_counts_a_move_once() -> None:
    controller = with_instances(12, 12)
    (first, *_) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    commands = controller.instance_down(first.instance_id, 1.0, "it burnt")
    (chunk,) = chunks_in(commands)
    found = report_of(chunk.chunk_id, [1], num_cached_tokens=3)
    controller.progress([found, found], 2.0)
    assert controller.counters.moves.num_found == 1
    assert controller.counters.num_output_tokens == 1


def test_an_unknown_group_goes_before_a_known_shorter_one() -> None:
    controller = with_instances(3)
    commands = controller.add_groups([task_of(g, num_requests=3) for g in "gh"], 0.0)
    (probe,) = chunks_in(commands)
    commands = controller.progress([report_of(probe.chunk_id, [1], end="stop")], 1.0)
    (probe,) = chunks_in(commands)
    assert probe.request_id == "h/0"
    # h's probe fails, which teaches nothing: h still may be as long as allowed.
    end = report_of(probe.chunk_id, [1, 2], end="error", error="x")
    assert placed(controller.progress([end], 2.0)) == [("h/1", 0)]


def test_a_request_runs_chunk_by_chunk_to_its_end() -> None:
    controller = with_instances(100)
    commands = controller.add_groups([task_of(num_requests=1, max_tokens=20)], 0.0)
    lengths, response = [], None
    while response is None:
        (chunk,) = chunks_in(commands)
        lengths.append(chunk.max_tokens)
        assert len(chunk.generated) // 4 == sum(lengths[:-1])
        report = report_of(chunk.chunk_id, range(chunk.max_tokens), end="length")
        commands = controller.progress([report], 1.0)
        response = next(iter(finished_in(commands)), None)
    assert lengths == [5, 8, 7]
    assert response.token_ids == [*range(5), *range(8), *range(7)]
    assert response.finish_reason == "length"
    assert controller.counters.num_chunks == 3
    assert controller.counters.num_output_tokens == 20


def test_chunks_and_reservations_are_given_back_at_the_end() -> None:
    controller = with_instances(10)
    commands = controller.add_groups([task_of(num_requests=3)], 0.0)
    fleet = controller.scheduler.fleet
    assert (fleet.num_running(A), fleet.num_free_blocks(A)) == (3, 4)
    controller.progress(
        [report_of(c.chunk_id, end="stop") for c in chunks_in(commands)], 1
    )
    assert (fleet.num_running(A), fleet.num_free_blocks(A)) == (0, 10)
    assert controller.running.num_on(A) == 0
    controller.check_integrity()


def test_progress_without_an_end_decides_nothing() -> None:
    controller = with_instances(3)
    (chunk,) = chunks_in(controller.add_groups([task_of()], 0.0))
    assert controller.progress([report_of(chunk.chunk_id, [1, 2])], 1.0) == []
    assert controller.buffer.longest_running() == ("g/0", 2)


def test_who_is_next_is_known_of_those_that_ran_before() -> None:
    controller = with_instances(3, policy="fcfs")
    (chunk,) = chunks_in(controller.add_groups([task_of(g) for g in "gh"], 0.0))
    assert controller.upcoming(9) == [], "no one that waits has run"
    end = report_of(chunk.chunk_id, range(5), end="length")
    controller.progress([end], 1.0)
    controller.instance_down(A, 2.0, "lost")
    assert [r.request_id for r in controller.upcoming(9)] == ["g/0"]
    assert controller.upcoming(0) == []


def test_late_and_repeated_reports_change_nothing() -> None:
    controller = with_instances(3)
    (chunk,) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    end = report_of(chunk.chunk_id, [1], end="stop")
    assert len(finished_in(controller.progress([end, end], 1.0))) == 1
    assert controller.progress([end], 2.0) == []
    assert controller.counters.num_output_tokens == 1
    controller.check_integrity()


# Placement


def test_a_resumed_request_stays_with_its_kv() -> None:
    controller = with_instances(100, 100)
    first, second = chunks_in(controller.add_groups([task_of(num_requests=2)], 0.0))
    assert (first.instance_id, second.instance_id) == (A, B)
    for chunk in (second, first):
        report = report_of(chunk.chunk_id, range(5), end="length")
        assert placed(controller.progress([report], 1.0)) == [
            (chunk.request_id, chunk.instance_id)
        ]
    assert controller.counters.num_migrations == 0


def test_a_request_migrates_when_its_instance_has_no_room() -> None:
    controller = with_instances(5, 100, policy="fcfs")
    commands = controller.add_groups([task_of(num_requests=4)], 0.0)
    assert placed(commands) == [("g/0", 1), ("g/1", 0), ("g/2", 1), ("g/3", 0)]
    # g/1 needs 4 blocks next; beside g/3 there are 3 on A.
    second = chunks_in(commands)[1]
    report = report_of(second.chunk_id, range(5), end="length")
    assert placed(controller.progress([report], 1.0)) == [("g/1", 1)]
    assert controller.counters.num_migrations == 1


# Instances that go and come


def test_a_lost_instances_requests_go_on_elsewhere_with_what_they_have() -> None:
    controller = with_instances(100, 100)
    first, second = chunks_in(controller.add_groups([task_of(num_requests=2)], 0.0))
    assert (first.instance_id, second.instance_id) == (A, B)
    controller.progress([report_of(first.chunk_id, [1, 2, 3])], 1.0)
    (chunk,) = chunks_in(controller.instance_down(A, 2.0, "it burnt"))
    assert (chunk.request_id, chunk.instance_id) == ("g/0", B)
    assert len(chunk.generated) // 4 == 3
    assert chunk.max_tokens == 13 - 7  # 4 + 3 tokens, to 3 x 4 + 1
    end = report_of(chunk.chunk_id, [4], end="stop")
    (response,) = finished_in(controller.progress([end], 3.0))
    assert response.token_ids == [1, 2, 3, 4]
    assert controller.counters.num_retries == 1
    assert controller.counters.num_output_tokens == 4
    controller.check_integrity()


def test_the_kv_of_waiting_requests_is_lost_with_their_instance() -> None:
    controller = with_instances(7, policy="fcfs")
    commands = controller.add_groups([task_of(num_requests=3)], 0.0)
    last = chunks_in(commands)[2]
    # It needs 4 blocks next, and there are 3.
    controller.progress([report_of(last.chunk_id, range(5), end="length")], 1.0)
    assert controller.residency.holders(last.request_id).tokens == {A: 8}
    controller.instance_down(A, 2.0, "it burnt")
    assert controller.residency.holders(last.request_id).tokens == {}


def test_an_engine_without_prefix_caching_holds_nothing_but_what_the_pool_has() -> None:
    controller = controller_of(policy="fcfs")
    info = replace(info_of(0, num_kv_blocks=7), keeps_kv=False)
    controller.instance_up(info, 0.0)
    commands = controller.add_groups([task_of(num_requests=3)], 0.0)
    first, _, last = chunks_in(commands)
    # They need 4 blocks next, and there are 3.
    controller.progress([report_of(last.chunk_id, range(5), end="length")], 1.0)
    assert controller.residency.holders(last.request_id).tokens == {}
    controller.use_pool(4, lambda _: 0)
    controller.progress([report_of(first.chunk_id, range(5), end="length")], 2.0)
    held = controller.residency.holders(first.request_id)
    assert (held.tokens, held.num_pooled) == ({}, 7)  # 8 tokens, less their price


def test_what_a_lost_instance_still_says_changes_nothing() -> None:
    controller = with_instances(100, 100)
    first, _ = chunks_in(controller.add_groups([task_of(num_requests=2)], 0.0))
    controller.instance_down(A, 1.0, "silent")
    assert controller.progress([report_of(first.chunk_id, [9], end="stop")], 2.0) == []
    assert controller.instance_down(A, 3.0, "again") == []
    controller.check_integrity()


def test_without_instances_requests_wait_and_go_on_when_one_is_back() -> None:
    controller = with_instances(100)
    controller.add_groups([task_of(num_requests=2)], 0.0)
    assert controller.instance_down(A, 1.0, "it burnt") == []
    assert controller.num_waiting == 2
    first = controller.instance_up(info_of(0), 2.0)
    assert placed(first) == [("g/0", 0)], "which may have been what killed it"
    (chunk,) = chunks_in(first)
    then = controller.progress([report_of(chunk.chunk_id, [1])], 3.0)
    assert placed(then) == [("g/1", 0)]
    controller.check_integrity()


def test_requests_whose_node_is_gone_go_on_at_once_however_often_that_happens() -> None:
    controller = with_instances(100, max_request_retries=0)
    (first, *_) = chunks_in(controller.add_groups([task_of(num_requests=3)], 0.0))
    controller.progress([report_of(first.chunk_id, [1, 2])], 0.5)
    for _ in range(3):
        assert controller.instance_left(A, 1.0, "its node is gone") == []
        assert controller.instance_left(A, 1.0, "again") == []
        chunks = chunks_in(controller.instance_up(info_of(0), 2.0))
        lengths = {c.request_id: len(c.generated) // 4 for c in chunks}
        assert lengths == {"g/0": 2, "g/1": 0, "g/2": 0}
    controller.check_integrity()


def test_tokens_that_a_request_has_to_make_again_are_counted_once() -> None:
    controller = with_instances(100)
    task = task_of(num_requests=1, undivided_because="presence_penalty")
    (chunk,) = chunks_in(controller.add_groups([task], 0.0))
    assert chunk.max_tokens == 100
    controller.progress([report_of(chunk.chunk_id, [1, 2, 3])], 1.0)
    controller.instance_down(A, 2.0, "it burnt")
    assert controller.counters.num_output_tokens == 0
    (chunk,) = chunks_in(controller.instance_up(info_of(0), 3.0))
    assert (chunk.generated, chunk.max_tokens) == (b"", 100)
    controller.progress([report_of(chunk.chunk_id, [1, 2], end="stop")], 4.0)
    assert controller.counters.num_output_tokens == 2


def test_losing_too_often_is_an_error_and_the_others_go_on() -> None:
    controller = with_instances(3, max_request_retries=1)
    controller.add_groups([task_of(num_requests=2)], 0.0)
    controller.instance_down(A, 1.0, "it burnt")
    controller.instance_up(info_of(0, num_kv_blocks=3), 2.0)
    (response,) = finished_in(controller.instance_down(A, 3.0, "it burnt"))
    assert (response.index, response.finish_reason) == (0, "error")
    assert placed(controller.instance_up(info_of(0), 4.0)) == [("g/1", 0)]


# Endings


def test_a_cancelled_group_ends_what_waits_at_once_and_what_runs_when_it_stops() -> (
    None
):
    controller = with_instances(3)
    (chunk,) = chunks_in(controller.add_groups([task_of(num_requests=3)], 0.0))
    commands = controller.cancel_group(G, 1.0)
    assert [r.index for r in finished_in(commands)] == [1, 2]
    assert {r.finish_reason for r in finished_in(commands)} == {"aborted"}
    assert aborts_in(commands) == [(0, chunk.chunk_id)]
    end = report_of(chunk.chunk_id, [1], end="aborted")
    (response,) = finished_in(controller.progress([end], 2.0))
    assert (response.index, response.token_ids) == (0, [1])
    assert (controller.num_unfinished, controller.num_waiting) == (0, 0)
    assert controller.is_group_finished(G)
    controller.check_integrity()


def test_a_cancelled_groups_room_goes_to_the_others() -> None:
    controller = with_instances(3)
    commands = controller.add_groups([task_of(g) for g in "gh"], 0.0)
    (chunk,) = chunks_in(commands)
    assert chunk.group_id == G
    controller.cancel_group(G, 1.0)
    end = report_of(chunk.chunk_id, end="aborted")
    assert placed(controller.progress([end], 2.0)) == [("h/0", 0)]


def test_who_waited_behind_a_cancelled_group_goes_on_at_once() -> None:
    controller = with_instances(12, policy="fcfs")
    controller.add_groups([task_of("g", num_requests=1)], 0.0)
    controller.add_groups([task_of("h", num_requests=1, num_prompt_tokens=40)], 0.0)
    # 9 of 12 blocks are free, but kept for h.
    assert controller.add_groups([task_of("i", num_requests=1)], 1.0) == []
    commands = controller.cancel_group(H, 2.0)
    assert [r.group_id for r in finished_in(commands)] == ["h"]
    assert placed(commands) == [("i/0", 0)]
    controller.check_integrity()


def test_cancelling_a_finished_group_does_nothing() -> None:
    controller = with_instances(3)
    (chunk,) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    controller.progress([report_of(chunk.chunk_id, [1], end="stop")], 1.0)
    assert controller.cancel_group(G, 2.0) == []


def test_a_request_that_stops_while_it_is_cancelled_has_stopped() -> None:
    controller = with_instances(3)
    (chunk,) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    controller.cancel_group(G, 1.0)
    end = report_of(chunk.chunk_id, [1], end="stop")
    (response,) = finished_in(controller.progress([end], 2.0))
    assert response.finish_reason == "stop"


def test_cancelled_requests_teach_nothing() -> None:
    controller = with_instances(3)
    (chunk,) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    controller.cancel_group(G, 1.0)
    controller.progress([report_of(chunk.chunk_id, [1], end="aborted")], 2.0)
    assert controller.context.length_estimate(G) == 100


def test_cancelling_everything_starts_nothing() -> None:
    controller = with_instances(3, 3)
    controller.add_groups([task_of(g) for g in "ghi"], 0.0)
    commands = controller.cancel_all(1.0)
    assert len(aborts_in(commands)) == 2
    assert len(finished_in(commands)) == 4
    assert chunks_in(commands) == []


@pytest.mark.parametrize("num_kv_blocks", [3, 100])
def test_when_nothing_can_run_any_more_everything_ends_as_an_error(
    num_kv_blocks: int,
) -> None:
    controller = with_instances(num_kv_blocks, num_kv_blocks)
    commands = controller.add_groups([task_of(g) for g in "ghi"], 0.0)
    running = chunks_in(commands)
    controller.progress([report_of(running[0].chunk_id, [1, 2])], 0.5)
    commands = controller.fail_all(1.0, "no engine is left")
    responses = finished_in(commands)
    assert sorted(r.request_id for r in responses) == [
        f"{g}/{i}" for g in "ghi" for i in (0, 1)
    ]
    assert {(r.finish_reason, r.error) for r in responses} == {
        ("error", "no engine is left")
    }
    assert [r.token_ids for r in responses if r.request_id == "g/0"] == [[1, 2]]
    assert chunks_in(commands) == []  # no engine is asked to run anything
    assert (controller.num_unfinished, controller.num_waiting) == (0, 0)
    controller.check_integrity()


# What is kept


def finish_all(controller: Controller, commands: list[Command]) -> list[Response]:
    """Engines that stop at once, until nothing runs."""
    responses = finished_in(commands)
    while chunks := chunks_in(commands):
        ends = [report_of(c.chunk_id, range(3), end="stop") for c in chunks]
        commands = controller.progress(ends, 1.0)
        responses += finished_in(commands)
    return responses


def test_a_finished_group_can_be_asked_for_until_the_next_call() -> None:
    controller = with_instances(100)
    assert len(finish_all(controller, controller.add_groups([task_of()], 0.0))) == 2
    assert controller.is_group_finished(G)
    assert controller.context.longest(G) == 3
    assert controller.buffer.group(G)[0].group.group_id == G
    controller.progress([], 2.0)
    assert controller.is_group_finished(G)
    assert controller.buffer.group(G) == []
    with pytest.raises(KeyError):
        controller.is_group_finished(H)


def test_a_finished_group_is_not_taken_again() -> None:
    controller = with_instances(100)
    finish_all(controller, controller.add_groups([task_of()], 0.0))
    for _ in range(2):
        with pytest.raises(ValueError, match="group 'g' is in this rollout already"):
            controller.add_groups([task_of()], 1.0)
    assert controller.cancel_group(G, 1.0) == []


def test_a_rollout_without_an_end_does_not_grow() -> None:
    # Requests of 60 tokens and some text, each a group of its own, 20 at a time. What
    # is left of one is its group's id and a row of its figures: 200 bytes at most.
    controller = with_instances(1000, 1000)
    recorder = Recorder(controller, "context-aware", 8, 0)
    for i in range(2):
        recorder.instance_up(info_of(i), InstanceLoad())
    sizes = []

    def roll(first: int, num: int) -> None:
        for n in range(first, first + num, 20):
            tasks = [task_of(f"group-{i}", num_requests=1) for i in range(n, n + 20)]
            commands = controller.add_groups(tasks, float(n))
            while chunks := chunks_in(commands):
                ends = [
                    report_of(c.chunk_id, range(c.max_tokens), end="length")
                    if len(c.generated) < 200
                    else report_of(c.chunk_id, [1], end="stop", text="x" * 200)
                    for c in chunks
                ]
                commands = controller.progress(ends, float(n))
                for response in finished_in(commands):
                    recorder.finished(response)
                recorder.mark_busy(float(n))
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        for first in range(0, 300, 100):
            roll(first, 100)
    finally:
        tracemalloc.stop()
    assert controller.counters.num_finished == 300
    assert (sizes[-1] - sizes[0]) / 200 < 200, sizes
    assert len(controller._dispatcher._arrivals) <= 20, "of those that finished last"


# The edge


def test_a_group_is_in_a_rollout_once() -> None:
    controller = with_instances(3)
    controller.add_groups([task_of()], 0.0)
    with pytest.raises(ValueError, match="group 'g' is in this rollout already"):
        controller.add_groups([task_of()], 1.0)


@pytest.mark.parametrize("ids", ["hg", "hhi", "hig"])
def test_groups_of_which_one_is_refused_are_all_refused(ids: str) -> None:
    controller = with_instances(3)
    controller.add_groups([task_of("g")], 0.0)
    with pytest.raises(ValueError, match="is in this rollout already"):
        controller.add_groups(iter([task_of(g) for g in ids]), 1.0)
    assert not controller.buffer.has_group(GroupId("h"))
    assert (controller.num_unfinished, controller.counters.num_groups) == (2, 1)
    controller.check_integrity()
    controller.add_groups([task_of(g) for g in "hi"], 2.0)
    assert (controller.num_unfinished, controller.counters.num_groups) == (6, 3)


def test_groups_that_a_policy_cannot_rank_leave_nothing() -> None:
    def rank(request: Waiting, length_estimate: int) -> tuple[int, ...]:
        if request.request_id == "i/1":
            raise RuntimeError("a policy's own bug")
        return (request.arrival,)

    controller = with_instances(3, policy=Policy("fcfs", rank, "affinity"))
    with pytest.raises(RuntimeError, match="own bug"):
        controller.add_groups([task_of(g) for g in "ghi"], 0.0)
    assert (controller.num_unfinished, controller.num_waiting) == (0, 0)
    assert (len(controller.buffer), controller.counters.num_groups) == (0, 0)
    controller.check_integrity()
    assert placed(controller.add_groups([task_of(g) for g in "hg"], 1.0)) == [
        ("h/0", 0)
    ]


def test_an_instance_that_is_up_already_changes_nothing() -> None:
    controller = with_instances(3)
    controller.add_groups([task_of()], 0.0)
    with pytest.raises(ValueError, match="up already"):
        controller.instance_up(info_of(0), 1.0)
    assert controller.running.num_on(A) == 1
    controller.check_integrity()


def test_an_unknown_group_cannot_be_cancelled() -> None:
    with pytest.raises(KeyError):
        with_instances(3).cancel_group(G, 0.0)


def test_responses_carry_the_weights_they_were_sampled_with() -> None:
    controller = with_instances(3, weight_version=7)
    (chunk,) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    end = report_of(chunk.chunk_id, [1], end="stop")
    (response,) = finished_in(controller.progress([end], 1.0))
    assert response.weight_version == 7


def test_counters_add_up_to_the_responses() -> None:
    controller = with_instances(100, 100)
    commands = controller.add_groups(
        [task_of(g, num_requests=3, max_tokens=20) for g in "gh"], 0.0
    )
    responses = []
    while chunks := chunks_in(commands):
        reports = [
            report_of(
                c.chunk_id, range(c.max_tokens), end="length", num_cached_tokens=4
            )
            for c in chunks
        ]
        commands = controller.progress(reports, 1.0)
        responses += finished_in(commands)
    counters, metrics = controller.counters, [r.metrics for r in responses]
    assert (counters.num_groups, counters.num_groups_finished) == (2, 2)
    assert counters.num_finished == len(responses) == 6
    assert counters.num_output_tokens == sum(len(r.token_ids) for r in responses) == 120
    assert counters.num_prompt_tokens == 6 * 4
    assert counters.num_chunks == sum(m.num_chunks for m in metrics) == 18
    assert counters.num_migrations == sum(m.num_migrations for m in metrics)
    assert counters.num_cached_tokens == sum(m.num_cached_tokens for m in metrics) == 72
    assert counters.num_recomputed_tokens == sum(
        m.num_recomputed_tokens for m in metrics
    )


def test_moves_are_told_apart_by_whether_their_kv_was_found() -> None:
    controller = with_instances(100, 100)
    controller.use_pool(4, lambda instance_id: 0)
    commands = controller.add_groups([task_of("g", num_requests=1)], 0.0)
    seen = []
    for now in range(1, 5):
        (chunk,) = chunks_in(commands)
        at_start = 4 + len(chunk.generated) // 4
        found = at_start - 1 if now % 2 else 0
        seen.append(chunk.instance_id)
        controller.progress([report_of(chunk.chunk_id, num_cached_tokens=found)], now)
        # Somebody else's work makes the other instance the better place.
        controller.scheduler.fleet.reserve(chunk.instance_id, 4)
        controller.scheduler.fleet.reserve(chunk.instance_id, 4)
        ended = report_of(chunk.chunk_id, range(chunk.max_tokens), end="length")
        commands = controller.progress([ended], now)
    counters = controller.counters
    assert counters.num_migrations == counters.moves.num_found + (
        counters.moves.num_recomputed
    ) + (seen[-1] != chunks_in(commands)[0].instance_id)
    assert counters.moves.num_found == sum(
        a != b for a, b in zip(seen[1::2], seen[2::2], strict=False)
    )
    assert counters.moves.num_recomputed > 0


def test_moves_that_lose_their_kv_make_the_next_ones_dearer() -> None:
    controller = with_instances(100)
    controller.set_move_price(0.2)
    assert controller.residency.move_price == pytest.approx(0.2)
    controller.counters.moves.num_found = 3
    controller.counters.moves.num_recomputed = 1
    controller.set_move_price(0.2)
    assert controller.residency.move_price == pytest.approx(0.2 + 0.8 / 4)
    assert controller.residency.node_price == pytest.approx(0.2)
    controller.set_move_price(None)
    assert controller.residency.move_price < 1
    # What it takes to bring KV from another node comes on top.
    controller.set_move_price(0.2, 0.5)
    assert controller.residency.node_price == pytest.approx(0.7)
    assert controller.residency.move_price == pytest.approx(0.2 + 0.8 / 4)
    controller.set_move_price(0.2, 1.0)
    assert controller.residency.node_price == 1.0


def moved_over(*nodes: str, cached: int) -> Controller:
    """A request moved once from an instance of the first node to one of the last."""
    controller = with_instances()
    controller.use_pool(4, lambda instance_id: 0)
    for i, node in enumerate(nodes):
        controller.instance_up(info_of(i, num_kv_blocks=12, node=node), 0.0)
    (first,) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    commands = controller.instance_left(first.instance_id, 1.0, "its node is gone")
    (chunk,) = chunks_in(commands)
    report = report_of(chunk.chunk_id, [1], num_cached_tokens=cached)
    controller.progress([report], 2.0)
    return controller


@pytest.mark.parametrize("cached", [0, 3])
def test_the_price_of_a_move_between_nodes_is_learnt_apart(cached: int) -> None:
    near, far = moved_over("a", "a", cached=cached), moved_over("a", "b", cached=cached)
    assert near.counters.num_migrations == far.counters.num_migrations == 1
    assert near.counters.num_node_migrations == 0
    assert far.counters.num_node_migrations == 1
    for controller in (near, far):
        controller.set_move_price(0.2)
    lost = pytest.approx(0.2 if cached else 1.0)
    assert (near.residency.move_price, near.residency.node_price) == (lost, 0.2)
    assert (far.residency.move_price, far.residency.node_price) == (0.2, lost)


def test_everything_is_cancelled_a_little_at_a_time_and_nothing_starts_meanwhile() -> (
    None
):
    controller = with_instances(100)
    tasks = [task_of(f"g{i}", num_requests=4) for i in range(50)]
    controller.add_groups(tasks, 0.0)
    sizes = []
    while not controller.is_cancelled:
        commands = controller.cancel_all(1.0, max_requests=10)
        assert not chunks_in(commands)
        sizes.append(len(commands))
    assert sum(sizes) == 200
    assert max(sizes) <= 10 + 4
    late = controller.add_groups([task_of("late", num_requests=2)], 2.0)
    assert late == []
    assert not controller.is_cancelled
    assert len(controller.cancel_all(3.0)) == 2


def test_instances_that_died_as_one_are_gone_before_anything_goes_on() -> None:
    controller = with_instances(12, 12, 12)
    tasks = [task_of(g, num_requests=1) for g in "ghi"]
    places = dict(placed(controller.add_groups(tasks, 0.0)))
    assert sorted(places.values()) == [0, 1, 2]
    ids = [InstanceId(i) for i in range(3)]
    commands = controller.instance_down(ids[1], 1.0, "it burnt", [ids[2]])
    controller.check_integrity()
    ((tried, place),) = placed(commands)
    assert places[tried] in (1, 2)
    assert place == 0, "on none of those that died"
    assert set(controller.running) == {ids[0]}


def test_one_on_trial_when_several_died_as_one_is_blamed() -> None:
    controller = with_instances(12, 12)
    controller.add_groups([task_of(num_requests=1)], 0.0)
    one, other = InstanceId(0), InstanceId(1)
    for times in range(2):
        controller.instance_down(one, 1.0, "it burnt", [other])
        commands = controller.instance_up(info_of(0), 2.0)
        commands += controller.instance_up(info_of(1), 2.0)
        (request,) = controller.buffer.requests()
        assert request.num_retries == times + 1
        assert len(placed(commands)) == 1


def test_the_garbage_collector_traverses_no_single_request() -> None:
    """A million objects would stop the trainer's thread for a second."""
    controller = controller_of()
    tasks = [task_of(f"g{i}", num_requests=50) for i in range(20)]
    gc.collect()
    num_before = len(gc.get_objects())
    commands = controller.add_groups(tasks, 0.0)
    num_waiting = len(gc.get_objects()) - num_before
    controller.instance_up(info_of(0, num_kv_blocks=10_000, max_num_seqs=1000), 0.0)
    num_running = len(gc.get_objects()) - num_before
    assert not commands
    assert controller.num_waiting == 0
    assert num_waiting < 10
    assert num_running < 20


def test_the_garbage_collector_traverses_no_tokens_of_responses() -> None:
    controller = with_instances(100)
    commands = controller.add_groups([task_of(num_requests=1)], 0.0)
    (chunk,) = chunks_in(commands)
    end = report_of(chunk.chunk_id, [1, 2, 3], end="stop")
    (response,) = finished_in(controller.progress([end], 1.0))
    assert response.token_ids == [1, 2, 3]
    lists = (response.token_ids, response.logprobs, response.prompt_token_ids)
    assert not any(map(gc.is_tracked, lists))


def test_what_a_finished_group_had_is_freed_without_the_garbage_collector() -> None:
    class Metadata:
        pass

    controller = with_instances(100)
    metadata = Metadata()
    is_alive = weakref.ref(metadata)
    task = replace(task_of(num_requests=1), metadata=metadata)
    gc.disable()
    try:
        (chunk,) = chunks_in(controller.add_groups([task], 0.0))
        controller.progress([report_of(chunk.chunk_id, [1], end="stop")], 1.0)
        controller.forget_finished()
        del metadata, task, chunk
        assert is_alive() is None
    finally:
        gc.enable()
