"""The result of `bench_rollout_vllm.py` as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from aseer.plot import tracks_of
from aseer.report import TAIL_FRACTION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from replaying import Arm, Run

    from aseer.report import RolloutReport

_TITLE = "Rollouts on vLLM, replayed"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px;
       padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td:nth-child(2) { text-align: left; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: 1em; overflow: auto; }
.spread { color: #777; }
"""
_COLORS = {"off": "#0072b2", "suffix": "#cc79a7", "dgds": "#d55e00"}
_COLUMNS = (  # heading, figure, digits
    ("tokens/s", "throughput_tok_s", 1),
    ("over the first arm", "over_base", 2),
    ("tail, s", "tail_s", 1),
    ("idle", "idle_fraction", 2),
    ("preemptions", "preemptions", 0),
    ("recomputed at chunks' starts", "recomputed_tokens", 0),
    ("moved", "migrations", 0),
    ("acceptance length", "acceptance_length", 2),
    ("drafted a token", "drafted_per_token", 2),
    ("mean length of the finished", "mean_finished_tokens", 0),
    ("simulated over measured time", "simulated_over_measured", 2),
)
_LOADS = (  # of an engine, in requests in its steps: label, at most, color
    ("nothing", 0, "#dddddd"),
    ("1-2 requests", 2, "#d55e00"),
    ("3-8", 8, "#e69f00"),
    ("9-16", 16, "#56b4e9"),
    ("more", math.inf, "#0072b2"),
)
_NOTES = """
<p>Every arm replays the same recorded rollout on the same engines: each request emits
the recorded tokens, and every token was checked. Throughput is output tokens over wall
time; the tail is the time from the completion of the 90th-percentile request to the
end. Figures are medians, with the 10th and 90th percentile over repetitions below;
ratios are of the same repetition. Arms with true lengths know what nobody knows in
training; the off-policy arm trains on texts that earlier weights began, and finishes
the short ones first. What engines compute again after a preemption is in the time, but
not in the column of recomputed tokens, which counts what a chunk did not find when it
started.</p>
"""


def write_page(
    path: Path, arms: Sequence[Arm], runs: Sequence[Run], result: Mapping[str, Any]
) -> None:
    """Write the page; its folder is made if need be.

    Args:
        result: the benchmark's line of JSON.
    """
    typical = {arm.name: _median_run(runs, arm.name) for arm in arms}
    settings = result["settings"]
    parts = [
        "<!doctype html><meta charset='utf-8'>",
        f"<title>{_TITLE}</title><style>{_STYLE}</style><h1>{_TITLE}</h1>",
        f"<p>{settings['num_requests']} requests, {settings['num_tokens']:,} tokens of "
        f"{html.escape(settings['model'])}, {settings['engines']} engines with "
        f"{settings['num_kv_blocks']} KV blocks each ({settings['kv']}), "
        f"{settings['repetitions']} repetitions, on "
        f"{html.escape(result['device']['cpu'])}, "
        f"{result['device']['cores']} cores.</p>",
        _table(result["arms"]),
        _NOTES,
        _image(_bars(arms, result["arms"])),
        "<h2>Responses finished over time</h2>",
        "<p>Each arm's run of median throughput; the tail is above the line.</p>",
        _image(_completions(arms, typical)),
        "<h2>Where the time went</h2>",
        "<p>The engines' time by how many requests their steps served: they share what "
        "a step costs beyond its tokens.</p>",
        _image(_loads(arms, typical)),
        "<h2>Running requests and KV in use, by instance</h2>",
        _image(_timelines(arms, typical)),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(_facts(result))}</pre>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", "utf-8")


def _median_run(runs: Sequence[Run], name: str) -> Run:
    own = [run for run in runs if run.arm == name]
    rate = statistics.median_low([run.figures["throughput_tok_s"] for run in own])
    return next(run for run in own if run.figures["throughput_tok_s"] == rate)


def _table(arms: Mapping[str, Any]) -> str:
    headings = "".join(f"<th>{heading}</th>" for heading, _, _ in _COLUMNS)
    rows = []
    for name, figures in arms.items():
        cells = "".join(
            f"<td>{_number(figures.get(key), digits)}</td>"
            for _, key, digits in _COLUMNS
        )
        what = html.escape(figures["what"])
        rows.append(f"<tr><td><b>{name}</b></td><td>{what}</td>{cells}</tr>")
    return f"<table><tr><th>arm</th><th></th>{headings}</tr>{''.join(rows)}</table>"


def _number(figure: Mapping[str, float] | None, digits: int) -> str:
    if figure is None:
        return ""
    middle, low, high = (f"{figure[k]:,.{digits}f}" for k in ("median", "p10", "p90"))
    return f"{middle}<br><span class='spread'>{low} – {high}</span>"  # noqa: RUF001


def _bars(arms: Sequence[Arm], figures: Mapping[str, Any]) -> Figure:
    """Throughput, tail and acceptance, a bar an arm, with the spread."""
    drawn = Figure(figsize=(11, 0.9 + 0.34 * len(arms)), layout="constrained")
    panels = drawn.subplots(1, 3, sharey=True)
    titles = (
        ("throughput_tok_s", "tokens/s"),
        ("tail_s", "tail, s"),
        ("acceptance_length", "acceptance length"),
    )
    names = [arm.name for arm in arms]
    colors = [_COLORS[arm.drafting] for arm in arms]
    for axes, (key, title) in zip(panels, titles, strict=True):
        own = [figures[name][key] for name in names]
        middle = [f["median"] for f in own]
        spread = [
            [m - f["p10"] for m, f in zip(middle, own, strict=True)],
            [f["p90"] - m for m, f in zip(middle, own, strict=True)],
        ]
        axes.barh(names, middle, color=colors, xerr=spread, ecolor="0.3", alpha=0.85)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return drawn


def _completions(arms: Sequence[Arm], typical: Mapping[str, Run]) -> Figure:
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    axes = drawn.subplots()
    for number, arm in enumerate(arms):
        times = sorted(c.t_s for c in typical[arm.name].report.completions)
        shares = [100 * (i + 1) / len(times) for i in range(len(times))]
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(times, shares, style, color=f"C{number % 10}", label=arm.name)
    axes.axhline(100 * (1 - TAIL_FRACTION), color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="seconds", ylabel="responses finished, %", ylim=(0, 101))
    axes.legend(fontsize=8, ncols=2)
    return drawn


def _loads(arms: Sequence[Arm], typical: Mapping[str, Run]) -> Figure:
    """A bar an arm: seconds of all engines by the number of requests in a step."""
    drawn = Figure(figsize=(11, 1.1 + 0.3 * len(arms)), layout="constrained")
    axes = drawn.subplots()
    names = [arm.name for arm in arms]
    spent = [load_times(typical[name].report) for name in names]
    left = [0.0] * len(names)
    for i, (label, _, color) in enumerate(_LOADS):
        widths = [times[i] for times in spent]
        axes.barh(names, widths, left=left, color=color, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds, all engines together")
    axes.legend(
        fontsize=8, ncols=len(_LOADS), loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def load_times(report: RolloutReport) -> list[float]:
    """Seconds of all instances in each of the `_LOADS`."""
    times = [0.0] * len(_LOADS)
    for instance in report.instances:
        own = [s for s in report.timeline if s.instance_id == instance.instance_id]
        ends = [*(s.t_s for s in own), report.wall_s]
        times[0] += ends[0]
        for sample, end in zip(own, ends[1:], strict=True):
            load = sample.num_running - sample.num_waiting
            place = next(i for i, (_, most, _) in enumerate(_LOADS) if load <= most)
            times[place] += max(0.0, min(end, report.wall_s) - sample.t_s)
    return times


def _timelines(arms: Sequence[Arm], typical: Mapping[str, Run]) -> Figure:
    """A row an arm, all on one time axis: requests in the engines left, KV right."""
    drawn = Figure(figsize=(11, 1.5 * len(arms) + 0.6), layout="constrained")
    rows = drawn.subplots(len(arms), 2, sharex=True, squeeze=False)
    for (running, kv), arm in zip(rows, arms, strict=True):
        report = typical[arm.name].report
        for track in tracks_of(report.timeline, end_s=report.wall_s):
            color = f"C{track.instance_id % 10}"
            samples = [s for s in report.timeline if s.instance_id == track.instance_id]
            t_s = [s.t_s for s in samples]
            in_step = [s.num_running - s.num_waiting for s in samples]
            running.step(t_s, in_step, where="post", color=color, linewidth=1)
            kv.plot(track.t_s, track.kv_used, color=color, linewidth=1)
        running.set_ylabel(arm.name, rotation=0, ha="right", va="center", fontsize=9)
        running.set_ylim(bottom=0)
        kv.set_ylim(0, 101)
    rows[0][0].set_title("requests that run", fontsize=10)
    rows[0][1].set_title("KV blocks in use, %", fontsize=10)
    for axes in rows[-1]:
        axes.set_xlabel("seconds")
    return drawn


def _image(drawn: Figure) -> str:
    data = io.BytesIO()
    drawn.savefig(data, format="png", dpi=110)
    text = base64.b64encode(data.getvalue()).decode()
    return f"<p><img alt='' src='data:image/png;base64,{text}'></p>"


def _facts(result: Mapping[str, Any]) -> str:
    names = ("settings", "device", "python", "commit")
    return json.dumps({name: result[name] for name in names}, indent=1)
