"""Files that one weight update after another is written into, mapped once.

Most of what it takes to write a file in /dev/shm is the system's: to give the file its
pages, and to find each again. A file that an earlier update wrote has its pages
already, and while it stays mapped nobody looks for them: writing it is a plain copy in
memory. Two such files take turns: engines have one, the next update is written into the
other.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Gets all pages, or fails where a write into the mapping would end the process
# (Linux 5.14).
_MADV_POPULATE_WRITE = 23


class Mappings:
    """Mappings of the files that updates are written into, kept for the next ones.

    A mapping keeps the memory of a file that was removed: `taken_but` gives those back.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], Any] = {}
        _all.add(self)

    def of(self, descriptor: int) -> Any:
        """All bytes that a file has, as a writable array (uint8) that is the file.

        Empty where the file cannot be mapped: it is to be written as files are.
        """
        found = os.fstat(descriptor)
        key = (found.st_dev, found.st_ino)
        kept = self._of.get(key)
        if kept is None or len(kept) < found.st_size:
            kept = self._of[key] = _map(descriptor, found.st_size)
        return kept[: found.st_size]

    def taken_but(self, paths: Iterable[Path]) -> list[Any]:
        """Let go of all but these files; the caller drops what is returned.

        To give much memory back takes a while. A writer that is at work keeps what it
        writes into.
        """
        wanted = set()
        for path in paths:
            try:
                found = path.stat()
            except OSError:  # it is gone, or was never there
                continue
            wanted.add((found.st_dev, found.st_ino))
        return [self._of.pop(key) for key in list(self._of) if key not in wanted]


def _map(descriptor: int, size: int) -> Any:
    import numpy as np
    import torch

    if size:
        try:
            # Not mmap.mmap: that keeps the file open, also in forks.
            mapped = torch.from_file(
                f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8
            )
        except RuntimeError:  # no memory for it
            return np.empty(0, np.uint8)
        start, length = ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(size)
        if not ctypes.CDLL(None).madvise(start, length, _MADV_POPULATE_WRITE):
            return mapped.numpy()
    return np.empty(0, np.uint8)


def _let_go() -> None:
    """In a fork, which would keep the memory for as long as it lives."""
    for each in _all:
        each._of.clear()


_all: WeakSet[Mappings] = WeakSet()
os.register_at_fork(after_in_child=_let_go)
