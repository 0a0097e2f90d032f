"""`aseer key`: makes the secret that a cluster's hosts share, once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.transport.keys import default_path, find_keys, make_key_file

if TYPE_CHECKING:
    import argparse


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add the `key` command."""
    parser = subparsers.add_parser(
        "key",
        parents=[common],
        help="make the key that the hosts of a cluster share",
        description="Make a key file that only you can read, unless it is there, and "
        "print its path. Every host of a cluster needs the same: copy the file, or use "
        "a home directory that the hosts share.",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, help="default: ~/.config/aseer/key"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the file, or check the one that is there."""
    path = args.file or default_path()
    if path.exists():
        find_keys(str(path))
    else:
        make_key_file(path)
    sys.stdout.write(f"{path}\n")
    return 0
