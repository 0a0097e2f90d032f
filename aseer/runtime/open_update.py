"""A weight update that other processes send to: open until it is ended, or too old.

On the engine's thread. From its beginning to its end an update has the engine for
itself, so one that nobody ends would stop everything: after `timeout_s` the engine goes
on with the weights that it has, and whoever comes later is told why.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aseer.errors import WeightUpdateError
from aseer.watch import WakingClock
from aseer.weights.direct import withdraw_engines
from aseer.weights.target import WeightTarget, open_target

if TYPE_CHECKING:
    from aseer.runtime.direct_update import DirectUpdate
    from aseer.runtime.weights import Plan, WeightKeeper

_log = logging.getLogger("aseer")
# How often the time that is left is looked at; see `aseer.watch`.
_TICK_S = 0.25


class OpenUpdates:
    """The open update, of which there is at most one: it has the engine's claim."""

    def __init__(self, keeper: WeightKeeper) -> None:
        self._keeper = keeper
        self._plan: Plan | None = None
        self.direct: DirectUpdate | None = None
        """What sends straight to the instances; None = the update goes by files."""
        self._timer: asyncio.TimerHandle | None = None
        self._ends: dict[str, str] = {}  # how the last one ended, by its directory

    def begin(
        self, plan: Plan, timeout_s: float, direct: DirectUpdate | None = None
    ) -> WeightTarget:
        """Open a planned update for a sender.

        Args:
            direct: if it goes straight to the instances.
        Raises:
            OSError: there is no room.
        """
        open_target(plan.directory)
        self._plan, self.direct = plan, direct
        clock = WakingClock(2 * _TICK_S)
        loop = asyncio.get_running_loop()

        def look() -> None:
            left = timeout_s - clock.read()
            if left > 0:
                self._timer = loop.call_later(min(left, _TICK_S), look)
            else:
                self._expire(plan, timeout_s)

        look()
        return WeightTarget(
            version=plan.version,
            directory=str(plan.directory),
            model=plan.model,
            transfer="host" if direct is None else direct.transfer,
        )

    def take(self, target: WeightTarget, why: str) -> tuple[Plan, DirectUpdate | None]:
        """The plan of an open update, which is open no more, and what sends for it.

        Args:
            why: how it ended, for whoever comes later.
        Raises:
            WeightUpdateError: it is over, or was never this engine's.
        """
        plan = self._plan
        if plan is None or str(plan.directory) != target.directory:
            raise WeightUpdateError(
                f"the update to version {target.version} "
                + self._ends.get(target.directory, "is not one of this engine")
            )
        direct = self.direct
        self._close(plan, why)
        return plan, direct

    def _expire(self, plan: Plan, timeout_s: float) -> None:
        why = (
            f"was abandoned {timeout_s:g} s after begin_update, since nobody finished "
            "it; give more time with timeout_s"
        )
        _log.warning("the weight update to version %d %s", plan.version, why)
        if self.direct is not None:
            self.direct.fail(f"its weight update {why}")
        self._close(plan, why)
        self._keeper.abandon(plan)

    def _close(self, plan: Plan, why: str) -> None:
        directory = str(plan.directory)
        withdraw_engines(directory)
        self._ends = {directory: why}
        self._plan = self.direct = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
