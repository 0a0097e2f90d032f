"""What a rollout's recorder keeps, and what it costs in a large cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.counts import DraftCounts, KvCounts
from aseer.runtime.figures import InstanceFigures
from aseer.runtime.recorder import Recorder
from aseer.types import InstanceId, InstanceLoad
from tests.unit.builders import (
    chunks_in,
    controller_of,
    finished_in,
    info_of,
    report_of,
    task_of,
)

if TYPE_CHECKING:
    import pytest

A, B = InstanceId(0), InstanceId(1)
NUM_INSTANCES = 500


def recording(num_instances: int, **settings):
    """A controller, its recorder, and so many instances with room for 33 chunks."""
    controller = controller_of(**settings)
    recorder = Recorder(controller, "context-aware", 8, 0)
    for i in range(num_instances):
        recorder.instance_up(info_of(i, num_kv_blocks=100), InstanceLoad())
        controller.instance_up(info_of(i, num_kv_blocks=100), 0.0)
    return controller, recorder


def test_time_with_work_is_counted_from_first_chunk_to_last() -> None:
    controller, recorder = recording(2)
    commands = controller.add_groups([task_of(num_requests=1)], 1.0)
    recorder.mark_busy(1.0)
    (chunk,) = chunks_in(commands)
    recorder.mark_busy(2.0)
    controller.progress([report_of(chunk.chunk_id, [1], end="stop")], 4.0)
    recorder.mark_busy(4.0)
    recorder.mark_busy(9.0)
    report = recorder.report(9.0, [0, 0])
    assert [i.busy_s for i in report.instances] == [3.0, 0.0]


def test_a_lost_instance_is_not_busy_until_it_has_work_again() -> None:
    controller, recorder = recording(1)
    controller.add_groups([task_of(num_requests=1)], 0.0)
    recorder.mark_busy(0.0)
    recorder.instance_down(A, 2.0)
    controller.instance_down(A, 2.0, "lost")
    recorder.mark_busy(2.0)
    recorder.instance_up(info_of(0), InstanceLoad())
    controller.instance_up(info_of(0), 5.0)
    recorder.mark_busy(5.0)
    assert [i.busy_s for i in recorder.report(6.0, [1]).instances] == [3.0]


def test_a_report_looks_only_at_instances_that_began_or_ceased_to_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller, recorder = recording(NUM_INSTANCES)
    seen = []
    set_busy = InstanceFigures.set_busy

    def counted(figures: InstanceFigures, *, busy: bool, now: float) -> None:
        seen.append(figures.info.instance_id)
        set_busy(figures, busy=busy, now=now)

    monkeypatch.setattr(InstanceFigures, "set_busy", counted)
    chunks = chunks_in(controller.add_groups([task_of(num_requests=3)], 0.0))
    recorder.mark_busy(0.0)
    assert sorted(seen) == sorted(c.instance_id for c in chunks)
    seen.clear()
    controller.progress([report_of(chunks[1].chunk_id, [1], end="stop")], 1.0)
    recorder.mark_busy(1.0)
    recorder.mark_busy(2.0)
    assert seen == [chunks[1].instance_id]


def test_the_longest_of_what_runs_is_known() -> None:
    controller, _ = recording(2)
    chunks = chunks_in(controller.add_groups([task_of(num_requests=4)], 0.0))
    assert controller.buffer.longest_running() == ("g/0", 0)
    for chunk, num in zip(chunks, (2, 4, 3, 1), strict=True):
        controller.progress([report_of(chunk.chunk_id, range(num))], 1.0)
    assert controller.buffer.longest_running() == ("g/1", 4)
    controller.progress([report_of(chunks[1].chunk_id, end="stop", start=4)], 2.0)
    assert controller.buffer.longest_running() == ("g/2", 3)
    controller.instance_down(chunks[2].instance_id, 3.0, "lost")
    assert controller.buffer.longest_running() == ("g/2", 3), "it goes on elsewhere"


def test_a_report_that_comes_twice_counts_once() -> None:
    controller, recorder = recording(1)
    (chunk,) = chunks_in(controller.add_groups([task_of(num_requests=1)], 0.0))
    end = report_of(chunk.chunk_id, [3], start=2, end="stop")
    for reports in ([report_of(chunk.chunk_id, [1, 2])] * 2, [end, end], [end]):
        controller.progress(reports, 1.0)
        recorder.count_tokens(InstanceId(0))
    (figures,) = recorder.report(2.0, [0]).instances
    assert (figures.num_output_tokens, figures.num_chunks) == (3, 1)


def test_an_instance_is_shown_as_it_was_when_it_reported_last() -> None:
    controller, recorder = recording(1)
    controller.add_groups([task_of(num_requests=2)], 0.0)
    recorder.sample(InstanceId(0), InstanceLoad(num_waiting=1), 1.0)
    controller.instance_down(InstanceId(0), 2.0, "killed")
    (latest,) = recorder.progress(3.0, intake_open=False).instances
    assert (latest.t_s, latest.num_running, latest.num_waiting) == (1.0, 2, 1)
    assert latest.kv_reserved > 0


def test_samples_are_bounded_for_all_instances_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aseer.runtime.recorder._MAX_SAMPLES_OF_ALL", 2000)
    num_instances, num_samples = 20, 350
    _, recorder = recording(num_instances)
    for n in range(num_samples):
        for i in range(num_instances):
            recorder.sample(InstanceId(i), InstanceLoad(num_waiting=n), float(n))
    progress = recorder.progress(float(num_samples), intake_open=False)
    assert [s.instance_id for s in progress.instances] == list(range(num_instances))
    assert {s.num_waiting for s in progress.instances} == {num_samples - 1}, (
        "the latest"
    )
    timeline = recorder.report(float(num_samples), [0] * num_instances).timeline
    assert 1000 <= len(timeline) <= 2000
    assert timeline[0].t_s < 10
    assert timeline[-1].t_s > num_samples - 10


def test_completions_are_as_the_responses_were() -> None:
    controller, recorder = recording(2)
    commands = controller.add_groups([task_of(g, num_requests=2) for g in "gh"], 0.0)
    responses = []
    ends = [
        report_of(c.chunk_id, range(n), end="stop")
        for n, c in enumerate(chunks_in(commands), 1)
    ]
    responses += finished_in(controller.progress(ends[:3], 1.0))
    responses += finished_in(controller.fail_all(2.0, "no engine is left"))
    for response in responses:
        recorder.finished(response)
    completions = recorder.report(2.0, [0, 0]).completions
    assert [
        (c.group_id, c.index, c.num_output_tokens, c.finish_reason, c.instance_id)
        for c in completions
    ] == [
        (
            r.group_id,
            r.index,
            len(r.token_ids),
            r.finish_reason,
            r.metrics.instances[-1],
        )
        for r in responses
    ]
    assert [c.t_s for c in completions] == [1.0, 1.0, 1.0, 2.0]
    assert completions[-1].finish_reason == "error"


def test_what_an_engine_counts_is_added_up_over_its_processes() -> None:
    figures = InstanceFigures(info_of(0))

    def load(num: int) -> InstanceLoad:
        drafts = DraftCounts(num_drafts=num, drafted=(num, num), accepted=(num,))
        kv = KvCounts(stored_tokens=num, loaded_tokens=2 * num)
        return InstanceLoad(num_preemptions=num, drafts=drafts, kv=kv)

    figures.begin(load(100))  # before this rollout
    assert (figures.num_preemptions, figures.drafts) == (0, None)
    figures.count(load(107))
    figures.count(InstanceLoad(num_preemptions=107))  # says nothing of the others
    figures.begin(InstanceLoad())  # another process
    figures.count(load(5))
    assert figures.num_preemptions == 12
    assert figures.drafts is not None
    assert figures.drafts.num_drafts == 12
    assert figures.drafts_in_all == (12, 24, 12)
    assert (figures.kv.stored_tokens, figures.kv_in_all) == (12, (12, 24))


def test_a_rollout_that_no_instance_took_part_in_has_a_report() -> None:
    controller = controller_of()
    recorder = Recorder(controller, "context-aware", 8, 0)
    controller.add_groups([task_of("g", num_requests=1)], now=0.0)
    for response in finished_in(controller.cancel_all(now=2.0)):
        recorder.finished(response)
    report = recorder.report(3.0, [])
    assert (report.num_responses, report.idle_fraction) == (1, 0.0)
    assert report.wall_s > 0
