"""`aseer replay-log`: make a rollout's decisions again from the log of its calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aseer.errors import ConfigError
from aseer.runtime.calls import replay

if TYPE_CHECKING:
    import argparse


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `replay-log` and its argument."""
    parser = subparsers.add_parser(
        "replay-log",
        parents=[common],
        help="make a rollout's decisions again from a log of its calls",
        description=(
            "Make the calls of a log again and compare what they cause; the exit code "
            "is 1 if a decision is another one."
        ),
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a rollout's log")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay a file and say what came of it.

    Raises:
        ConfigError: it cannot be read, or is not a log of calls.
    """
    path: Path = args.file
    try:
        with path.open("rb") as log:
            done = replay(log)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if done.difference:
        print(f"another decision at {done.difference}")
        return 1
    print(f"{done.num_calls:,} calls caused the same {done.num_commands:,} commands")
    if done.is_cut:
        print("the log ends within a call: whoever wrote it died")
    return 0
