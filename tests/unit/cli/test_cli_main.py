"""The command line: what it parses, and how each way of ending maps to a code."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

import aseer
from aseer.cli import demo, doctor
from aseer.cli.main import build_parser, main
from aseer.errors import AseerError, InstanceStartError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator


def command_that(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[argparse.Namespace], int]
) -> None:
    """Let `aseer doctor` do this instead."""
    monkeypatch.setattr(doctor, "run", run)


def test_the_version_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"aseer {aseer.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-command"],
        ["demo", "--n", "0"],
        ["demo", "--max-tokens", "many"],
        ["demo", "--policy", "random"],
    ],
)
def test_a_wrong_command_line_ends_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["doctor", "--help"]])
def test_help_is_there(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    assert "usage: aseer" in capsys.readouterr().out


def test_the_subcommands_result_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command_that(monkeypatch, lambda _: 7)
    assert main(["doctor"]) == 7


def test_an_error_is_one_message_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise InstanceStartError("no such model: 'x'")

    command_that(monkeypatch, run)
    assert main(["doctor"]) == 1
    assert capsys.readouterr() == ("", "aseer: error: no such model: 'x'\n")


def test_debug_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise AseerError("why")

    command_that(monkeypatch, run)
    with pytest.raises(AseerError, match="why"):
        main(["doctor", "--debug"])


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    command_that(monkeypatch, run)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """As in a terminal; a shell has what it starts in the background ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_in_order_with_its_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    closed = []

    def run(_: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            closed.append(True)
        raise AssertionError("not reached")

    command_that(monkeypatch, run)
    assert main(["doctor"]) == code
    assert closed
    assert capsys.readouterr().err == f"aseer: {word}\n"


def test_sigterm_ends_it_where_ctrl_c_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(_: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        raise AssertionError("not reached")

    command_that(monkeypatch, run)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["doctor"]) == 143
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handler_of_sigterm_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    command_that(monkeypatch, lambda _: 0)
    before = signal.getsignal(signal.SIGTERM)
    main(["doctor"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_demos_defaults_are_64_requests_in_chunks() -> None:
    args = build_parser().parse_args(["demo"])
    groups = demo.make_groups(args)
    assert [group.n for group in groups] == [8] * 8
    assert (args.chunk_size, args.max_num_seqs, args.max_tokens) == (64, 16, 512)
    assert args.model is None
