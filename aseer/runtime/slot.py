"""Instances' places in the pool: what is known of the processes that have them now."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aseer.core._native import untracked
from aseer.errors import EngineError, InstanceLostError
from aseer.instance.messages import AbortChunks
from aseer.types import ChunkId, InstanceId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.config import EngineConfig
    from aseer.instance.messages import Answer, Report, Run
    from aseer.node.base import Node, Process
    from aseer.node.machine import Launch
    from aseer.runtime.restarts import RestartBudget
    from aseer.runtime.team import Team
    from aseer.transport.base import Message
    from aseer.types import InstanceInfo
    from aseer.watch import WakingClock
    from aseer.weights.current import CurrentWeights


class Slot:
    """A place for an instance, over all its incarnations."""

    def __init__(
        self,
        launch: Launch,
        node: Node,
        restarts: RestartBudget,
        clock: WakingClock,
        team: Team | None = None,
    ) -> None:
        """A place without a process.

        Args:
            restarts: of all instances of the node, or of the team.
            team: of which it is the next rank.
        """
        self.launch = launch
        self.node = node
        self.team = team
        if team is not None:
            team.slots.append(self)
        self.restarts = restarts
        self._clock = clock
        self.instance_id = InstanceId(launch.instance_id)
        self.name = f"instance-{launch.instance_id}"
        self.incarnation = 0
        self.given_up = False
        self.is_replaced = False  # killed for a weight update: no restart is spent
        self.process: Process | None = None
        self.asked: dict[int, asyncio.Future[Any]] = {}
        self._reset()

    def _reset(self) -> None:
        self.identity = f"{self.instance_id}.{self.incarnation}".encode()
        self.said_hello = asyncio.Event()
        self.up = asyncio.Event()
        self.fail_asked("it was started again")
        self.needs_weights = False  # its own are old, and no file has the new ones
        self.has: CurrentWeights | None = None  # once it could work with them
        self.info: InstanceInfo | None = None
        self.failure: str | None = None
        self.killed_because: str | None = None
        self.killed = asyncio.Event()
        self.was_shot = (
            False  # a signal ended it before it was up, which we did not send
        )
        # Sent to it, and not reported as over.
        self.running: set[ChunkId] = untracked(set())
        self._held: dict[ChunkId, Run] = {}  # of these, what waits for its KV
        self.unreachable_since: float | None = None  # something sent to it was lost
        now = self._clock.read()
        self.last_heard = self.last_progress = self.last_answer = now

    @property
    def lost_because(self) -> str | None:
        """Why there is no place for it any more; None while there is."""
        return (self.team or self.node).lost_because

    @property
    def was_felled(self) -> bool:
        """Whether its process ended as one did that it computes with."""
        return self.team is not None and self.team.was_felled(self)

    @property
    def is_given_up(self) -> bool:
        """Whether it is not started again, as far as can be told."""
        return self.given_up or (self.team is not None and self.team.is_given_up)

    @property
    def log(self) -> str:
        """Where its log is."""
        return self.node.log_of(self.name)

    def send(self, message: Message) -> None:
        """Send a message to the process that has the place now."""
        self.node.send(self.identity, message)

    def hold(self, message: Run, until: asyncio.Future[Any]) -> None:
        """Send a chunk once something is over; an abort sends it at once."""
        chunk_id = message.chunk.chunk_id
        self._held[chunk_id] = message
        until.add_done_callback(lambda _: self._release(chunk_id))

    def _release(self, chunk_id: ChunkId) -> None:
        message = self._held.pop(chunk_id, None)
        if message is not None:
            self.send(message)

    def abort(self, chunk_ids: Iterable[ChunkId]) -> None:
        """Ask the process to end chunks."""
        chunk_ids = list(chunk_ids)
        for chunk_id in chunk_ids:
            self._release(chunk_id)  # it has to know them to end them
        self.send(AbortChunks(chunk_ids))

    def why_dead(self, now: float, config: EngineConfig, patience_s: float) -> str:
        """Why it is to be taken for dead at this moment; empty if it is not.

        Args:
            patience_s: for one whose connection broke, so that its end is seen first.
        """
        # A start has a time-out of its own; to wait for weights has none.
        if not (self.up.is_set() or self.needs_weights):
            return ""
        silent = now - self.last_heard
        stuck = now - self.last_progress if self.running else 0.0
        mute = now - self.last_answer if self.asked else 0.0
        since = self.unreachable_since
        gone = 0.0 if since is None else now - since
        if silent > config.heartbeat_timeout_s:
            return f"it was silent for {silent:.0f} s"
        if stuck > config.stall_timeout_s:
            return f"it made no token for {stuck:.0f} s"
        if mute > config.start_timeout_s:
            return f"it left a question unanswered for {mute:.0f} s"
        if gone > patience_s:
            return "its connection broke, and what was sent to it is lost"
        return ""

    def kill(self, why: str) -> None:
        """Kill the process, if there is one; its death is handled like any other."""
        if self.process is not None:
            self.killed_because = why
            self.killed.set()
            self.process.kill()

    def is_unreachable(self) -> None:
        """It has no connection: what was sent to it just now never comes there."""
        if self.unreachable_since is None:
            self.unreachable_since = self._clock.read()

    def begin_incarnation(self) -> None:
        """A new process takes the place."""
        self.incarnation += 1
        self.process = None  # a kill is of the one that is to come
        self._reset()

    def take_answer(self, answer: Answer) -> None:
        """Hand an answer to whoever asked, if anybody still waits."""
        self.last_answer = self._clock.read()
        asked = self.asked.pop(answer.ask_id, None)
        if asked is not None and not asked.done():
            if answer.error:
                asked.set_exception(EngineError(answer.error))
                asked.exception()  # whoever asked may have given up
            else:
                asked.set_result(answer.value)

    def fail_asked(self, why: str) -> None:
        """Nobody will answer any more."""
        asked, self.asked = self.asked, {}
        for future in asked.values():
            if not future.done():
                future.set_exception(InstanceLostError(why))
                future.exception()  # whoever asked may have given up

    def is_gone(self, why: str) -> None:
        """Its process has ended, and nothing of it can be asked or run any more."""
        self.up.clear()
        self.said_hello.clear()
        self.needs_weights = False
        self.running.clear()
        self._held.clear()
        self.fail_asked(why)

    def count(self, report: Report) -> bool:
        """Keep track of what runs and when something last moved.

        Returns:
            Whether a chunk ended well.
        """
        if report.chunks.chunk_ids:
            self.last_progress = self._clock.read()
        ended_well = False
        for chunk_id, end in report.chunks.ended():
            self.running.discard(chunk_id)
            ended_well |= end.reason in ("stop", "length")
        return ended_well


class Slots(dict[InstanceId, Slot]):
    """All places, by their instances' ids."""

    def __init__(self) -> None:
        super().__init__()
        self._by_identity: dict[bytes, Slot] = {}

    def begin_incarnation(self, slot: Slot) -> None:
        """A new process takes a place, and is known by its name."""
        slot.begin_incarnation()
        self._by_identity[slot.identity] = slot

    def of_peer(self, peer: bytes) -> Slot | None:
        """The place that a process has; None if it has none any more."""
        slot = self._by_identity.get(peer)
        return slot if slot is not None and slot.identity == peer else None

    def forget(self, slot: Slot, why: str) -> None:
        """An incarnation is over: nothing is sent to it, or heard of it, any more."""
        slot.is_gone(why)
        slot.node.forget(slot.identity)
        self._by_identity.pop(slot.identity, None)
