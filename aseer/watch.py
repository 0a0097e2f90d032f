"""Time that counts only while this process runs, for those who judge others by it.

A process may be stopped for any time: Ctrl-Z, a frozen container, a snapshot of its
machine. While it is stopped it hears nothing of others, whatever they do, so a time-out
that ends meanwhile says nothing of them. A `WakingClock` is read more often than every
`longest_step_s`; where a reading comes later than that, the surplus does not count.
Whether the system's clock goes on while the machine sleeps makes no difference.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# Short beside every time-out there is, long beside what a busy loop is late by.
_TICK_S = 0.25
_LONGEST_STEP_S = 2 * _TICK_S


class WakingClock:
    """Seconds that this process was seen running since the clock was made."""

    def __init__(
        self,
        longest_step_s: float = _LONGEST_STEP_S,
        source: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start at 0.

        Args:
            longest_step_s: that counts between two readings; twice the time between
                them, so that a busy process loses nothing.
            source: a clock that never goes back, in seconds.
        """
        self._longest_step_s = longest_step_s
        self._source = source
        self._read_at = source()
        self._awake_s = 0.0

    def read(self) -> float:
        """The time now."""
        now = self._source()
        self._awake_s += min(now - self._read_at, self._longest_step_s)
        self._read_at = now
        return self._awake_s


@asynccontextmanager
async def waking_timeout(timeout_s: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, by a `WakingClock`.

    Raises:
        TimeoutError: the block took longer than `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    clock = WakingClock(_LONGEST_STEP_S, loop.time)
    async with asyncio.timeout(None) as timeout:
        timer: asyncio.Handle

        def tick() -> None:
            nonlocal timer
            left = timeout_s - clock.read()
            if left > 0:
                timer = loop.call_later(min(left, _TICK_S), tick)
            else:
                timeout.reschedule(loop.time())

        timer = loop.call_soon(tick)
        try:
            yield
        finally:
            timer.cancel()


async def wait_awake(future: asyncio.Future[Any], timeout_s: float) -> None:
    """Wait until a future is done, or `timeout_s` passed by a `WakingClock`."""
    with suppress(TimeoutError):
        async with waking_timeout(timeout_s):
            await asyncio.wait([future])
