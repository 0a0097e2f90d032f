"""Files of this process that a process forked from it must not keep open.

A fork has all of its parent's open files. One that lives on after its parent, such as a
data loader's worker, would keep a pipe from ending and a lock from being free.
"""

from __future__ import annotations

import os

_kept: set[tuple[int, int, int]] = set()  # descriptor, and what it stands for


def keep_from_forks(fd: int) -> tuple[int, int, int]:
    """Have forks let go of an open file from now on.

    Returns:
        What `forget` takes once it is closed.
    """
    entry = _entry(fd)
    _kept.add(entry)
    return entry


def forget(entry: tuple[int, int, int]) -> None:
    """A file is closed. May be called again."""
    _kept.discard(entry)


def _entry(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return fd, status.st_dev, status.st_ino


def _let_go() -> None:
    """In a fork: put the null device in the place of each file.

    Not just closed: objects that the fork inherited close the same descriptor later,
    when it may be another file's.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for entry in _kept:
        fd = entry[0]
        try:
            is_open = _entry(fd) == entry
        except OSError:
            is_open = False
        if is_open:
            os.dup2(null, fd, inheritable=False)
    os.close(null)
    _kept.clear()


os.register_at_fork(after_in_child=_let_go)
