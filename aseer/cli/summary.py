"""What the demo prints: the stages as they pass, finished groups, and the summary."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from aseer.data import check_answer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from aseer.data import PromptRecord
    from aseer.report import KvReport, RolloutReport
    from aseer.types import Response

_SAMPLE_WIDTH = 240
_QUESTION_WIDTH = 120


class Stages:
    """Says which stage begins and how long it took, and keeps the times."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        """Time the block; a stage that fails has no time."""
        self._console.print(Text.assemble(("==> ", "bold blue"), (text, "bold")))
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self._console.print(f"    {self.seconds[name]:.1f} s", style="dim")


def is_right(response: Response) -> bool | None:
    """Whether the response has its prompt's answer; None if there is none to check."""
    record: PromptRecord = response.metadata
    return None if record.answer is None else check_answer(record, response.text)


def share_right(responses: Sequence[Response]) -> str:
    """How many answers are right, such as "3/8 right"; empty if none can be checked."""
    verdicts = [v for r in responses if (v := is_right(r)) is not None]
    return f"{sum(verdicts)}/{len(verdicts)} right" if verdicts else ""


def print_group(console: Console, responses: Sequence[Response]) -> None:
    """A finished group in three lines: the prompt, one of the responses, the score."""
    # The first by index, not the first to finish, which would favour short ones.
    sample = min(responses, key=lambda r: r.index)
    record: PromptRecord = sample.metadata
    head = Text.assemble((f"{record.id}  ", "bold"), _question(record))
    body = Text(f"  {_shorten(sample.text, _SAMPLE_WIDTH) or '(no text)'}", "cyan")
    foot = Text("  ")
    right = is_right(sample)
    if right is not None:
        foot.append("right" if right else "wrong", "green" if right else "red")
        foot.append(f" (answer: {record.answer}), ")
    foot.append(f"{len(sample.token_ids)} tokens, {sample.finish_reason}")
    if share := share_right(responses):
        foot.append("; the group: ").append(share, "bold")
    console.print(head, body, foot, sep="\n")


def print_summary(
    console: Console,
    report: RolloutReport,
    responses: Sequence[Response],
    stages_s: dict[str, float],
) -> None:
    """The rollout's figures, what each idea did, each instance's, the stages' times."""
    console.print()
    table = Table(title="rollout", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, value, note in _figures(report, responses):
        table.add_row(name, value, note)
    console.print(table)
    console.print()
    console.print(_ideas(report))
    console.print()
    console.print(_instances(report))
    console.print()
    console.print(_stage_times(stages_s))
    console.print()


def _figures(
    report: RolloutReport, responses: Sequence[Response]
) -> Iterator[tuple[str, str, str]]:
    r = report
    reasons = ", ".join(f"{name} {n}" for name, n in r.finish_reasons.items() if n)
    yield "responses", f"{r.num_responses:,}", f"{r.num_groups} groups; {reasons}"
    if share := share_right(responses):
        yield "answers", share, "of the responses"
    lengths = f"mean {r.mean_output_tokens:,.0f}, longest {r.max_output_tokens:,}"
    yield "output tokens", f"{r.num_output_tokens:,}", lengths
    yield "throughput", f"{r.throughput_tok_s:,.0f} tok/s", f"over {r.wall_s:.1f} s"
    cached = f"{r.num_cached_tokens:,} found in a cache"
    yield "recomputed tokens", f"{r.num_recomputed_tokens:,}", cached
    if r.kv is not None:
        yield from _kv_figures(r.kv)
    yield "preemptions", f"{r.num_preemptions:,}", ""
    if r.num_retries:
        yield "retries", f"{r.num_retries:,}", "chunks lost with their instance"


def _ideas(report: RolloutReport) -> Table:
    """What divided rollout, scheduling and drafts did in this rollout, as measured."""
    r = report
    table = Table(title="what each idea did", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    size = f"at most {r.chunk_size} tokens each" if r.chunk_size else "undivided"
    table.add_row("divided rollout", f"{r.num_chunks:,} chunks", size)
    table.add_row("", f"{r.num_migrations:,} moves", _what_moves_cost(r))
    share = f", {r.tail_s / r.wall_s:.0%} of the time" if r.wall_s else ""
    tail = f"for the last tenth of the responses{share}"
    table.add_row(f"scheduling ({r.policy})", f"tail {r.tail_s:.1f} s", tail)
    drafts = r.speculation
    if drafts is None:
        table.add_row("grouped drafts", "off", "no engine drafts")
        return table
    accepted, drafted = sum(drafts.accepted), sum(drafts.drafted)
    table.add_row(
        "grouped drafts",
        f"{accepted:,} tokens accepted",
        f"of {drafted:,} drafted, in {drafts.num_drafts:,} drafts",
    )
    # Each of a request's tokens takes a step of the engine, but for those.
    share = f"{accepted / max(1, r.num_output_tokens):.0%} of all tokens"
    table.add_row(
        "",
        f"{accepted:,} steps saved",
        f"{share}; drafting took {drafts.drafting_share:.1%} of the steps' time",
    )
    return table


def _what_moves_cost(report: RolloutReport) -> str:
    kv = report.kv
    if not report.num_migrations:
        return "no chunk began on another engine"
    where = "to another engine"
    if report.num_node_migrations:
        where += f" ({report.num_node_migrations:,} on another host)"
    if kv is None:
        return f"{where}, which computed the KV anew: there is no KV pool"
    found, recomputed = kv.num_moves_found, kv.num_moves_recomputed
    return f"{where}: {found:,} found their KV there, {recomputed:,} did not"


def _kv_figures(kv: KvReport) -> Iterator[tuple[str, str, str]]:
    loaded = f"{kv.num_loaded_tokens:,} tokens"
    yield "KV pool: loaded", loaded, "whose KV chunks found there"
    stored, freed = _megabytes(kv.stored_bytes), _megabytes(kv.freed_bytes)
    evicted = f"{_megabytes(kv.evicted_bytes)} evicted"
    yield "KV pool: stored", stored, f"{freed} freed, {evicted}"
    if kv.pulled_bytes:
        yield "KV pool: pulled", _megabytes(kv.pulled_bytes), "from other nodes"
    if kv.disk_written_bytes or kv.disk_read_bytes:
        read = f"{_megabytes(kv.disk_read_bytes)} read back"
        if kv.prefetched_bytes:
            read += f" ({_megabytes(kv.prefetched_bytes)} ahead of time)"
        yield "KV pool: to disk", _megabytes(kv.disk_written_bytes), read
    if kv.num_loads:
        slowest = (
            f"p90 {kv.load_p90_s * 1e3:,.0f} ms, p99 {kv.load_p99_s * 1e3:,.0f} ms"
        )
        share = f"{slowest}; {kv.time_share:.1%} of engine time"
        yield "KV pool: load time", f"{kv.load_p50_s * 1e3:,.0f} ms", share
    if kv.num_failures or kv.num_restarts:
        restarts = f"{kv.num_restarts} server restarts"
        yield "KV pool: failures", f"{kv.num_failures:,}", restarts


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def _instances(report: RolloutReport) -> Table:
    table = Table(title="instances", title_justify="left")
    for name in ("instance", "tokens", "chunks", "busy", "KV tokens"):
        table.add_column(name, justify="right")
    for i in report.instances:
        busy = f"{i.busy_s / report.wall_s:.0%}" if report.wall_s else "-"
        capacity = f"{i.kv_tokens:,}"
        row = (str(i.instance_id), f"{i.num_output_tokens:,}", f"{i.num_chunks:,}")
        table.add_row(*row, busy, capacity)
    return table


def _stage_times(stages_s: dict[str, float]) -> Table:
    table = Table(title="seconds by stage", title_justify="left")
    for name in (*stages_s, "total"):
        table.add_column(name.replace("_", " "), justify="right")
    seconds = (*stages_s.values(), sum(stages_s.values()))
    table.add_row(*(f"{each:.1f}" for each in seconds))
    return table


def _question(record: PromptRecord) -> str:
    text = record.messages[-1]["content"] if record.messages else record.prompt
    if text is None:
        return f"{len(record.prompt_token_ids or ())} token ids"
    return _shorten(text, _QUESTION_WIDTH)


def _shorten(text: str, width: int) -> str:
    """The text on one line, cut if it is longer than `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 2]} …"
