"""A finished rollout as a picture: what each instance did over time.

Needs matplotlib (`pip install 'aseer[plot]'`). Figures are made without pyplot, so
nothing global is touched, no display is needed, and any thread may draw.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aseer.errors import ConfigError
from aseer.report import TAIL_FRACTION

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from aseer.report import Completion, RolloutReport, TimelineSample

    Floats = npt.NDArray[np.float64]

# Up to so many instances have a line each; more are rows of a heat map.
MAX_LINES = 8
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#6f4e9c",
    "#5c5c5c",
)
_MANY_COLOR = "#0072b2"
_TAIL_COLOR = "#f2c14e"
_TAIL_EDGE_COLOR = "#9a6a00"
_FINISH_MARKERS = {"stop": "o", "length": "^", "aborted": "x", "error": "X"}
_RATE_BIN_S = 1.0
_MIN_RATE_BINS = 8
_MAX_RATE_BINS = 80


class Track(NamedTuple):
    """One instance's samples in order of time; shares of KV in percent."""

    instance_id: int
    t_s: Floats
    running: Floats
    kv_used: Floats
    kv_reserved: Floats
    tokens: Floats


def timeline(report: RolloutReport, path: Path | str) -> Path:
    """Write the picture as a PNG and return its path; the folder is made if need be.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn = figure(report)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, format="png", dpi=150)
    return path


def figure(report: RolloutReport) -> Figure:
    """The picture, to be changed or saved in another format.

    From the top: running requests, tokens per second, KV in use and reserved, and a
    mark for each finished request at its length. The tail, from the completion of the
    90th-percentile request to the end, is shaded.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn = _new_figure(11, 10)
    axes = drawn.subplots(4, 1, sharex=True)
    running, rate, kv, completions = axes
    tracks = tracks_of(report.timeline, end_s=_end_of(report))
    mapped = len(tracks) > MAX_LINES
    if not mapped:
        colors = {t.instance_id: c for t, c in zip(tracks, _COLORS, strict=False)}
        _draw_lines(running, rate, kv, tracks, colors)
    else:
        colors = {}
        _draw_maps(drawn, running, rate, kv, tracks, _end_of(report))
    marks = _draw_completions(completions, report.completions, colors)
    tail = _shade_tail(axes, report, "white" if mapped else _TAIL_EDGE_COLOR)
    _legend(completions, marks + tail)
    _finish(drawn, axes, report)
    return drawn


def completions(
    rollouts: Sequence[tuple[str, RolloutReport]], path: Path | str
) -> Path:
    """Compare named rollouts: responses finished over time, a curve each, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn = _new_figure(8, 4.5)
    axes = drawn.subplots()
    for name, report in rollouts:
        times = sorted(c.t_s for c in report.completions)
        axes.plot(
            times, [100 * (i + 1) / len(times) for i in range(len(times))], label=name
        )
    axes.axhline(100 * (1 - TAIL_FRACTION), color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="seconds", ylabel="responses finished, %", ylim=(0, 101))
    axes.set_title("The tail is what lies above the line", fontsize=10)
    axes.legend(fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, format="png", dpi=150)
    return path


def tracks_of(samples: list[TimelineSample], *, end_s: float = 0.0) -> list[Track]:
    """The timeline, an instance at a time; its last values hold until `end_s`."""
    import numpy as np

    by_instance: dict[int, list[TimelineSample]] = {}
    for sample in samples:
        by_instance.setdefault(sample.instance_id, []).append(sample)
    tracks = []
    for instance_id, own in sorted(by_instance.items()):
        own.sort(key=lambda s: s.t_s)
        rows = [
            (
                s.t_s,
                s.num_running,
                100 * s.kv_used,
                100 * s.kv_reserved,
                s.num_output_tokens,
            )
            for s in own
        ]
        if rows[-1][0] < end_s:
            rows.append((end_s, *rows[-1][1:]))
        tracks.append(Track(instance_id, *np.array(rows, dtype=np.float64).T))
    return tracks


def rate_of(track: Track, edges: Floats) -> Floats:
    """Tokens per second between successive edges, [len(edges) - 1].

    Engines report tokens in batches, so a count that did not grow says nothing while
    requests run: it is taken to grow evenly from one change to the next.
    """
    import numpy as np

    is_new = np.diff(track.tokens, prepend=-1.0) > 0
    known = is_new | (track.running == 0)
    t_s = np.concatenate(([0.0], track.t_s[known]))
    tokens = np.concatenate(([0.0], track.tokens[known]))
    rate: Floats = np.diff(np.interp(edges, t_s, tokens)) / np.diff(edges)
    return rate


def rate_edges(end_s: float) -> Floats:
    """Where a rate's time bins begin and end."""
    import numpy as np

    num_bins = int(min(_MAX_RATE_BINS, max(_MIN_RATE_BINS, end_s / _RATE_BIN_S)))
    return np.linspace(0.0, max(end_s, 1e-9), num_bins + 1)


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError(
            "plotting needs matplotlib; install it with `pip install 'aseer[plot]'`"
        ) from exc
    return Figure(figsize=(width, height), layout="constrained")


def _draw_lines(
    running: Axes,
    rate: Axes,
    kv: Axes,
    tracks: list[Track],
    colors: dict[int, str],
) -> None:
    import numpy as np
    from matplotlib.lines import Line2D

    end_s = max((float(t.t_s[-1]) for t in tracks), default=0.0)
    edges = rate_edges(end_s)
    total = np.zeros(len(edges) - 1)
    for track in tracks:
        color = colors[track.instance_id]
        name = f"instance {track.instance_id}"
        own = rate_of(track, edges)
        total += own
        running.step(track.t_s, track.running, where="post", color=color, label=name)
        rate.stairs(own, edges, baseline=None, color=color, linewidth=1.5, label=name)
        kv.plot(track.t_s, track.kv_used, color=color, label=f"{name}: in use")
        kv.step(
            track.t_s,
            track.kv_reserved,
            where="post",
            color=color,
            linestyle=":",
            label=f"{name}: reserved",
        )
        kv.fill_between(track.t_s, track.kv_used, color=color, alpha=0.12, linewidth=0)
    if len(tracks) > 1:
        rate.stairs(
            total,
            edges,
            baseline=None,
            color="0.25",
            linestyle="--",
            linewidth=1.2,
            label="all instances",
        )
    styles: list[Artist] = [
        Line2D([], [], color="0.25", label="in use"),
        Line2D([], [], color="0.25", linestyle=":", label="reserved"),
    ]
    _legend(running)
    _legend(rate)
    _legend(kv, styles)


def _draw_maps(
    drawn: Figure,
    running: Axes,
    rate: Axes,
    kv: Axes,
    tracks: list[Track],
    end_s: float,
) -> None:
    import numpy as np

    edges = rate_edges(end_s)
    middles = (edges[1:] + edges[:-1]) / 2

    def at(track: Track, values: Floats) -> Floats:
        """The value that held in the middle of each bin."""
        index = np.searchsorted(track.t_s, middles, side="right") - 1
        held: Floats = np.where(index >= 0, values[np.maximum(index, 0)], 0.0)
        return held

    panels = (
        (running, [at(t, t.running) for t in tracks], "requests"),
        (rate, [rate_of(t, edges) for t in tracks], "tokens/s"),
        (kv, [at(t, t.kv_used) for t in tracks], "% of blocks in use"),
    )
    rows = np.arange(len(tracks) + 1) - 0.5
    for axes, values, unit in panels:
        mesh = axes.pcolormesh(edges, rows, np.array(values), cmap="viridis", vmin=0)
        drawn.colorbar(mesh, ax=axes, label=unit, pad=0.01)
        axes.set_ylabel("instance")
        axes.invert_yaxis()


def _draw_completions(
    axes: Axes, completions: list[Completion], colors: dict[int, str]
) -> list[Artist]:
    """Mark each finished request and return what the legend shows."""
    from matplotlib.lines import Line2D

    handles: list[Artist] = []
    for reason, marker in _FINISH_MARKERS.items():
        own = [c for c in completions if c.finish_reason == reason]
        if not own:
            continue
        default = "0.4" if colors else _MANY_COLOR
        axes.scatter(
            [c.t_s for c in own],
            [c.num_output_tokens for c in own],
            c=[
                colors.get(-1 if c.instance_id is None else c.instance_id, default)
                for c in own
            ],
            marker=marker,
            s=26,
            alpha=0.8,
            linewidths=1.2 if marker == "x" else 0.0,
            label=reason,
        )
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker=marker,
                color="0.25",
                label=f"{reason} ({len(own)})",
            )
        )
    return handles


def _shade_tail(
    panels: npt.NDArray[np.object_], report: RolloutReport, line_color: str
) -> list[Artist]:
    """Shade the tail in every panel and return what the legend shows."""
    if not report.completions:
        return []
    end_s = max(c.t_s for c in report.completions)
    start_s = end_s - report.tail_s
    share = report.tail_s / report.wall_s if report.wall_s else 0.0
    label = (
        f"tail, the last {TAIL_FRACTION:.0%}: {report.tail_s:.1f} s "
        f"({share:.0%} of the time)"
    )
    shades = []
    for axes in panels:
        shades.append(
            axes.axvspan(
                start_s,
                end_s,
                color=_TAIL_COLOR,
                alpha=0.3,
                lw=0,
                zorder=0,
                label=label,
            )
        )
        # Seen on a heat map too, which covers the shade.
        axes.axvline(start_s, color=line_color, linewidth=1, linestyle="--")
    panels[-1].lines[-1].set_color(_TAIL_EDGE_COLOR)
    return shades[-1:]


def _finish(
    drawn: Figure, panels: npt.NDArray[np.object_], report: RolloutReport
) -> None:
    titles = (
        ("Running requests", "requests"),
        ("Output tokens per second", "tokens/s"),
        ("KV cache", "% of blocks"),
        ("Finished requests, by when and how long", "output tokens"),
    )
    for axes, (title, unit) in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        if not axes.get_ylabel():
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
    panels[-1].set_xlabel("seconds since the rollout's start")
    panels[-1].set_xlim(0, _end_of(report) * 1.01 or 1.0)
    chunks = f"chunks of {report.chunk_size}" if report.chunk_size else "undivided"
    drawn.suptitle(
        f"{report.num_responses} responses of {report.num_groups} groups: "
        f"{report.num_output_tokens:,} tokens in {report.wall_s:.1f} s, "
        f"{report.throughput_tok_s:,.0f} tokens/s\n"
        f"{report.policy}, {chunks}: {report.num_chunks:,} chunks, "
        f"{report.num_migrations:,} migrations, "
        f"{report.num_preemptions:,} preemptions, "
        f"instances idle {report.idle_fraction:.0%} of the time",
        fontsize=12,
    )


def _end_of(report: RolloutReport) -> float:
    times = [report.wall_s]
    times += [s.t_s for s in report.timeline]
    times += [c.t_s for c in report.completions]
    return max(times)


def _legend(axes: Axes, handles: list[Artist] | None = None) -> None:
    """Above the panel, at the right of its title, where it hides nothing."""
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.1,
            ncols=len(handles),
            columnspacing=1.2,
            handletextpad=0.5,
            frameon=False,
            fontsize=9,
        )
