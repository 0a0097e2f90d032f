"""Files that one weight update after another is written into, mapped once.

Most of what it takes to write a file in /dev/shm is the system's: to give the file its
pages, and to find each again. A file that an earlier update wrote has its pages
already, and while it stays mapped nobody looks for them: writing it is a plain copy in
memory. Two such files take turns: engines have one, the next update is written into the
other.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Gets all pages, or fails where a write into the mapping would end the process
# (Linux 5.14). Python has no name for it.
_MADV_POPULATE_WRITE = 23


class Mappings:
    """Mappings of the files that updates are written into, kept for the next ones.

    A mapping keeps the memory of a file that was removed: `take_but` finds those.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], mmap.mmap] = {}
        _all.add(self)

    def of(self, descriptor: int) -> Any:
        """All bytes that a file has, as a writable array (uint8) that is the file.

        Empty where the file cannot be mapped: it is to be written as files are.
        """
        import numpy as np

        found = os.fstat(descriptor)
        key = (found.st_dev, found.st_ino)
        kept = self._of.get(key)
        if kept is None or len(kept) < found.st_size:
            try:
                kept = mmap.mmap(descriptor, found.st_size)
                kept.madvise(_MADV_POPULATE_WRITE)
            except (OSError, ValueError):  # an old kernel; no memory; an empty file
                return np.empty(0, np.uint8)
            self._of[key] = kept
        return np.frombuffer(kept, np.uint8, found.st_size)

    def take_but(self, paths: Iterable[Path]) -> list[mmap.mmap]:
        """Take away all but those of these files, for `unmap`."""
        wanted = set()
        for path in paths:
            try:
                found = path.stat()
            except OSError:  # it is gone, or was never there
                continue
            wanted.add((found.st_dev, found.st_ino))
        return [self._of.pop(key) for key in list(self._of) if key not in wanted]


def unmap(mapped: list[mmap.mmap]) -> None:
    """Give memory back, which takes a while if it is much.

    A writer that is at work keeps what it writes into until it is done.
    """
    while mapped:
        with suppress(BufferError):
            mapped.pop().close()


def _let_go() -> None:
    """In a fork, which would keep the memory for as long as it lives."""
    for each in _all:
        each._of.clear()


_all: WeakSet[Mappings] = WeakSet()
os.register_at_fork(after_in_child=_let_go)
