"""A rollout while it runs, shown on the terminal.

    async with engine.rollout(groups) as rollout:
        with aseer.display.Live(rollout):
            async for response in rollout:
                ...

The display has a thread of its own that reads `rollout.progress()` a few times a
second, so it serves `async for`, `by_group()` and the synchronous form alike, keeps
moving while user code blocks, and never delays the engines. What the program prints
meanwhile appears above it. Where the output is no terminal, it is one plain line every
few seconds instead.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import ConsoleOptions, RenderableType, RenderResult

    from aseer.report import KvReport, Progress, TimelineSample

RATE_WINDOW_S = 5.0
_BAR_WIDTH = 28
_KV_BAR_WIDTH = 20
# Lines of the display that are not an instance's.
_OTHER_LINES = 10


class HasProgress(Protocol):
    """What is watched: an `aseer.Rollout` or an `aseer.SyncRollout`."""

    def progress(self) -> Progress | None:
        """A snapshot, None before the start; cheap, and safe in any thread."""
        ...


class Live:
    """Shows a rollout's progress as long as the `with` block runs."""

    def __init__(
        self,
        rollout: HasProgress,
        *,
        console: Console | None = None,
        interval_s: float = 0.25,
        plain_interval_s: float = 5.0,
    ) -> None:
        """Watch `rollout`; nothing is shown before the `with` block.

        Args:
            rollout: read with `progress()`, never changed.
            console: None = standard output.
            interval_s: between two updates on a terminal.
            plain_interval_s: between two lines where there is none.

        Raises:
            ValueError: an interval that is not above 0.
        """
        if not (interval_s > 0 and plain_interval_s > 0):
            raise ValueError(
                f"interval_s={interval_s!r} and plain_interval_s={plain_interval_s!r} "
                "must be above 0"
            )
        self._rollout = rollout
        self._console = console or Console()
        self._interval_s = interval_s
        self._plain_interval_s = plain_interval_s
        self._rates = Rates()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._screen: RichLive | None = None

    def __enter__(self) -> Self:
        if self._console.quiet:
            return self
        self._stop.clear()
        if self._console.is_terminal:
            self._screen = RichLive(console=self._console, auto_refresh=False)
            self._screen.start()
        thread = threading.Thread(target=self._watch, name="aseer-display", daemon=True)
        try:
            thread.start()
        except BaseException:  # where no thread can be had, the screen is given back
            self._close_screen()
            raise
        self._thread = thread
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._stop.set()
        try:
            self._thread.join()
            if exc is None:
                self._show()
        finally:
            self._close_screen()
            self._thread = None

    def _close_screen(self) -> None:
        screen, self._screen = self._screen, None
        if screen is not None:
            screen.stop()

    def _watch(self) -> None:
        on_screen = self._screen is not None
        interval_s = self._interval_s if on_screen else self._plain_interval_s
        while True:
            if on_screen:
                self._show()
            if self._stop.wait(interval_s):
                return
            if not on_screen:
                self._show()

    def _show(self) -> None:
        progress = self._rollout.progress()
        if progress is None:
            return
        self._rates.add(progress)
        if self._screen is None:
            # Past the program's own wrapping and markup: a line is a line.
            self._console.print(plain_line(progress, self._rates), soft_wrap=True)
            return
        max_instances = max(1, self._console.height - _OTHER_LINES)
        picture = view(progress, self._rates, max_instances=max_instances)
        self._screen.update(picture, refresh=True)


class Rates:
    """Tokens per second of the last few seconds, in all and per instance."""

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int, dict[int, int]]] = deque()

    def add(self, progress: Progress) -> None:
        """Take a snapshot; one that is not newer than the last replaces it."""
        seen = self._seen
        per_instance = {i.instance_id: i.num_output_tokens for i in progress.instances}
        if seen and progress.t_s <= seen[-1][0]:
            seen.pop()
        seen.append((progress.t_s, progress.num_output_tokens, per_instance))
        while len(seen) > 2 and seen[1][0] <= progress.t_s - self._window_s:
            seen.popleft()

    def total(self) -> float:
        """Tokens per second of all instances; 0 until two snapshots are known."""
        if len(self._seen) < 2:
            return 0.0
        (start_s, before, _), (end_s, now, _) = self._seen[0], self._seen[-1]
        return max(0, now - before) / (end_s - start_s)

    def of(self, instance_id: int) -> float:
        """Tokens per second of one instance."""
        known = [
            (t_s, tokens[instance_id])
            for t_s, _, tokens in self._seen
            if instance_id in tokens
        ]
        if len(known) < 2:
            return 0.0
        # A restarted instance may count from zero again.
        made = sum(max(0, b - a) for (_, a), (_, b) in pairwise(known))
        return made / (known[-1][0] - known[0][0])


class KvBar:
    """A bar of KV blocks: in use, reserved beyond that, free."""

    def __init__(
        self, used: float, reserved: float, width: int = _KV_BAR_WIDTH
    ) -> None:
        self.used = min(max(used, 0.0), 1.0)
        self.reserved = min(max(reserved, self.used), 1.0)
        self.width = width

    def cells(self) -> tuple[int, int, int]:
        """Widths of the parts: in use, reserved, free. What is not zero has a cell."""
        used = self._cells_of(self.used)
        reserved = max(used, self._cells_of(self.reserved))
        return used, reserved - used, self.width - reserved

    def _cells_of(self, share: float) -> int:
        return min(self.width, max(round(share * self.width), share > 0))

    def __rich_measure__(
        self, console: Console, options: ConsoleOptions
    ) -> Measurement:
        width = self.width + len(self._text())
        return Measurement(width, width)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        full, half, empty = "#=." if options.ascii_only else "█▒░"
        used, reserved, free = self.cells()
        bar = Text.assemble(
            (full * used, "cyan"), (half * reserved, "cyan"), (empty * free, "dim")
        )
        yield bar.append(self._text())

    def _text(self) -> str:
        return f" {self.used:4.0%} / {self.reserved:4.0%}"


def view(
    progress: Progress, rates: Rates, *, max_instances: int = 16
) -> RenderableType:
    """The picture of a rollout: bars, rates, and a line an instance."""
    table = _instances(progress, rates, max_instances)
    return Group(_overview(progress, rates), "", table)


def plain_line(progress: Progress, rates: Rates) -> str:
    """The same in one line, without instances; the rate is the average at the end."""
    p = progress
    rate = p.throughput_tok_s if _is_over(p) else rates.total()
    parts = [
        f"{duration(p.t_s)}  requests {p.num_finished}/{_total(p)}",
        f"groups {p.num_groups_finished}/{p.num_groups}",
        _states(p),
        f"{p.num_output_tokens:,} tokens",
        f"{rate:,.0f} tok/s",
    ]
    if p.longest_running is not None:
        parts.append(f"longest {p.longest_running[1]:,}")
    if p.kv is not None and p.kv.num_loads:
        parts.append(f"{p.kv.num_loaded_tokens:,} from the KV pool")
    if p.eta_s is not None and not _is_over(p):
        parts.append(f"ETA {duration(p.eta_s)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any: 1:02:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _total(progress: Progress) -> str:
    return f"{progress.num_requests}{'+' if progress.intake_open else ''}"


def _overview(p: Progress, rates: Rates) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(width=_BAR_WIDTH)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    requests = f"{p.num_finished}/{_total(p)}  {_states(p)}"
    grid.add_row("requests", _bar(p.num_finished, p.num_requests), requests)
    groups = f"{p.num_groups_finished}/{p.num_groups}"
    grid.add_row("groups", _bar(p.num_groups_finished, p.num_groups), groups)
    average = f"{p.throughput_tok_s:,.0f} tok/s on average"
    rate = average if _is_over(p) else f"{rates.total():,.0f} tok/s now, {average}"
    grid.add_row("tokens", f"{p.num_output_tokens:,}", rate)
    longest = ""
    if p.longest_running is not None:
        request_id, num_tokens = p.longest_running
        longest = f"longest: {num_tokens:,} tokens, {request_id}"
    grid.add_row("time", _times(p), longest)
    if p.kv is not None:
        used = p.kv.resident_bytes / max(1, p.kv.capacity_bytes)
        grid.add_row("KV pool", KvBar(used, used), _loads(p.kv))
    return grid


def _loads(kv: KvReport) -> str:
    """What engines found there, how fast, and what they did not."""
    moves = f"{kv.num_loaded_tokens:,} tokens loaded in {kv.num_loads:,} loads"
    rest = f"p50 {kv.load_p50_s * 1e3:,.0f} ms, {kv.num_moves_recomputed:,} recomputed"
    return f"{moves}, {rest}"


def _states(p: Progress) -> str:
    """Where the unfinished requests are: in engines, queued there, not placed yet."""
    queued = sum(i.num_waiting for i in p.instances)
    running = sum(i.num_running for i in p.instances) - queued
    return f"{running} running, {queued} queued, {p.num_waiting} waiting"


def _times(p: Progress) -> str:
    elapsed = f"{duration(p.t_s)} elapsed"
    if _is_over(p):
        return elapsed
    return f"{elapsed}, ETA {'-' if p.eta_s is None else duration(p.eta_s)}"


def _is_over(p: Progress) -> bool:
    return not p.intake_open and p.num_finished == p.num_requests


def _bar(done: int, total: int) -> ProgressBar:
    # Without requests rich would show a bar that is full.
    return ProgressBar(
        total=max(total, 1), completed=done, width=_BAR_WIDTH, complete_style="green"
    )


def _instances(p: Progress, rates: Rates, max_instances: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("instance", "running", "queued"):
        table.add_column(name, justify="right")
    table.add_column("KV in use / reserved")
    table.add_column("tok/s", justify="right")
    samples = sorted(p.instances, key=lambda i: i.instance_id)
    fits = len(samples) <= max_instances
    shown = samples if fits else samples[: max_instances - 1]
    for sample in shown:
        name = str(sample.instance_id)
        _add_row(table, name, [sample], rates)
    if not fits:
        rest = samples[len(shown) :]
        _add_row(table, f"+ {len(rest)} more", rest, rates)
    return table


def _add_row(
    table: Table, name: str, samples: list[TimelineSample], rates: Rates
) -> None:
    """Add these instances as one row: counts as sums, shares as means."""
    count = len(samples)
    queued = sum(i.num_waiting for i in samples)
    used = sum(i.kv_used for i in samples) / count
    reserved = sum(i.kv_reserved for i in samples) / count
    table.add_row(
        name,
        str(sum(i.num_running for i in samples) - queued),
        str(queued),
        KvBar(used, reserved),
        f"{sum(rates.of(i.instance_id) for i in samples):,.0f}",
    )
