"""The command line: parses, runs one subcommand, and maps its end to an exit code.

0 done; 1 an error, told in one message on stderr; 2 a wrong command line; 130 Ctrl-C
and 143 SIGTERM, both after an orderly close. Engines are stopped on every way out.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aseer.cli import (
    demo,
    doctor,
    key,
    node,
    record,
    replay_log,
    serve,
    simulate,
    status,
)
from aseer.errors import AseerError
from aseer.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

EXIT_ERROR = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: the arguments without the program's name; None = the process's.
    """
    args = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    with _sigterm_as_interrupt() as was_terminated:
        try:
            return command(args)
        except KeyboardInterrupt:
            if was_terminated():
                return _fail("terminated", EXIT_TERMINATED)
            return _fail("interrupted", EXIT_INTERRUPTED)
        except AseerError as exc:
            if args.debug:
                raise
            return _fail(f"error: {exc}", EXIT_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `args.run` is the chosen subcommand."""
    parser = argparse.ArgumentParser(
        prog="aseer",
        description="RL rollouts on vLLM: try them, check the installation, simulate.",
    )
    parser.add_argument("--version", action="version", version=f"aseer {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    demo.add_parser(subparsers, common)
    doctor.add_parser(subparsers, common)
    key.add_parser(subparsers, common)
    node.add_parser(subparsers, common)
    record.add_parser(subparsers, common)
    replay_log.add_parser(subparsers, common)
    serve.add_parser(subparsers, common)
    simulate.add_parser(subparsers, common)
    status.add_parser(subparsers, common)
    return parser


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"aseer: {message}\n")
    return code


@contextmanager
def _sigterm_as_interrupt() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM take the way of Ctrl-C, which asyncio turns into a cancellation.

    Gives a function that says whether it happened. Signals are the main thread's: in
    any other, SIGTERM keeps its meaning.
    """
    terminated = False

    def on_sigterm(_signum: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # A shell's background job ignores SIGINT.
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield lambda: terminated
    finally:
        signal.signal(signal.SIGTERM, before)
