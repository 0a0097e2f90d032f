"""The live display: what it shows, in both forms, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import io
import threading

import pytest
from rich.console import Console

from aseer.display import KvBar, Live, Rates, duration, plain_line, view
from aseer.report import KvReport, Progress, TimelineSample


def sample(instance_id: int, *, num_output_tokens: int = 0) -> TimelineSample:
    return TimelineSample(
        t_s=1.0,
        instance_id=instance_id,
        num_running=16,
        num_waiting=2,
        kv_used=0.25,
        kv_reserved=0.5,
        num_output_tokens=num_output_tokens,
    )


def progress(
    t_s: float = 21.0,
    *,
    num_finished: int = 41,
    num_output_tokens: int = 12_600,
    eta_s: float | None = 14.0,
    intake_open: bool = False,
    instances: list[TimelineSample] | None = None,
) -> Progress:
    return Progress(
        t_s=t_s,
        num_groups=8,
        num_groups_finished=3,
        num_requests=64,
        num_finished=num_finished,
        num_waiting=5,
        num_output_tokens=num_output_tokens,
        throughput_tok_s=598.0,
        longest_running=("why-sky-blue/5", 412),
        eta_s=eta_s,
        intake_open=intake_open,
        instances=[sample(0), sample(1)] if instances is None else instances,
    )


class FakeRollout:
    """Gives the snapshots in turn, and then the last one for ever."""

    def __init__(self, *snapshots: Progress | None) -> None:
        self._snapshots = list(snapshots)
        self.asked = threading.Event()

    def progress(self) -> Progress | None:
        self.asked.set()
        if len(self._snapshots) > 1:
            return self._snapshots.pop(0)
        return self._snapshots[0]


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    made = Console(
        file=written, force_terminal=terminal, width=100, height=30, color_system=None
    )
    return made, written


def shown(rates: Rates, snapshot: Progress, *, max_instances: int = 16) -> str:
    made, written = console(terminal=False)
    made.print(view(snapshot, rates, max_instances=max_instances))
    return written.getvalue()


def test_the_picture_has_every_figure() -> None:
    rates = Rates()
    rates.add(progress(19.0, num_output_tokens=11_400))
    rates.add(progress(21.0, num_output_tokens=12_600))
    text = shown(rates, progress())
    assert "41/64" in text
    assert "3/8" in text
    assert "12,600" in text
    assert "600 tok/s now, 598 tok/s on average" in text
    # Two of the sixteen placed on each instance are queued there.
    assert "28 running, 4 queued, 5 waiting" in text
    assert "longest: 412 tokens, why-sky-blue/5" in text
    assert "0:21 elapsed, ETA 0:14" in text
    assert "25% /  50%" in text


def test_requests_still_to_come_are_marked() -> None:
    assert "41/64+" in shown(Rates(), progress(intake_open=True))
    assert "41/64+" in plain_line(progress(intake_open=True), Rates())


def test_no_eta_once_everything_is_finished() -> None:
    over = progress(num_finished=64, eta_s=0.0)
    assert "ETA" not in shown(Rates(), over)
    assert "ETA" not in plain_line(over, Rates())


def test_at_the_end_the_rate_is_the_average() -> None:
    over = progress(num_finished=64)
    assert "598 tok/s" in plain_line(over, Rates())
    assert "tok/s now" not in shown(Rates(), over)


def test_an_unknown_eta_is_a_dash() -> None:
    assert "ETA -" in shown(Rates(), progress(eta_s=None))


def test_a_rollout_without_requests_yet_is_at_its_beginning() -> None:
    empty = Progress(
        t_s=0.0,
        num_groups=0,
        num_groups_finished=0,
        num_requests=0,
        num_finished=0,
        num_waiting=0,
        num_output_tokens=0,
        throughput_tok_s=0.0,
        longest_running=None,
        eta_s=None,
        intake_open=True,
        instances=[],
    )
    assert "0/0+" in shown(Rates(), empty)
    assert plain_line(empty, Rates()).startswith("0:00  requests 0/0+")


def test_instances_that_do_not_fit_are_one_row() -> None:
    many = progress(instances=[sample(i) for i in range(40)])
    lines = shown(Rates(), many, max_instances=4).splitlines()
    rows = lines[lines.index("") + 2 :]
    assert len(rows) == 4
    assert rows[-1].split()[:5] == ["+", "37", "more", str(37 * 14), str(37 * 2)]


def test_the_plain_line_is_one_line() -> None:
    line = plain_line(progress(), Rates())
    assert line == (
        "0:21  requests 41/64, groups 3/8, 28 running, 4 queued, 5 waiting, "
        "12,600 tokens, 0 tok/s, longest 412, ETA 0:14"
    )


def test_rates_are_of_the_window_only() -> None:
    rates = Rates(window_s=5.0)
    for second in range(11):
        tokens = 100 * second if second <= 5 else 500 + 10 * (second - 5)
        own = [sample(3, num_output_tokens=tokens)]
        rates.add(progress(second, num_output_tokens=tokens, instances=own))
    assert rates.total() == pytest.approx(10.0)
    assert rates.of(3) == pytest.approx(10.0)
    assert rates.of(4) == 0.0


def test_a_rate_needs_two_moments() -> None:
    rates = Rates()
    assert rates.total() == 0.0
    rates.add(progress(1.0))
    rates.add(progress(1.0))
    assert rates.total() == 0.0


def test_an_instance_that_starts_over_has_no_negative_rate() -> None:
    rates = Rates()
    for t_s, tokens in ((0.0, 1000), (1.0, 1100), (2.0, 0), (3.0, 50)):
        rates.add(progress(t_s, instances=[sample(0, num_output_tokens=tokens)]))
    assert rates.of(0) == pytest.approx(150 / 3)


@pytest.mark.parametrize(
    ("used", "reserved", "cells"),
    [
        (0.0, 0.0, (0, 0, 10)),
        (0.25, 0.5, (2, 3, 5)),
        (0.001, 0.001, (1, 0, 9)),
        (1.0, 1.0, (10, 0, 0)),
        (0.6, 0.3, (6, 0, 4)),
        (1.7, -1.0, (10, 0, 0)),
    ],
)
def test_the_bar_has_its_width_whatever_the_shares(
    used: float, reserved: float, cells: tuple[int, int, int]
) -> None:
    assert KvBar(used, reserved, width=10).cells() == cells


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3723.0, "1:02:03"), (-1.0, "0:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_the_end_is_a_plain_line() -> None:
    made, written = console(terminal=False)
    with Live(FakeRollout(progress()), console=made, plain_interval_s=60.0):
        pass
    assert written.getvalue() == plain_line(progress(), Rates()) + "\n"


def test_on_a_terminal_the_last_state_stays() -> None:
    made, written = console(terminal=True)
    rollout = FakeRollout(None, progress(2.0))
    with Live(rollout, console=made, interval_s=60.0):
        assert rollout.asked.wait(10.0)
    assert "41/64" in written.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_no_thread_is_left(terminal: bool) -> None:
    made, _ = console(terminal=terminal)
    before = threading.active_count()
    with Live(FakeRollout(None), console=made):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_thread_that_cannot_start_gives_the_screen_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made, written = console(terminal=True)
    live = Live(FakeRollout(progress()), console=made)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            live.__enter__()
    hidden, shown_again = "\x1b[?25l", "\x1b[?25h"
    assert written.getvalue().count(hidden) == written.getvalue().count(shown_again)
    with live:  # and another try is one
        pass
    assert "41/64" in written.getvalue()


def test_the_programs_exception_passes() -> None:
    class Broken(FakeRollout):
        def progress(self) -> Progress:
            raise AssertionError("must not be asked after the failure")

    made, _ = console(terminal=False)
    with (
        pytest.raises(KeyError, match="the program's"),
        Live(Broken(None), console=made, plain_interval_s=60.0),
    ):
        raise KeyError("the program's")


def test_a_quiet_console_shows_nothing_and_needs_no_thread() -> None:
    written = io.StringIO()
    before = threading.active_count()
    quiet = Console(file=written, quiet=True, force_terminal=True)
    with Live(FakeRollout(progress()), console=quiet):
        assert threading.active_count() == before
    assert written.getvalue() == ""


def test_an_interval_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="interval_s=0"):
        Live(FakeRollout(None), interval_s=0)
    with pytest.raises(ValueError, match="plain_interval_s=-1"):
        Live(FakeRollout(None), plain_interval_s=-1)


def test_the_kv_pool_is_shown_where_there_is_one():
    kv = KvReport(
        stored_bytes=9,
        loaded_bytes=9,
        evicted_bytes=0,
        freed_bytes=0,
        disk_written_bytes=0,
        disk_read_bytes=0,
        prefetched_bytes=0,
        pulled_bytes=0,
        resident_bytes=25,
        disk_resident_bytes=0,
        capacity_bytes=100,
        num_loads=1_200,
        num_loaded_tokens=98_765,
        num_moves_found=1_200,
        num_moves_recomputed=7,
        load_p50_s=0.045,
        load_p90_s=0.1,
        load_p99_s=0.2,
        time_share=0.01,
        num_failures=0,
        num_restarts=0,
    )
    snapshot = dataclasses.replace(progress(), kv=kv)
    assert "98,765 from the KV pool" in plain_line(snapshot, Rates())
    console = Console(file=io.StringIO(), width=160)
    console.print(view(snapshot, Rates()))
    text = console.file.getvalue()
    assert "98,765 tokens loaded in 1,200 loads, p50 45 ms, 7 recomputed" in text
    assert "25%" in text
    console.print(view(progress(), Rates()))
    assert console.file.getvalue().count("KV pool") == 1
