"""The ends of instances' processes, some of which the system cannot bring about."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aseer.node.children import LONGEST_DEATH_S
from aseer.watch import wait_awake, waking_timeout

if TYPE_CHECKING:
    from aseer.node.base import Process
    from aseer.runtime.slot import Slot

_log = logging.getLogger("aseer")

# For those that have ended since, once the engine is closed.
_LAST_LOOK_S = 1.0


class Deaths:
    """Kills processes, and keeps those that live on."""

    def __init__(self) -> None:
        self._undead: list[Process] = []  # killed, and not gone when last seen

    async def of(self, slot: Slot, process: Process) -> int | None:
        """Wait for an end, and see that nothing of the process group is left.

        One that a driver holds up is not waited for: its requests go on elsewhere.

        Returns:
            The exit status; None if it cannot be killed.
        """
        async with asyncio.TaskGroup() as tasks:
            ended = tasks.create_task(process.wait())
            killed = tasks.create_task(slot.killed.wait())
            await asyncio.wait((ended, killed), return_when=asyncio.FIRST_COMPLETED)
            await wait_awake(ended, LONGEST_DEATH_S)
            killed.cancel()
            ended.cancel()
        if ended.cancelled():
            self._undead.append(process)
            return None
        await self.kill(process)
        return ended.result()

    async def kill(self, process: Process, timeout_s: float | None = None) -> None:
        """End a process with all that it started, unless it cannot be killed."""
        try:
            async with waking_timeout(timeout_s or LONGEST_DEATH_S):
                await process.end(0)
        except TimeoutError:
            _log.error("a process was killed and lives on; what it has stays taken")
            self._undead.append(process)

    async def look_again(self) -> None:
        """Let go of those that have ended since."""
        undead, self._undead = self._undead, []
        for process in undead:
            await self.kill(process, _LAST_LOOK_S)
