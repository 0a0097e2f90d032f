"""The instances of one engine: started together, watched, restarted, stopped.

Their owner hears of three things, in order and on the event loop: an instance is up, it
reported, it is down. A process that exits, that is silent for `heartbeat_timeout_s`, or
that has work but makes no token for `stall_timeout_s` is down; it is killed with its
whole process group and started again, as often as `RestartBudget` allows.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from typing import TYPE_CHECKING, Any, Protocol

from aseer.errors import EngineError, InstanceLostError, InstanceStartError
from aseer.instance.base import InstanceSpec
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
from aseer.runtime.process import InstanceProcess, describe_exit
from aseer.runtime.restarts import RestartBudget
from aseer.runtime.slot import Slot
from aseer.transport.base import PROTOCOL_VERSION
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from pathlib import Path

    from aseer.config import EngineConfig
    from aseer.dgds.messages import DraftingSpec
    from aseer.instance.messages import Question
    from aseer.kv.pool import KvPool
    from aseer.node.leftovers import Leftovers
    from aseer.node.machine import Launch
    from aseer.transport.base import Router
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

    def instances_exhausted(self, why: str) -> None:
        """None is up, and none will come back."""


class InstancePool:
    """Starts and supervises the instances."""

    def __init__(
        self,
        config: EngineConfig,
        launches: list[Launch],
        router: Router[FromInstance],
        endpoint: str,
        leftovers: Leftovers,
        log_dir: Path,
        owner: PoolOwner,
        drafting: DraftingSpec | None = None,
        kv_pool: KvPool | None = None,
    ) -> None:
        self._config = config
        self._router = router
        self._endpoint = endpoint
        self._leftovers = leftovers
        self._log_dir = log_dir
        self._owner = owner
        self._drafting = drafting
        self._kv_pool = kv_pool
        self._kv_namespace = kv_pool.namespace if kv_pool else secrets.token_hex(4)
        silence_s = config.heartbeat_timeout_s / _LOOKS_A_HEARTBEAT
        self._watch_interval_s = min(_WATCH_INTERVAL_S, silence_s)
        self._clock = WakingClock(2 * self._watch_interval_s)
        self._slots = [Slot(launch, log_dir, self._clock) for launch in launches]
        self._by_identity: dict[bytes, Slot] = {}
        self._restarts = RestartBudget(config.max_restarts)
        self._forgiven = asyncio.Event()
        seed = secrets.randbits(31) if config.seed is None else config.seed
        self._seeds = random.Random(seed)
        self._num_asked = 0
        self._may_start = asyncio.Event()
        self._may_start.set()
        self.weights: str | None = None  # index of what a new instance must load first

    def num_restarts(self, instance_id: InstanceId) -> int:
        """Times the instance was started again."""
        return max(0, self._slots[instance_id].incarnation - 1)

    def run_chunk(self, instance_id: InstanceId, message: Run) -> None:
        """Send an instance a chunk."""
        slot = self._slots[instance_id]
        if not slot.running:
            slot.last_progress = self._clock.read()
        slot.running.add(message.chunk.chunk_id)
        self._router.send(slot.identity, message)

    def abort_chunks(self, instance_id: InstanceId, chunk_ids: list[ChunkId]) -> None:
        """Ask an instance to end chunks."""
        self._router.send(self._slots[instance_id].identity, AbortChunks(chunk_ids))

    def abort_all(self) -> None:
        """Ask every instance to end what it runs, whoever it is for."""
        for slot in self._slots:
            if slot.running:
                self._router.send(slot.identity, AbortChunks(list(slot.running)))

    @property
    def is_idle(self) -> bool:
        """Whether no instance runs a chunk."""
        return not any(slot.running for slot in self._slots)

    def ask(
        self, instance_id: InstanceId, what: Question, **arguments: Any
    ) -> asyncio.Future[Any]:
        """Call a method of an instance's backend, after those asked for before.

        The future raises EngineError if the method did; InstanceLostError if the
        instance died, or is down already. An instance that answers nothing for
        `start_timeout_s` is killed.
        """
        slot = self._slots[instance_id]
        self._num_asked += 1
        ask_id = self._num_asked
        asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not slot.said_hello.is_set():
            asked.set_exception(InstanceLostError(f"instance {instance_id} is down"))
            asked.exception()  # whoever asked may not wait for it
            return asked
        slot.asked[ask_id] = asked
        if len(slot.asked) == 1:
            slot.last_answer = self._clock.read()
        self._router.send(slot.identity, Ask(ask_id, what, arguments))
        return asked

    def forgive(self, num_deaths: int) -> None:
        """A request is blamed for so many deaths, the last of which just happened."""
        if self._restarts.forgive(num_deaths):
            self._forgiven.set()

    async def start(self) -> None:
        """Start every instance, in parallel, and wait until all are up.

        Raises:
            InstanceStartError: one did not come up; the others are ended first.
        """
        async with asyncio.TaskGroup() as tasks:
            for slot in self._slots:
                tasks.create_task(self._bring_up(slot))

    async def supervise(self) -> None:
        """Watch the instances, and start dead ones again, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            for slot in self._slots:
                tasks.create_task(self._keep_up(slot))

    async def stop(self, grace_s: float) -> None:
        """End every instance: ask those that are up, wait up to `grace_s`, kill.

        Supervision must have ended. May be called again.
        """
        async with asyncio.TaskGroup() as tasks:
            for slot in self._slots:
                if slot.up.is_set() and grace_s:
                    self._router.send(slot.identity, Stop())
                    tasks.create_task(self._end(slot, grace_s))
                else:
                    tasks.create_task(self._end(slot, 0))

    async def _end(self, slot: Slot, grace_s: float) -> None:
        if slot.process is not None:
            await slot.process.end(grace_s)
        self._forget(slot, "the engine was closed")  # what it was asked, too

    def replace(self, instance_id: InstanceId, why: str) -> None:
        """Kill an instance for no fault of its own; it is started again for free."""
        self._slots[instance_id].is_replaced = True
        self._slots[instance_id].kill(why)

    def hold_starts(self) -> None:
        """Start no instance again until `allow_starts`."""
        self._may_start.clear()

    def allow_starts(self) -> None:
        """Start again what is dead, now and from now on."""
        self._may_start.set()

    def kill_busy(self, why: str) -> None:
        """Kill the instances that run chunks; they are started again like any other."""
        for slot in self._slots:
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
                    self._restarts.worked()
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
        slot.info = info
        slot.said_hello.set()

    async def _get_ready(self, slot: Slot) -> None:
        """Wait for its hello, and let it load the current weights before it works."""
        await slot.said_hello.wait()
        loaded = None
        while loaded != self.weights:  # they may change meanwhile
            loaded = self.weights
            try:
                if loaded is None:
                    slot.is_replaced = True  # it cannot go back, and is not at fault
                    raise EngineError("the weights it had just loaded were taken back")
                await self.ask(slot.instance_id, "prepare_weights", index=loaded)
                await self.ask(slot.instance_id, "commit_weights")
            except EngineError as error:
                if loaded == self.weights:
                    slot.failure = str(error)
                    slot.kill(slot.failure)
                    return
        assert slot.info is not None
        slot.up.set()
        self._owner.instance_up(slot.info)

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
                if clock.read() > timeout_s:
                    break
            up.cancel()
            dead.cancel()
        if slot.up.is_set():
            took = time.monotonic() - started
            _log.info("instance %d is up after %.1f s", slot.instance_id, took)
            return
        await process.end(0)
        self._forget(slot, "it did not come up")
        what = f"was not ready after start_timeout_s={timeout_s:g}"
        if not dead.cancelled():
            what = describe_exit(dead.result())
        raise self._start_error(slot, process, what)

    def _forget(self, slot: Slot, why: str) -> None:
        """An incarnation is over: nothing is sent to it, or heard of it, any more."""
        slot.is_gone(why)
        self._router.forget(slot.identity)
        self._by_identity.pop(slot.identity, None)

    async def _spawn(self, slot: Slot) -> InstanceProcess:
        slot.begin_incarnation()
        self._by_identity[slot.identity] = slot
        launch = slot.launch
        args: dict[str, Any] = dict(launch.engine_args)
        if launch.backend == "vllm":
            args["seed"] = self._seeds.getrandbits(31)
        if self._kv_pool is not None:
            args |= self._kv_pool.engine_args(slot.instance_id)
        spec = InstanceSpec(
            endpoint=self._endpoint,
            identity=slot.identity.decode(),
            instance_id=slot.instance_id,
            backend=launch.backend,
            report_interval_s=self._config.report_interval_s,
            engine_args=args,
            cores=launch.cores,
            drafting=self._drafting,
            kv_namespace=self._kv_namespace,
        )
        # vLLM leaves its sockets lying where it makes them: in a folder that we remove.
        left = self._leftovers
        env = {"VLLM_RPC_BASE_PATH": str(left.run_dir), **launch.env}
        try:
            slot.process = await InstanceProcess.start(
                spec, env, slot.log_path, left, launch.interpreter
            )
        except InstanceStartError as error:
            self._forget(slot, str(error))
            raise
        return slot.process

    def _start_error(
        self, slot: Slot, process: InstanceProcess, what: str
    ) -> InstanceStartError:
        own = self._own_cause(slot, process) or slot.killed_because or process.cause()
        cause = f"; cause: {own}" if own else ""
        if own and "LMCache" in own and self._kv_pool is not None:
            # A server that fails in a call logs why, and does not answer.
            cause += self._kv_pool.cause(slot.instance_id)
        return InstanceStartError(
            f"instance {slot.instance_id} ({slot.launch.share}) {what}{cause}\n"
            f"last lines of its log:\n{process.log_tail()}"
        )

    def _own_cause(self, slot: Slot, process: InstanceProcess) -> str | None:
        """What the instance said of its end, from its log if it only points there."""
        own = slot.failure
        if own is not None and "root cause" in own:
            own = process.cause() or own
        return own

    def _death(self, slot: Slot, process: InstanceProcess, status: int) -> str:
        """Why an instance is gone, and where to read on."""
        own = self._own_cause(slot, process)
        why = own or slot.killed_because or describe_exit(status)
        hint = "" if self._config.log_dir else "; EngineConfig.log_dir keeps it"
        return f"{why} (its log: {slot.log_path}{hint})"

    async def _keep_up(self, slot: Slot) -> None:
        """Wait for the process's death, again and again."""
        while True:
            process = slot.process
            assert process is not None
            status = await process.wait()
            await process.end(0)  # the rest of its process group
            why = self._death(slot, process, status)
            self._forget(slot, why)
            _log.warning("instance %d is lost: %s", slot.instance_id, why)
            self._owner.instance_down(slot.instance_id, why)
            if not await self._restart(slot, why):
                return

    async def _restart(self, slot: Slot, why: str) -> bool:
        """Start a dead instance again; False once no instance can be any more."""
        while True:
            await self._may_start.wait()
            if not (slot.is_replaced or self._restarts.spend()):
                if not await self._wait_for_forgiveness(slot, why):
                    return False
                continue
            slot.is_replaced = False
            try:
                await self._bring_up(slot)
            except InstanceStartError as error:
                why = str(error)
                _log.warning("%s", error)
                await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            return True

    async def _wait_for_forgiveness(self, slot: Slot, why: str) -> bool:
        """Wait until a restart can be paid for; False if it never will be."""
        slot.given_up = True
        limit = f"max_restarts={self._config.max_restarts}"
        if all(s.given_up for s in self._slots):
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
        if all(s.given_up for s in self._slots):
            return False
        slot.given_up = False
        return True

    async def _watch(self) -> None:
        """Kill what is silent or stuck; its death is then handled like any other."""
        config = self._config
        while True:
            await asyncio.sleep(self._watch_interval_s)
            now = self._clock.read()
            for slot in self._slots:
                if not slot.up.is_set():
                    continue
                silent = now - slot.last_heard
                stuck = now - slot.last_progress if slot.running else 0.0
                mute = now - slot.last_answer if slot.asked else 0.0
                since = slot.unreachable_since
                gone = 0.0 if since is None else now - since
                if silent > config.heartbeat_timeout_s:
                    slot.kill(f"it was silent for {silent:.0f} s")
                elif stuck > config.stall_timeout_s:
                    slot.kill(f"it made no token for {stuck:.0f} s")
                elif mute > config.start_timeout_s:
                    slot.kill(f"it left a question unanswered for {mute:.0f} s")
                elif gone > self._watch_interval_s:  # and not for being dead
                    slot.kill("its connection broke, and what was sent to it is lost")
