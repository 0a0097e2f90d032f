"""The timeline picture: what is drawn where, read back from the artists."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from aseer.errors import ConfigError
from aseer.plot import MAX_LINES, figure, rate_edges, rate_of, timeline, tracks_of
from aseer.report import Completion, InstanceReport, RolloutReport, TimelineSample

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

END_S = 10.0
TAIL_S = 2.5


@pytest.fixture(autouse=True)
def _matplotlib_is_there() -> None:
    pytest.importorskip("matplotlib")


def samples(instance_id: int, *, rate: int = 100) -> list[TimelineSample]:
    """Ten seconds at a steady rate, with as many requests as seconds are left."""
    return [
        TimelineSample(
            t_s=float(second),
            instance_id=instance_id,
            num_running=10 - second,
            num_waiting=0,
            kv_used=second / 20,
            kv_reserved=second / 10,
            num_output_tokens=rate * second,
        )
        for second in range(11)
    ]


def completion(t_s: float, reason: str = "stop", instance_id: int | None = 0):
    return Completion(
        t_s=t_s,
        group_id="g",
        index=0,
        instance_id=instance_id,
        num_output_tokens=int(10 * t_s),
        finish_reason=reason,
    )


def report(
    *,
    num_instances: int = 2,
    completions: list[Completion] | None = None,
    timeline: list[TimelineSample] | None = None,
) -> RolloutReport:
    if timeline is None:
        timeline = [s for i in range(num_instances) for s in samples(i)]
    if completions is None:
        completions = [completion(float(t)) for t in range(1, 10)]
        completions.append(completion(END_S, "length", instance_id=1))
    return RolloutReport(
        policy="context-aware",
        chunk_size=128,
        num_groups=2,
        num_responses=10,
        num_prompt_tokens=100,
        num_output_tokens=2_000,
        wall_s=END_S,
        throughput_tok_s=200.0,
        tail_s=TAIL_S,
        num_chunks=31,
        num_migrations=7,
        num_preemptions=0,
        num_recomputed_tokens=50,
        num_cached_tokens=60,
        num_retries=0,
        finish_reasons={"stop": 9, "length": 1},
        mean_output_tokens=200.0,
        max_output_tokens=100,
        idle_fraction=0.25,
        weight_version=0,
        instances=[
            InstanceReport(
                instance_id=i,
                num_output_tokens=1000,
                num_chunks=15,
                num_preemptions=0,
                num_restarts=0,
                busy_s=9.0,
                num_kv_blocks=100,
                block_size=32,
                kv_tokens=3200,
            )
            for i in range(num_instances)
        ],
        completions=completions,
        timeline=timeline,
    )


def legend_texts(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


@cache
def drawn() -> Figure:
    """Of the usual report; tests only look at it."""
    return figure(report())


def test_each_instance_has_a_line_of_its_running_requests() -> None:
    axes = drawn().axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert legend_texts(axes) == ["instance 0", "instance 1"]
    assert list(lines["instance 1"].get_xdata()) == list(range(11))
    assert list(lines["instance 1"].get_ydata()) == list(range(10, -1, -1))
    # A count holds until the next report.
    assert lines["instance 1"].get_drawstyle() == "steps-post"


def test_the_rates_are_each_instances_and_their_sum() -> None:
    axes = drawn().axes[1]
    steps = {patch.get_label(): patch.get_data().values for patch in axes.patches[:3]}
    assert steps["instance 0"] == pytest.approx(100.0)
    assert steps["all instances"] == pytest.approx(200.0)


def test_the_kv_panel_has_what_is_used_and_what_is_reserved_in_percent() -> None:
    axes = drawn().axes[2]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["instance 0: in use"].get_ydata()) == pytest.approx(
        [5.0 * second for second in range(11)]
    )
    assert list(lines["instance 0: reserved"].get_ydata()) == pytest.approx(
        [10.0 * second for second in range(11)]
    )
    assert lines["instance 0: reserved"].get_linestyle() == ":"
    assert axes.get_ylabel() == "% of blocks"
    assert legend_texts(axes) == ["in use", "reserved"]


def test_every_completion_is_marked_at_its_time_and_length() -> None:
    axes = drawn().axes[3]
    marks = {group.get_label(): group for group in axes.collections}
    assert marks["stop"].get_offsets().tolist() == [
        [float(t), 10.0 * t] for t in range(1, 10)
    ]
    assert marks["length"].get_offsets().tolist() == [[END_S, 100.0]]
    assert legend_texts(axes)[:2] == ["stop (9)", "length (1)"]


def test_a_completion_has_its_instances_color() -> None:
    axes = drawn().axes
    color_of = {line.get_label(): line.get_color() for line in axes[0].get_lines()}
    marks = {group.get_label(): group for group in axes[3].collections}
    rgb = marks["length"].get_facecolors()[0][:3]
    expected = int(color_of["instance 1"][1:], 16)
    assert [round(255 * c) for c in rgb] == list(expected.to_bytes(3, "big"))


def test_a_request_that_never_ran_is_marked_too() -> None:
    end = completion(3.0, "aborted", instance_id=None)
    axes = figure(report(completions=[end])).axes[3]
    assert len(axes.collections[0].get_offsets()) == 1


def test_the_tail_is_shaded_in_every_panel() -> None:
    for axes in drawn().axes:
        shade = next(p for p in axes.patches if "tail" in str(p.get_label()))
        assert shade.get_x() == pytest.approx(END_S - TAIL_S)
        assert shade.get_width() == pytest.approx(TAIL_S)
    assert legend_texts(axes)[-1] == "tail, the last 10%: 2.5 s (25% of the time)"


def test_the_title_has_the_figures_and_every_axis_a_unit() -> None:
    title = drawn().get_suptitle()
    assert "10 responses of 2 groups: 2,000 tokens in 10.0 s, 200 tokens/s" in title
    assert "context-aware, chunks of 128: 31 chunks, 7 migrations" in title
    units = [axes.get_ylabel() for axes in drawn().axes]
    assert units == ["requests", "tokens/s", "% of blocks", "output tokens"]
    assert drawn().axes[-1].get_xlabel() == "seconds since the rollout's start"


def test_many_instances_are_the_rows_of_maps() -> None:
    count = MAX_LINES + 1
    axes = figure(report(num_instances=count)).axes
    for panel in axes[:3]:
        (mesh,) = (m for m in panel.collections if hasattr(m, "get_coordinates"))
        assert mesh.get_array().shape == (count, len(rate_edges(END_S)) - 1)
    running = axes[0].collections[0].get_array()
    assert running[0, 0] == 10
    assert running[0, -1] == 1


@pytest.mark.parametrize(
    "empty",
    [
        report(completions=[], timeline=[]),
        report(completions=[]),
        report(timeline=[]),
    ],
)
def test_what_is_missing_is_left_out(empty: RolloutReport) -> None:
    figure(empty).canvas.draw()


def test_tracks_are_in_order_and_hold_until_the_end() -> None:
    (track,) = tracks_of(list(reversed(samples(5)[:3])), end_s=4.0)
    assert track.instance_id == 5
    assert list(track.t_s) == [0.0, 1.0, 2.0, 4.0]
    assert list(track.running) == [10, 9, 8, 8]


def test_a_rate_is_the_growth_between_edges() -> None:
    (track,) = tracks_of(samples(0, rate=30))
    assert list(rate_of(track, np.array([0.0, 0.5, 4.0]))) == pytest.approx([30, 30])


def test_batches_of_tokens_are_spread_over_the_time_they_took() -> None:
    counts = [0, 0, 0, 30, 30, 30, 60]
    batched = [
        replace(sample, num_output_tokens=count)
        for sample, count in zip(samples(0), counts, strict=False)
    ]
    (track,) = tracks_of(batched)
    assert list(rate_of(track, np.arange(7.0))) == pytest.approx([10.0] * 6)


def test_an_idle_time_has_no_rate() -> None:
    idle = [
        replace(sample, num_running=running, num_output_tokens=count)
        for sample, running, count in zip(
            samples(0), [1, 0, 0, 1], [0, 10, 10, 30], strict=False
        )
    ]
    (track,) = tracks_of(idle)
    assert list(rate_of(track, np.arange(4.0))) == pytest.approx([10.0, 0.0, 20.0])


def test_a_png_is_written_and_the_path_returned(tmp_path: Path) -> None:
    path = tmp_path / "new" / "timeline.png"
    assert timeline(report(), str(path)) == path
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'aseer\[plot\]'"):
        figure(report())
