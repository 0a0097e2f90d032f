"""Loads from disk that a pool server has begun, a few at a time. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_LOADS = 4
# A load takes milliseconds to seconds. One that is never said to be over must not take
# a place for ever.
MAX_LOAD_S = 60.0


class _Load(NamedTuple):
    num_there: int
    began_at_s: float


class Prefetches:
    """The loads in progress, by LMCache's name for each."""

    def __init__(self) -> None:
        self._loads: dict[str, _Load] = {}

    @property
    def has_room(self) -> bool:
        """Whether another may begin."""
        return len(self._loads) < MAX_LOADS

    def begin(self, job: str, num_there: int, now: float) -> None:
        """A load has begun.

        Args:
            num_there: chunks of the request that were in memory before.
        """
        self._loads[job] = _Load(num_there, now)

    def settle(self, num_found: Callable[[str], int | None], now: float) -> int:
        """Forget the loads that are over, or have taken too long.

        Args:
            num_found: chunks in memory after a load; None while it goes on. Raises
                KeyError for a load that it does not know.
        Returns:
            Chunks that were loaded.
        """
        num_loaded = 0
        for job, load in list(self._loads.items()):
            try:
                found = num_found(job)
            except KeyError:
                found = load.num_there
            if found is not None:
                num_loaded += max(0, found - load.num_there)
            elif now - load.began_at_s < MAX_LOAD_S:
                continue
            del self._loads[job]
        return num_loaded
