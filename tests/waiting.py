"""Waiting for what no event tells of."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


async def until(is_so: Callable[[], object], interval_s: float = 0.005) -> None:
    """Wait until something is so; the test's own time-out ends what never is."""
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(interval_s)
