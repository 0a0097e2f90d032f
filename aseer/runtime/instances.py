"""The instances of one engine: what is asked of them, and what they say.

Their owner hears of three things, in order and on the event loop: an instance is up, it
reported, it is down. One that is down is started again (`aseer.runtime.supervisor`),
and has the current weights before it is up.

Instances run on nodes: this machine, and others that come and go. What ran on a node
that is gone is down, for no fault of its own (`instance_left`), and not started again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from aseer.errors import InstanceLostError
from aseer.instance.messages import (
    Answer,
    Ask,
    Failed,
    FromInstance,
    Hello,
    Report,
    Run,
)
from aseer.runtime.readiness import Readiness
from aseer.runtime.remote_weights import once_there
from aseer.runtime.specs import Specs
from aseer.runtime.supervisor import Supervisor
from aseer.transport.base import PROTOCOL_VERSION
from aseer.weights.current import CurrentWeights, TrainersWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aseer.config import EngineConfig
    from aseer.dgds.messages import DraftingSpec
    from aseer.instance.messages import Question
    from aseer.node.base import Node
    from aseer.node.machine import Launch
    from aseer.node.supply import Supply
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.slot import Slot
    from aseer.runtime.team import Team
    from aseer.types import ChunkId, InstanceId, InstanceInfo

_log = logging.getLogger("aseer")


class PoolOwner(Protocol):
    """Who hears of the instances."""

    def instance_up(self, info: InstanceInfo) -> None:
        """It takes work from now on."""

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        """Progress and load."""

    def instance_down(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId] = ()
    ) -> None:
        """It is gone, and so are its partners, with all that ran there."""

    def instance_left(self, instance_id: InstanceId, why: str) -> None:
        """It is gone with its node; nothing that ran there is to blame."""

    def instances_exhausted(self, why: str) -> None:
        """None is up, and none will come back."""

    def instances_need_weights(self, why: str) -> None:
        """None is up, and none will be before the next weight update."""


class InstancePool:
    """The way to the instances, and from them."""

    def __init__(
        self,
        config: EngineConfig,
        launches: list[Launch],
        node: Node,
        owner: PoolOwner,
        drafting: DraftingSpec | None = None,
        kv_pools: KvPools | None = None,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            launches: of this machine's instances. node: this machine.
        """
        self._owner = owner
        self._num_asked = 0
        self._change = asyncio.Event()
        specs = Specs(config, node, drafting, kv_pools)
        self._supervisor = Supervisor(
            config, specs, owner, Readiness(self).bring, self._on_death
        )
        self._supervisor.add_own(node, launches)
        self._slots = self._supervisor.slots
        self._clock = self._supervisor.clock
        self._weights = CurrentWeights()
        self._supplied: set[Supply] = set()  # also where no instance is at the moment

    @property
    def weights(self) -> CurrentWeights:
        """What an instance must have before it works."""
        return self._weights

    @weights.setter
    def weights(self, weights: CurrentWeights) -> None:
        self._weights = weights
        self.tell_change()

    def tell_change(self) -> None:
        """Wake who waits for a change of the weights that there are, or are wanted."""
        self._change.set()
        self._change = asyncio.Event()

    async def await_change(self) -> None:
        """Wait for the next `tell_change`."""
        await self._change.wait()

    def is_ready(self, slot: Slot) -> None:
        """An instance takes work from now on."""
        assert slot.info is not None
        slot.up.set()
        self._owner.instance_up(slot.info)

    @property
    def up(self) -> list[InstanceId]:
        """Instances that take work."""
        return [i for i, slot in self._slots.items() if slot.up.is_set()]

    @property
    def places(self) -> list[InstanceId]:
        """Instances that are up, or may be; those of a node that has left are not."""
        return sorted(self._slots)

    @property
    def in_need_of_weights(self) -> list[InstanceId]:
        """Instances that would be up, had they the trainer's weights."""
        return [i for i, slot in self._slots.items() if slot.needs_weights]

    def identity_of(self, instance_id: InstanceId) -> bytes:
        """Of the process that has the place now; empty if it is not ready."""
        slot = self._slots.get(instance_id)
        return slot.identity if slot and slot.said_hello.is_set() else b""

    def are_elsewhere(self, instances: Iterable[InstanceId]) -> bool:
        """Whether one of them is on another host."""
        slots = [self._slots.get(i) for i in instances]
        return any(slot and slot.node.supplies for slot in slots)

    def run_chunk(
        self,
        instance_id: InstanceId,
        message: Run,
        after: asyncio.Future[Any] | None = None,
    ) -> None:
        """Send an instance a chunk.

        Args:
            after: what is waited for, if anything.
        """
        slot = self._slots[instance_id]
        if after is None:
            slot.send(message)
        else:
            slot.hold(message, after)
        if not slot.running:
            slot.last_progress = self._clock.read()
        slot.running.add(message.chunk.chunk_id)  # what cannot be sent does not run

    def abort_chunks(self, instance_id: InstanceId, chunk_ids: list[ChunkId]) -> None:
        """Ask an instance to end chunks."""
        self._slots[instance_id].abort(chunk_ids)

    def abort_all(self) -> None:
        """Ask every instance to end what it runs, whoever it is for."""
        for slot in self._slots.values():
            if slot.running:
                slot.abort(slot.running)

    def is_up(self, place: Node | Team) -> bool:
        """Whether all instances of a node, or of a team, take work."""
        slots = [s for s in self._slots.values() if place in (s.node, s.team)]
        return bool(slots) and all(slot.up.is_set() for slot in slots)

    @property
    def is_idle(self) -> bool:
        """Whether no instance runs a chunk."""
        return not any(slot.running for slot in self._slots.values())

    def ask(
        self, instance_id: InstanceId, what: Question, **arguments: Any
    ) -> asyncio.Future[Any]:
        """Call a method of an instance's backend, after those asked for before.

        The future raises EngineError if the method did; InstanceLostError if the
        instance died, or is down already. An instance that answers nothing for
        `start_timeout_s` is killed.
        """
        slot = self._slots.get(instance_id)
        self._num_asked += 1
        ask_id = self._num_asked
        asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if slot is None or not slot.said_hello.is_set():
            asked.set_exception(InstanceLostError(f"instance {instance_id} is down"))
            asked.exception()  # whoever asked may not wait for it
            return asked
        slot.asked[ask_id] = asked
        if len(slot.asked) == 1:
            slot.last_answer = self._clock.read()
        slot.send(Ask(ask_id, what, arguments))
        return asked

    def prepare_weights(
        self, instance_id: InstanceId, index: str
    ) -> asyncio.Future[Any]:
        """Have an instance open new weights, once its node has them; as `ask`.

        Args:
            index: path of an `Index`, on this machine.
        """
        slot = self._slots.get(instance_id)
        if slot is None or not slot.node.supplies:
            return self.ask(instance_id, "prepare_weights", index=index)
        incarnation = slot.identity

        def ask(there: str, *others: str) -> asyncio.Future[Any]:
            if slot.identity != incarnation:  # it loads the current weights by itself
                raise InstanceLostError(f"instance {instance_id} was started again")
            told: dict[str, Any] = {"others": others} if others else {}
            return self.ask(instance_id, "prepare_weights", index=there, **told)

        self._supplied.update(slot.node.supplies)
        return once_there(slot.node.supplies, index, ask)

    def drop_weights(self, index: str) -> None:
        """No instance will load those weights any more."""
        self._supplied = {each for each in self._supplied if not each.is_lost}
        for supply in self._supplied:
            supply.drop(index)

    async def start(self) -> None:
        """Start this machine's instances, in parallel, and wait until all are up.

        Raises:
            InstanceStartError: one did not come up; the others are ended first.
        """
        await self._supervisor.start()

    async def supervise(self) -> None:
        """Watch the instances, and start this machine's dead ones again, until
        cancelled.
        """
        await self._supervisor.supervise()

    async def attend(self, node: Node, launches: list[Launch]) -> None:
        """Start instances on another node, and keep them up until it is gone.

        Raises:
            InstanceStartError: one did not come up, before the node was gone.
        """
        await self._supervisor.attend(node, launches)

    async def attend_team(self, team: Team) -> None:
        """As `attend`, of instances that compute together, on one node or more."""
        await self._supervisor.attend_team(team)

    async def stop(self, grace_s: float) -> None:
        """End every instance: ask those that are up, wait up to `grace_s`, kill.

        Supervision must have ended. May be called again.
        """
        await self._supervisor.stop(grace_s)

    def hold_starts(self) -> None:
        """Start no instance again until `allow_starts`."""
        self._supervisor.hold_starts()

    def allow_starts(self) -> None:
        """Start again what is dead, now and from now on."""
        self._supervisor.allow_starts()

    def forgive(self, num_deaths: int) -> None:
        """A request is blamed for so many deaths, the last of which just happened."""
        self._supervisor.forgive(num_deaths)

    def num_restarts(self, instance_id: InstanceId) -> int:
        """Times the instance was started again."""
        return self._supervisor.num_restarts(instance_id)

    def replace(self, instance_id: InstanceId, why: str) -> None:
        """Kill an instance for no fault of its own; it is started again for free."""
        if (slot := self._slots.get(instance_id)) is not None:  # else it is gone
            # Partners at once, too: none is to compute with weights that are not its.
            for each in [slot] if slot.team is None else slot.team.slots:
                each.is_replaced = True
                each.kill(why)

    def kill_busy(self, why: str) -> None:
        """Kill the instances that run chunks; they are started again like any other."""
        for slot in self._slots.values():
            if slot.running:
                slot.kill(why)

    def on_message(self, peer: bytes, message: FromInstance) -> None:
        """Take what an instance says; an earlier incarnation's last words are
        dropped.
        """
        slot = self._slots.of_peer(peer)
        if slot is None:
            return
        slot.last_heard = self._clock.read()
        match message:
            case Hello(protocol, info):
                self._on_hello(slot, protocol, info)
            case Report():
                if slot.count(message):
                    slot.restarts.worked()
                if slot.up.is_set():
                    self._owner.instance_report(slot.instance_id, message)
            case Answer():
                slot.take_answer(message)
            case Failed(error):
                slot.failure = error

    def on_lost(self, peer: bytes, why: str) -> None:
        """An instance reads nothing, or speaks nonsense: it is as good as dead."""
        slot = self._slots.of_peer(peer)
        if slot is not None:
            slot.kill(why)

    def on_gone(self, peer: bytes) -> None:
        """What was sent to an instance is lost; if it still lives, it must go."""
        slot = self._slots.of_peer(peer)
        if slot is not None:
            slot.is_unreachable()

    def _on_hello(self, slot: Slot, protocol: int, info: InstanceInfo) -> None:
        counts = (info.num_kv_blocks, info.block_size, info.max_num_seqs)
        if protocol != PROTOCOL_VERSION:
            slot.kill(
                f"it speaks protocol {protocol}, this is {PROTOCOL_VERSION}: the "
                "engine process runs another version of aseer"
            )
            return
        if info.instance_id != slot.instance_id or min(counts) < 1:
            slot.kill(f"its hello makes no sense: {info}")
            return
        if slot.said_hello.is_set():
            return
        slot.info = replace(info, node=slot.node.name)
        slot.said_hello.set()

    def _on_death(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId]
    ) -> None:
        """Tell; also if none is up now, and none will be before the next update."""
        self._owner.instance_down(instance_id, why, partners)
        if isinstance(self.weights.whole, TrainersWeights) and not self.up:
            self._owner.instances_need_weights(
                "every instance is lost, and the weights of the last update came "
                "straight from the trainer (transfer='ipc' or 'nccl'), so that nobody "
                "else has them: call update_weights, and begin the rollout again; the "
                f"last one: {why}"
            )
