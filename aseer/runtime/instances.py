"""The instances of one engine: started together, watched, restarted, stopped.

Their owner hears of three things, in order and on the event loop: an instance is up, it
reported, it is down. A process that exits, that is silent for `heartbeat_timeout_s`, or
that has work but makes no token for `stall_timeout_s` is down; it is killed with its
whole process group and started again, as often as its node's `RestartBudget` allows.

Instances run on nodes: this machine, and others that come and go. What ran on a node
that is gone is down, for no fault of its own (`instance_left`), and not started again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from aseer.config import takes_nodes
from aseer.errors import (
    EngineError,
    InstanceLostError,
    InstanceStartError,
    describe,
)
from aseer.instance.messages import (
    AbortChunks,
    Answer,
    Ask,
    Failed,
    FromInstance,
    Hello,
    Report,
    Run,
    Stop,
)
from aseer.node.process import describe_exit
from aseer.node.remote import RemoteNode
from aseer.runtime.causes import death, start_error
from aseer.runtime.remote_weights import once_there
from aseer.runtime.restarts import RestartBudget, lacks_device_memory
from aseer.runtime.slot import Slot
from aseer.runtime.specs import Specs
from aseer.transport.base import PROTOCOL_VERSION
from aseer.watch import WakingClock, wait_awake, waking_timeout
from aseer.weights.current import CurrentWeights, TrainersWeights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.config import EngineConfig
    from aseer.dgds.messages import DraftingSpec
    from aseer.instance.messages import Question
    from aseer.kv.pool import KvPool
    from aseer.node.base import Node, Process
    from aseer.node.machine import Launch
    from aseer.types import ChunkId, InstanceId, InstanceInfo

_log = logging.getLogger("aseer")

_WATCH_INTERVAL_S = 0.5
# Of `heartbeat_timeout_s`: the watcher looks that often at least, so that what a pause
# of its own counts for is far from a time-out.
_LOOKS_A_HEARTBEAT = 8
_NOTE_INTERVAL_S = 1.0
# Before a start is tried again, so that a moment in which the system has no room for a
# process does not use up all restarts.
_RETRY_PAUSE_S = 1.0
# A dead engine's device memory is free once all that had mapped it have noticed, a KV
# pool after two minutes. For so long starts that lack memory cost no restart.
_MEMORY_PATIENCE_S = 300.0
_MEMORY_PAUSE_S = 10.0
# From SIGKILL to a process's end. To take hundreds of gigabytes from one, and GPUs,
# lasts tens of seconds; one that a driver or a file system holds up may never end.
_LONGEST_DEATH_S = 60.0
# For those that have ended since, once the engine is closed.
_LAST_LOOK_S = 1.0
# Counts between two looks at a start; reading a busy machine's /proc takes some of it.
_LONGEST_NOTE_S = 5.0


class PoolOwner(Protocol):
    """Who hears of the instances."""

    def instance_up(self, info: InstanceInfo) -> None:
        """It takes work from now on."""

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        """Progress and load."""

    def instance_down(self, instance_id: InstanceId, why: str) -> None:
        """It is gone, with all that ran there."""

    def instance_left(self, instance_id: InstanceId, why: str) -> None:
        """It is gone with its node; nothing that ran there is to blame."""

    def instances_exhausted(self, why: str) -> None:
        """None is up, and none will come back."""

    def instances_need_weights(self, why: str) -> None:
        """None is up, and none will be before the next weight update."""


class InstancePool:
    """Starts and supervises the instances."""

    def __init__(
        self,
        config: EngineConfig,
        launches: list[Launch],
        node: Node,
        owner: PoolOwner,
        drafting: DraftingSpec | None = None,
        kv_pool: KvPool | None = None,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            launches: of this machine's instances. node: this machine.
            kv_pool: of this machine.
        """
        self._config = config
        self._owner = owner
        self._specs = Specs(config, node, drafting, kv_pool)
        silence_s = config.heartbeat_timeout_s / _LOOKS_A_HEARTBEAT
        self._watch_interval_s = min(_WATCH_INTERVAL_S, silence_s)
        self._clock = WakingClock(2 * self._watch_interval_s)
        self._slots: dict[InstanceId, Slot] = {}
        self._num_restarts: dict[InstanceId, int] = {}
        self._by_identity: dict[bytes, Slot] = {}
        self._undead: list[Process] = []  # killed, and not gone when last seen
        self._forgiven = asyncio.Event()
        self._num_asked = 0
        self._may_grow = takes_nodes(config)
        self._exhausted_at: float | None = None
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._last_died_on = RestartBudget(config.max_restarts)
        self._own = self._add(node, launches, self._last_died_on)
        self._num_launched = len(launches)  # ids are never used again
        self._weights = CurrentWeights()
        self._weights_changed = asyncio.Event()

    def _add(
        self, node: Node, launches: Iterable[Launch], restarts: RestartBudget
    ) -> list[Slot]:
        slots = [Slot(launch, node, restarts, self._clock) for launch in launches]
        self._slots |= {slot.instance_id: slot for slot in slots}
        return slots

    @property
    def weights(self) -> CurrentWeights:
        """What an instance must have before it works."""
        return self._weights

    @weights.setter
    def weights(self, weights: CurrentWeights) -> None:
        self._weights = weights
        self._weights_changed.set()
        self._weights_changed = asyncio.Event()

    @property
    def up(self) -> list[InstanceId]:
        """Instances that take work."""
        return [i for i, slot in self._slots.items() if slot.up.is_set()]

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
        return any(slot and isinstance(slot.node, RemoteNode) for slot in slots)

    def num_restarts(self, instance_id: InstanceId) -> int:
        """Times the instance was started again."""
        return self._num_restarts.get(instance_id, 0)

    def run_chunk(self, instance_id: InstanceId, message: Run) -> None:
        """Send an instance a chunk."""
        slot = self._slots[instance_id]
        slot.send(message)
        if not slot.running:
            slot.last_progress = self._clock.read()
        slot.running.add(message.chunk.chunk_id)  # what cannot be sent does not run

    def abort_chunks(self, instance_id: InstanceId, chunk_ids: list[ChunkId]) -> None:
        """Ask an instance to end chunks."""
        self._slots[instance_id].send(AbortChunks(chunk_ids))

    def abort_all(self) -> None:
        """Ask every instance to end what it runs, whoever it is for."""
        for slot in self._slots.values():
            if slot.running:
                slot.send(AbortChunks(list(slot.running)))

    def is_up(self, node: Node) -> bool:
        """Whether all instances of a node take work."""
        slots = [slot for slot in self._slots.values() if slot.node is node]
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
        if slot is None or not isinstance(slot.node, RemoteNode):
            return self.ask(instance_id, "prepare_weights", index=index)
        incarnation = slot.identity

        def ask(there: str) -> asyncio.Future[Any]:
            if slot.identity != incarnation:  # it loads the current weights by itself
                raise InstanceLostError(f"instance {instance_id} was started again")
            return self.ask(instance_id, "prepare_weights", index=there)

        return once_there(slot.node, index, ask)

    def drop_weights(self, index: str) -> None:
        """No instance will load those weights any more."""
        for node in {slot.node for slot in self._slots.values()}:
            if isinstance(node, RemoteNode):
                node.drop(index)

    def forgive(self, num_deaths: int) -> None:
        """A request is blamed for so many deaths, the last of which just happened."""
        if self._last_died_on.forgive(num_deaths):
            self._forgiven.set()

    async def start(self) -> None:
        """Start this machine's instances, in parallel, and wait until all are up.

        Raises:
            InstanceStartError: one did not come up; the others are ended first.
        """
        async with asyncio.TaskGroup() as tasks:
            for slot in self._own:
                tasks.create_task(self._bring_up(slot))

    async def supervise(self) -> None:
        """Watch the instances, and start this machine's dead ones again, until
        cancelled.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            for slot in self._own:
                tasks.create_task(self._keep_up(slot))

    async def attend(self, node: Node, launches: list[Launch]) -> None:
        """Start instances on another node, and keep them up until it is gone.

        Raises:
            InstanceStartError: one did not come up, before the node was gone.
        """
        num = self._num_launched
        self._num_launched += len(launches)
        slots = self._add(
            node,
            [replace(launch, instance_id=num + i) for i, launch in enumerate(launches)],
            RestartBudget(self._config.max_restarts),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                for slot in slots:
                    tasks.create_task(self._attend(slot))
        except asyncio.CancelledError:
            raise  # `stop` ends them, with all others
        except BaseException as error:
            self._leave(slots, f"its node {node.name} is not used: {describe(error)}")
            await self._end_all(slots, 0)
            self._drop(slots)
            raise
        self._drop(slots)

    def _leave(self, slots: list[Slot], why: str) -> None:
        """Tell of those that are up that nothing runs there any more."""
        for slot in slots:
            if slot.up.is_set():
                slot.is_gone(why)
                self._owner.instance_left(slot.instance_id, why)

    def _drop(self, slots: list[Slot]) -> None:
        for slot in slots:
            del self._slots[slot.instance_id]

    async def _attend(self, slot: Slot) -> None:
        while True:
            try:
                await self._bring_up(slot)
            except InstanceStartError as error:
                if slot.node.lost_because is not None:
                    return
                # The system's own doing says nothing about the node.
                if not (slot.was_shot and slot.restarts.spend()):
                    raise
                _log.warning("%s", error)
                await asyncio.sleep(_RETRY_PAUSE_S)
            else:
                await self._keep_up(slot)
                return

    async def stop(self, grace_s: float) -> None:
        """End every instance: ask those that are up, wait up to `grace_s`, kill.

        Supervision must have ended. May be called again.
        """
        await self._end_all(list(self._slots.values()), grace_s)
        undead, self._undead = self._undead, []
        for process in undead:
            await self._kill(process, _LAST_LOOK_S)

    async def _end_all(self, slots: list[Slot], grace_s: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for slot in slots:
                if slot.up.is_set() and grace_s:
                    slot.send(Stop())
                    tasks.create_task(self._end(slot, grace_s))
                else:
                    tasks.create_task(self._end(slot, 0))

    async def _end(self, slot: Slot, grace_s: float) -> None:
        if slot.process is not None:
            await slot.process.end(grace_s)
        self._forget(slot, "the engine was closed")  # what it was asked, too

    def replace(self, instance_id: InstanceId, why: str) -> None:
        """Kill an instance for no fault of its own; it is started again for free."""
        if (slot := self._slots.get(instance_id)) is not None:  # else it is gone
            slot.is_replaced = True
            slot.kill(why)

    def hold_starts(self) -> None:
        """Start no instance again until `allow_starts`."""
        self._may_start.clear()

    def allow_starts(self) -> None:
        """Start again what is dead, now and from now on."""
        self._may_start.set()

    def kill_busy(self, why: str) -> None:
        """Kill the instances that run chunks; they are started again like any other."""
        for slot in self._slots.values():
            if slot.running:
                slot.kill(why)

    def on_message(self, peer: bytes, message: FromInstance) -> None:
        """Take what an instance says; an earlier incarnation's last words are
        dropped.
        """
        slot = self._by_identity.get(peer)
        if slot is None or slot.identity != peer:
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
        slot = self._by_identity.get(peer)
        if slot is not None and slot.identity == peer:
            slot.kill(why)

    def on_gone(self, peer: bytes) -> None:
        """What was sent to an instance is lost; if it still lives, it must go."""
        slot = self._by_identity.get(peer)
        if slot is not None and slot.identity == peer:
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

    async def _get_ready(self, slot: Slot) -> None:
        """Wait for its hello, and let it load the current weights before it works."""
        await slot.said_hello.wait()
        loaded = CurrentWeights()
        while loaded != self.weights:  # they may change meanwhile
            theirs = self.weights.whole
            if isinstance(theirs, TrainersWeights) and loaded.whole is not theirs:
                if await self._has_from_trainer(slot, theirs):
                    loaded = CurrentWeights(theirs)
                continue
            way, loaded = loaded.way_to(self.weights), self.weights
            try:
                if way is None:
                    slot.is_replaced = True  # it cannot go back, and is not at fault
                    raise EngineError("the weights it had just loaded were taken back")
                for index in way:
                    await self.prepare_weights(slot.instance_id, index)
                    await self.ask(slot.instance_id, "commit_weights")
            except EngineError as error:
                if loaded == self.weights:
                    slot.failure = str(error)
                    slot.kill(slot.failure)
                    return
        assert slot.info is not None
        slot.up.set()
        self._owner.instance_up(slot.info)

    async def _has_from_trainer(self, slot: Slot, theirs: TrainersWeights) -> bool:
        """Whether an instance holds such weights; if not, once others count."""
        if slot.identity in theirs.holders:
            return True
        _log.warning(
            "instance %d waits for the next weight update: the weights of the last one "
            "came straight from the trainer, and nobody else has them",
            slot.instance_id,
        )
        slot.needs_weights = True
        while self.weights.whole is theirs:
            await self._weights_changed.wait()
        slot.needs_weights = False
        return False

    def _tell_if_weights_are_needed(self, why: str) -> None:
        """Tell if no instance is up, and none will be before the next update."""
        if isinstance(self.weights.whole, TrainersWeights) and not self.up:
            self._owner.instances_need_weights(
                "every instance is lost, and the weights of the last update came "
                "straight from the trainer (transfer='ipc' or 'nccl'), so that nobody "
                "else has them: call update_weights, and begin the rollout again; the "
                f"last one: {why}"
            )

    async def _bring_up(self, slot: Slot) -> None:
        """Start a process and wait for its hello.

        Raises:
            InstanceStartError: it died or took too long.
        """
        started = time.monotonic()
        clock = WakingClock(_LONGEST_NOTE_S)
        process = await self._spawn(slot)
        timeout_s = self._config.start_timeout_s
        async with asyncio.TaskGroup() as tasks:
            up = tasks.create_task(self._get_ready(slot))
            dead = tasks.create_task(process.wait())
            while not (slot.up.is_set() or dead.done()):
                await asyncio.wait(
                    (dead,) if up.done() else (up, dead),
                    timeout=_NOTE_INTERVAL_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                await process.note_shared_memory()
                if slot.needs_weights:  # that is not its start's time
                    clock = WakingClock(_LONGEST_NOTE_S)
                if clock.read() > timeout_s:
                    break
            up.cancel()
            dead.cancel()
        if slot.up.is_set():
            took = time.monotonic() - started
            _log.info("instance %d is up after %.1f s", slot.instance_id, took)
            return
        await self._kill(process)
        self._forget(slot, slot.killed_because or "it did not come up")
        what = f"was not ready after start_timeout_s={timeout_s:g}"
        if not dead.cancelled():
            what = describe_exit(dead.result())
            slot.was_shot = dead.result() < 0 and slot.killed_because is None
        raise start_error(slot, process, what, self._specs.cause_beside(slot))

    def _forget(self, slot: Slot, why: str) -> None:
        """An incarnation is over: nothing is sent to it, or heard of it, any more."""
        slot.is_gone(why)
        slot.node.forget(slot.identity)
        self._by_identity.pop(slot.identity, None)

    async def _spawn(self, slot: Slot) -> Process:
        if slot.incarnation:
            self._num_restarts[slot.instance_id] = slot.incarnation
        slot.begin_incarnation()
        self._by_identity[slot.identity] = slot
        line = self._specs.line_for(slot)
        try:
            slot.process = await slot.node.start(
                slot.identity, slot.name, line, slot.launch.env
            )
        except InstanceStartError as error:
            self._forget(slot, str(error))
            raise
        return slot.process

    async def _keep_up(self, slot: Slot) -> None:
        """Wait for the process's death, again and again."""
        while True:
            process = slot.process
            assert process is not None
            status = await self._death_of(slot, process)
            if status is not None:
                await self._kill(process)  # the rest of its process group
            if (gone := slot.node.lost_because) is not None:
                self._forget(slot, gone)
                self._owner.instance_left(slot.instance_id, gone)
                return
            hint = "" if self._config.log_dir else "; EngineConfig.log_dir keeps it"
            why = death(slot, process, status, hint)
            if status is None:
                self._undead.append(process)
                why += f"; it was killed, and lives on {_LONGEST_DEATH_S:g} s later"
            self._forget(slot, why)
            _log.warning("instance %d is lost: %s", slot.instance_id, why)
            self._last_died_on = slot.restarts
            self._owner.instance_down(slot.instance_id, why)
            self._tell_if_weights_are_needed(why)
            if not await self._restart(slot, why):
                return

    async def _death_of(self, slot: Slot, process: Process) -> int | None:
        """Wait for a process's end; its exit status, or None if it cannot be killed.

        One that a driver holds up is not waited for: its requests go on elsewhere.
        """
        async with asyncio.TaskGroup() as tasks:
            ended = tasks.create_task(process.wait())
            killed = tasks.create_task(slot.killed.wait())
            await asyncio.wait((ended, killed), return_when=asyncio.FIRST_COMPLETED)
            await wait_awake(ended, _LONGEST_DEATH_S)
            killed.cancel()
            ended.cancel()
        return None if ended.cancelled() else ended.result()

    async def _kill(self, process: Process, timeout_s: float | None = None) -> None:
        """End a process with all that it started, unless it cannot be killed."""
        try:
            async with waking_timeout(timeout_s or _LONGEST_DEATH_S):
                await process.end(0)
        except TimeoutError:
            _log.error("a process was killed and lives on; what it has stays taken")
            self._undead.append(process)

    async def _restart(self, slot: Slot, why: str) -> bool:
        """Start a dead instance again; False once no instance can be any more."""
        patient_until = self._clock.read() + _MEMORY_PATIENCE_S
        while True:
            await self._may_start.wait()
            if not (slot.is_replaced or slot.restarts.spend()):
                if not await self._wait_for_forgiveness(slot, why):
                    return False
                continue
            slot.is_replaced = False
            try:
                await self._bring_up(slot)
            except InstanceStartError as error:
                if slot.node.lost_because is not None:
                    return False
                why = str(error)
                _log.warning("%s", error)
                if lacks_device_memory(why) and self._clock.read() < patient_until:
                    slot.is_replaced = True  # the next start is free
                    await asyncio.sleep(_MEMORY_PAUSE_S)
                else:
                    await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            return True

    async def _wait_for_forgiveness(self, slot: Slot, why: str) -> bool:
        """Wait until a restart can be paid for; False if it never will be."""
        slot.given_up = True
        limit = f"max_restarts={self._config.max_restarts}"
        if self._is_exhausted and not self._may_grow:
            self._forgiven.set()
            self._owner.instances_exhausted(
                f"every instance is lost and {limit} are used up; the last one: {why}"
            )
            return False
        _log.error(
            "instance %d is not started again: %s are used up", slot.instance_id, limit
        )
        self._forgiven.clear()
        await self._forgiven.wait()
        if self._is_exhausted and not self._may_grow:
            return False
        slot.given_up = False
        return True

    @property
    def _is_exhausted(self) -> bool:
        """Whether no instance will be up again, unless a node joins."""
        return all(slot.given_up for slot in self._slots.values())

    def _watch_for_nodes(self, now: float) -> None:
        """Tell when no instance is left, and no node has come for as long as one may
        take.
        """
        if not self._is_exhausted:
            self._exhausted_at = None
        elif self._exhausted_at is None:
            self._exhausted_at = now
            _log.warning("no instance is left; waiting for a node to join")
        elif now - self._exhausted_at > self._config.start_timeout_s:
            self._exhausted_at = float("inf")  # it is told once
            limit = f"start_timeout_s={self._config.start_timeout_s:g}"
            self._owner.instances_exhausted(
                f"every instance is lost, and no node has joined for {limit}"
            )

    async def _watch(self) -> None:
        """Kill what is silent or stuck; its death is then handled like any other."""
        while True:
            await asyncio.sleep(self._watch_interval_s)
            now = self._clock.read()
            for slot in self._slots.values():
                why = slot.why_dead(now, self._config, self._watch_interval_s)
                if why:
                    slot.kill(why)
            if self._may_grow:
                self._watch_for_nodes(now)
