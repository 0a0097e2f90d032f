"""What processes have, over hours, and whether it grows."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

if TYPE_CHECKING:
    from pathlib import Path


class Bound(NamedTuple):
    """By how much something may grow within the second half of the time.

    Attributes:
        share: of what it is in the median. least: that it may grow in any case.
    """

    share: float
    least: float


#: Caches and an allocator's spare memory fill up early; what is lost with each request
#: or connection goes on growing: a hundred bytes of each response were 5% within the
#: half of an hour.
BOUNDS = {
    "rss_bytes": Bound(0.05, 4 << 20),
    "objects": Bound(0.02, 1000),
    "descriptors": Bound(0.0, 2),
    "threads": Bound(0.0, 2),
    "shm_bytes": Bound(0.05, 1 << 20),
    "shm_files": Bound(0.0, 2),
}


class Watch:
    """Of one process and its host's shared memory; it must live."""

    def __init__(self, pid: int, counts: Path, shared: Path) -> None:
        """See nothing yet.

        Args:
            counts: a file that says how many objects it has.
            shared: its host's /dev/shm.
        """
        self._process = psutil.Process(pid)
        self._counts = counts
        self._shared = shared
        self._began_s = time.monotonic()
        self._seen: dict[str, list[tuple[float, float]]] = {}

    def look(self) -> None:
        """Take a sample."""
        found: dict[str, float] = {
            "rss_bytes": self._process.memory_info().rss,
            "descriptors": self._process.num_fds(),
            "threads": self._process.num_threads(),
            "shm_bytes": shutil.disk_usage(self._shared).used,
            "shm_files": sum(len(files) for _, _, files in os.walk(self._shared)),
        }
        with suppress(OSError):  # none was counted yet
            found["objects"] = int(self._counts.read_text())
        now_s = time.monotonic() - self._began_s
        for what, value in found.items():
            self._seen.setdefault(what, []).append((now_s, value))

    def judged(self) -> dict[str, dict[str, Any]]:
        """What was seen, of each quantity.

        The `growth` is that of the second half, by the median of all slopes between two
        samples, so that what is there for a moment does not count; `is_flat` says
        whether it is at most the `bound`. `course` has the medians of tenths.
        """
        return {what: _judged(what, seen) for what, seen in self._seen.items()}


def _judged(what: str, seen: list[tuple[float, float]]) -> dict[str, Any]:
    end_s = seen[-1][0]
    second = [(at, value) for at, value in seen if at >= end_s / 2]
    middle = statistics.median(value for _, value in second)
    slopes = [
        (later - value) / (later_at - at)
        for i, (at, value) in enumerate(second)
        for later_at, later in second[i + 1 :]
    ]
    growth = statistics.median(slopes) * end_s / 2 if slopes else 0.0
    bound = max(BOUNDS[what].share * middle, BOUNDS[what].least)
    tenths = [[v for at, v in seen if int(at / end_s * 9.999) == i] for i in range(10)]
    return {
        "growth": round(growth, 1),
        "bound": round(bound, 1),
        "is_flat": growth <= bound,
        "median": middle,
        "course": [statistics.median(tenth) if tenth else None for tenth in tenths],
        "num_samples": len(seen),
    }
