"""What an engine leaves if all its processes are killed, and who removes it then.

An engine's run directory holds a list of everything of the engine's that outlives
processes: paths, one a line. Every process of the engine holds a shared lock on the
list for as long as it lives, so a list that can be locked alone belongs to nobody: what
is on it, and the directory, may go. The kernel lets go of a lock with the last process
that has it, whoever kills it.

    the engine closes             it removes all
    its controller dies           each of its processes removes all as it ends
    all are killed at once        the next engine that starts on this machine does, or
                                  a janitor, if one was started (`aseer.node.janitor`)
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import describe
from aseer.node.cleanup import remove_shared_memory
from aseer.node.forks import forget, keep_from_forks

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger("aseer")

PREFIX = "aseer-"  # of run directories
_LIST = "leftovers"


class _Leftover(msgspec.Struct, array_like=True):
    """A line: a path, and of a file that others could name alike, its inode."""

    path: str
    inode: int | None = None


class Leftovers:
    """The list of an engine that runs, held by this process until `remove`."""

    def __init__(self, run_dir: Path) -> None:
        """Begin a list that says nothing yet but that the directory is in use."""
        self.run_dir = run_dir
        self._known: set[Path] = set()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._file = os.fdopen(os.open(run_dir / _LIST, flags, 0o600), "r+b", 0)
        self._kept = keep_from_forks(self._file.fileno())
        # A sweep leaves alone what does not begin with the directory: a list that is
        # just being begun, or that could not be held.
        if _lock(self._file.fileno()):
            self.add(run_dir)

    def add(self, path: Path) -> None:
        """Remember a file or directory that is, or will be, this engine's alone."""
        if path not in self._known:
            self._known.add(path)
            self._add(_Leftover(str(path.absolute())))

    def add_shared_memory(self, paths: Iterable[Path]) -> None:
        """Remember files in shared memory; others may have such names later."""
        for path in set(paths) - self._known:
            self._known.add(path)
            with suppress(OSError):  # gone already
                self._add(_Leftover(str(path), path.stat().st_ino))

    def remove(self) -> None:
        """Remove all that is on the list, and the run directory; nothing holds it."""
        remove(self.run_dir)
        self._file.close()
        forget(self._kept)

    def _add(self, leftover: _Leftover) -> None:
        try:
            self._file.write(msgspec.json.encode(leftover) + b"\n")
        except OSError as error:  # a full disk is no reason for an engine to end
            _log.warning("%s may be left behind: %s", leftover.path, describe(error))


def hold(run_dir: Path) -> int:
    """Hold the list of another process's engine to this process's end.

    Returns:
        A file descriptor, to be left open.
    Raises:
        OSError: there is none any more.
    """
    held = os.open(run_dir / _LIST, os.O_RDONLY)
    _lock(held)
    return held


def remove(run_dir: Path, *, group: int | None = None) -> None:
    """Remove what an engine has left, as far as no process uses it, and its directory.

    Args:
        group: of processes whose use does not count, since they end, too.
    """
    try:
        found = _read(run_dir / _LIST)
    except OSError:  # somebody else removes it
        found = []
    in_memory = set()
    for leftover in found:
        path = Path(leftover.path)
        if leftover.inode is not None:
            with suppress(OSError):
                if path.stat().st_ino == leftover.inode:
                    in_memory.add(path)
        elif path.is_dir():
            if path != run_dir:
                shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    remove_shared_memory(in_memory, group=group)
    shutil.rmtree(run_dir, ignore_errors=True)


def sweep() -> list[Path]:
    """Remove what engines of this user left whose processes are all dead.

    Returns:
        Their run directories.
    """
    removed = []
    for folder in {Path(tempfile.gettempdir()), Path("/tmp")}:
        for run_dir in folder.glob(f"{PREFIX}*"):
            if sweep_one(run_dir):
                removed.append(run_dir)
    return removed


def sweep_one(run_dir: Path) -> bool:
    """Remove what an engine left, if all its processes are dead; whether it did."""
    with suppress(OSError):  # another user's, or gone meanwhile
        return _remove_if_dead(run_dir)
    return False


def _remove_if_dead(run_dir: Path) -> bool:
    status = run_dir.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    path = run_dir / _LIST
    with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _begins_with(run_dir):
            return False
        remove(run_dir)
        return True


def _begins_with(run_dir: Path) -> bool:
    return [left.path for left in _read(run_dir / _LIST)[:1]] == [str(run_dir)]


def _lock(fd: int) -> bool:
    """Take part in holding a list; whether the file system knows of locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except OSError:
        return False
    return True


def _read(path: Path) -> list[_Leftover]:
    """The lines of a list, less one that was not written to its end."""
    found = []
    for line in path.read_bytes().splitlines():
        with suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=_Leftover))
    return found
