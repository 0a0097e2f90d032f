"""An instance's place in the pool: what is known of the process that has it now."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aseer.errors import EngineError, InstanceLostError
from aseer.types import InstanceId

if TYPE_CHECKING:
    from pathlib import Path

    from aseer.instance.launch import Launch
    from aseer.instance.messages import Answer, Report
    from aseer.instance.process import InstanceProcess
    from aseer.types import ChunkId, InstanceInfo
    from aseer.watch import WakingClock


class Slot:
    """A place for an instance, over all its incarnations."""

    def __init__(self, launch: Launch, log_dir: Path, clock: WakingClock) -> None:
        self.launch = launch
        self._clock = clock
        self.instance_id = InstanceId(launch.instance_id)
        self.log_path = log_dir / f"instance-{launch.instance_id}.log"
        self.incarnation = 0
        self.given_up = False
        self.process: InstanceProcess | None = None
        self._reset()

    def _reset(self) -> None:
        self.identity = f"{self.instance_id}.{self.incarnation}".encode()
        self.said_hello = asyncio.Event()
        self.up = asyncio.Event()
        self.asked: dict[int, asyncio.Future[Any]] = {}
        self.info: InstanceInfo | None = None
        self.failure: str | None = None
        self.killed_because: str | None = None
        self.running: set[ChunkId] = set()  # sent to it, and not reported as over
        self.last_heard = self.last_progress = self._clock.read()

    def kill(self, why: str) -> None:
        """Kill the process, if there is one; its death is handled like any other."""
        if self.process is not None:
            self.killed_because = why
            self.process.kill()

    def begin_incarnation(self) -> None:
        """A new process takes the place."""
        self.incarnation += 1
        self._reset()

    def take_answer(self, answer: Answer) -> None:
        """Hand an answer to who asked, if he still waits."""
        asked = self.asked.pop(answer.ask_id, None)
        if asked is not None and not asked.done():
            if answer.error:
                asked.set_exception(EngineError(answer.error))
            else:
                asked.set_result(answer.value)

    def fail_asked(self, why: str) -> None:
        """Nobody will answer any more."""
        for asked in self.asked.values():
            if not asked.done():
                asked.set_exception(InstanceLostError(why))

    def count(self, report: Report) -> None:
        """Keep track of what runs, and when something last moved."""
        if report.chunks:
            self.last_progress = self._clock.read()
        self.running.difference_update(c.chunk_id for c in report.chunks if c.end)
