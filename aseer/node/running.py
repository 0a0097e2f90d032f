"""A process that a controller ordered, as the node's agent has it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aseer.node.process import InstanceProcess


class Running:
    """A process, from the order to start it to its end."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = loop.create_future()
        self._is_to_end: asyncio.Future[float] = loop.create_future()
        self._process: InstanceProcess | None = None

    @property
    def was_told(self) -> bool:
        """Whether it was told to end."""
        return self._is_to_end.done()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        else:
            self.end_soon(0.0)

    def end_soon(self, grace_s: float) -> None:
        """See `Process.end`; the last order counts."""
        if self._is_to_end.done():
            self.kill()
        else:
            self._is_to_end.set_result(grace_s)

    async def note(self) -> None:
        if self._process is not None:
            await self._process.note_shared_memory()

    async def run(self, process: InstanceProcess) -> int:
        """It has started: wait until it has ended, or is to.

        Returns:
            Its exit status, once nothing of it remains.
        """
        self._process = process
        async with asyncio.TaskGroup() as tasks:
            ended = tasks.create_task(process.wait())
            await asyncio.wait(
                (ended, self._is_to_end), return_when=asyncio.FIRST_COMPLETED
            )
            grace_s = self._is_to_end.result() if self._is_to_end.done() else 0.0
            await process.end(grace_s)
            return await ended
