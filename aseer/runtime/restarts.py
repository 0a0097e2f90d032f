"""How often dead instances are started again: a budget of all of them together. Pure.

A request that kills every engine it runs on ends as an error after a few deaths. Those
deaths say nothing about the engines, so they are given back: otherwise one such request
would take the whole engine with it. But where engines die again and again and no work
gets done, the engines are at fault, and the budget is to run out.
"""

from __future__ import annotations

import re

# What vLLM, torch and CUDA say where a device has too little memory left. That a killed
# process took too much of the host's is a guess of ours, which ends with a "?".
_NO_MEMORY = re.compile(
    r"out of memory(?!\?)|CUDA_ERROR_OUT_OF_MEMORY"
    r"|Free memory on device .* is less than"
    r"|No available memory for the cache blocks",
    re.IGNORECASE,
)
# Deaths that are forgiven until a chunk ends well: what two requests cause that are
# each ended at their fourth death, the default.
MAX_FORGIVEN = 8


def lacks_device_memory(why: str) -> bool:
    """Whether a start failed for want of a device's memory, by what the engine said.

    A dead engine's memory may be held for minutes by processes that had it mapped.
    """
    return _NO_MEMORY.search(why) is not None


class RestartBudget:
    """Restarts that are left over an engine's life."""

    def __init__(self, max_restarts: int) -> None:
        self._max = max_restarts
        self._left = max_restarts
        self._num_unpaid = 0  # deaths given back before their restart was paid for
        self._num_forgiven = 0  # since a chunk last ended well

    @property
    def num_left(self) -> int:
        """Restarts that may still be paid for."""
        return self._left + self._num_unpaid

    def spend(self) -> bool:
        """Pay for a restart; False if there is nothing left to pay with."""
        if self._num_unpaid:
            self._num_unpaid -= 1
        elif self._left:
            self._left -= 1
        else:
            return False
        return True

    def worked(self) -> None:
        """A chunk ended well somewhere: the engines can do their work."""
        self._num_forgiven = 0

    def forgive(self, num_deaths: int) -> bool:
        """Give back what deaths cost that a request is blamed for.

        Args:
            num_deaths: of which the last is not paid for yet.

        Returns:
            Whether anything was given back.
        """
        if self._num_forgiven >= MAX_FORGIVEN:
            return False
        self._num_forgiven += 1
        self._num_unpaid += 1
        self._left = min(self._max, self._left + num_deaths - 1)
        return True
