"""The processes of instances: started together, watched, started again, ended.

A process that exits, that is silent for `heartbeat_timeout_s`, or that has work but
makes no token for `stall_timeout_s` is dead: it is killed with its whole process group
and started again, as often as its node's `RestartBudget` allows. Those of a team start
and end together (`aseer.runtime.team`). What is said to instances and heard from them
is `aseer.runtime.instances`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aseer.errors import InstanceStartError, describe
from aseer.instance.messages import Stop
from aseer.node.children import LONGEST_DEATH_S
from aseer.runtime.causes import death, how_it_ended, start_error
from aseer.runtime.deaths import Deaths
from aseer.runtime.exhaustion import Exhaustion
from aseer.runtime.restarts import RestartBudget, lacks_device_memory
from aseer.runtime.slot import Slot, Slots
from aseer.runtime.team import Team
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from aseer.config import EngineConfig
    from aseer.node.base import Node, Process
    from aseer.node.machine import Launch
    from aseer.runtime.instances import PoolOwner
    from aseer.runtime.specs import Specs
    from aseer.types import InstanceId

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
# Counts between two looks at a start; reading a busy machine's /proc takes some of it.
_LONGEST_NOTE_S = 5.0


class Supervisor:
    """Keeps the processes of instances up."""

    def __init__(
        self,
        config: EngineConfig,
        specs: Specs,
        owner: PoolOwner,
        get_ready: Callable[[Slot], Coroutine[Any, Any, None]],
        on_death: Callable[[InstanceId, str, list[InstanceId]], None],
    ) -> None:
        """There are no instances yet; see `add_own` and `attend`.

        Args:
            get_ready: returns once an instance takes work, or cannot.
            on_death: is told which instance died, why, and which ones with it.
        """
        self._config = config
        self._specs = specs
        self._owner = owner
        self._get_ready = get_ready
        self._on_death = on_death
        silence_s = config.heartbeat_timeout_s / _LOOKS_A_HEARTBEAT
        self._watch_interval_s = min(_WATCH_INTERVAL_S, silence_s)
        self.clock = WakingClock(2 * self._watch_interval_s)
        self.slots = Slots()
        self._exhaustion = Exhaustion(config, self.slots, owner)
        self._own: list[Slot] = []  # of this machine
        self._num_launched = 0  # ids are never used again
        self._num_restarts: dict[InstanceId, int] = {}
        self._deaths = Deaths()
        self._forgiven = asyncio.Event()
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._last_died_on = RestartBudget(config.max_restarts)

    def add_own(self, node: Node, launches: list[Launch]) -> None:
        """Have instances on this machine."""
        size = self._config.data_parallel_size
        for i in range(0, len(launches), size):
            members = [(node, launch) for launch in launches[i : i + size]]
            team = Team(members) if size > 1 else None
            self._own += self._add(members, self._last_died_on, team)

    def _add(
        self,
        members: Sequence[tuple[Node, Launch]],
        restarts: RestartBudget,
        team: Team | None,
    ) -> list[Slot]:
        slots = [
            Slot(replace(launch, instance_id=i), node, restarts, self.clock, team)
            for i, (node, launch) in enumerate(members, self._num_launched)
        ]
        self._num_launched += len(slots)
        self.slots |= {slot.instance_id: slot for slot in slots}
        return slots

    def num_restarts(self, instance_id: InstanceId) -> int:
        """Times the instance was started again."""
        return self._num_restarts.get(instance_id, 0)

    def forgive(self, num_deaths: int) -> None:
        """A request is blamed for so many deaths, the last of which just happened."""
        if self._last_died_on.forgive(num_deaths):
            self._forgiven.set()

    def hold_starts(self) -> None:
        """Start no instance again until `allow_starts`."""
        self._may_start.clear()

    def allow_starts(self) -> None:
        """Start again what is dead, now and from now on."""
        self._may_start.set()

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
        members = [(node, launch) for launch in launches]
        await self._attend_all(members, f"its node {node.name} is not used")

    async def attend_team(self, team: Team) -> None:
        """As `attend`, of instances on one node or more that compute together."""
        await self._attend_all(team.members, f"{team.names} are not used", team)

    async def _attend_all(
        self,
        members: Sequence[tuple[Node, Launch]],
        unused: str,
        team: Team | None = None,
    ) -> None:
        slots = self._add(members, RestartBudget(self._config.max_restarts), team)
        try:
            async with asyncio.TaskGroup() as tasks:
                for slot in slots:
                    tasks.create_task(self._attend(slot))
        except asyncio.CancelledError:
            raise  # `stop` ends them, with all others
        except BaseException as error:
            self._leave(slots, f"{unused}: {describe(error)}")
            await self._end_all(slots, 0)
            self._drop(slots)
            raise
        self._drop(slots)

    async def _attend(self, slot: Slot) -> None:
        while True:
            try:
                await self._bring_up(slot)
            except InstanceStartError as error:
                if slot.lost_because is not None:
                    return
                # The system's own doing says nothing about the node.
                is_shot = slot.was_shot and slot.restarts.spend()
                if not (is_shot or slot.was_felled):
                    raise
                _log.warning("%s", error)
                await asyncio.sleep(_RETRY_PAUSE_S)
            else:
                await self._keep_up(slot)
                return

    def _leave(self, slots: list[Slot], why: str) -> None:
        """Tell of those that are up that nothing runs there any more."""
        for slot in slots:
            if slot.up.is_set():
                slot.is_gone(why)
                self._owner.instance_left(slot.instance_id, why)

    def _drop(self, slots: list[Slot]) -> None:
        for slot in slots:
            del self.slots[slot.instance_id]

    async def stop(self, grace_s: float) -> None:
        """End every instance: ask those that are up, wait up to `grace_s`, kill.

        Supervision must have ended. May be called again.
        """
        await self._end_all(list(self.slots.values()), grace_s)
        await self._deaths.look_again()

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
        self.slots.forget(slot, "the engine was closed")  # what it was asked, too

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
        await self._deaths.kill(process)
        self.slots.forget(slot, slot.killed_because or "it did not come up")
        what = f"was not ready after start_timeout_s={timeout_s:g}"
        if not dead.cancelled():
            what = how_it_ended(process, dead.result())
            slot.was_shot = dead.result() < 0 and slot.killed_because is None
        if slot.team is not None:
            await slot.team.fall(slot)
        raise start_error(slot, process, what, self._specs.cause_beside(slot))

    async def _spawn(self, slot: Slot) -> Process:
        if slot.incarnation:
            self._num_restarts[slot.instance_id] = slot.incarnation
        self.slots.begin_incarnation(slot)
        told: Mapping[str, Any] = {}
        env = slot.launch.env
        try:
            if slot.team is not None:
                told, env = await slot.team.gather(slot)
            line = self._specs.line_for(slot, told)
            slot.process = await slot.node.start(slot.identity, slot.name, line, env)
        except InstanceStartError as error:
            self.slots.forget(slot, str(error))
            if slot.team is not None:
                await slot.team.fall(slot)
            raise
        if slot.team is not None:
            slot.team.end_if_felled(slot)
        return slot.process

    async def _keep_up(self, slot: Slot) -> None:
        """Wait for the process's death, again and again."""
        while True:
            process = slot.process
            assert process is not None
            status = await self._deaths.of(slot, process)
            if slot.team is not None:
                await slot.team.fall(slot)
            if (gone := slot.lost_because) is not None:
                self.slots.forget(slot, gone)
                self._owner.instance_left(slot.instance_id, gone)
                return
            why = self._tell_of_death(slot, process, status)
            if not await self._restart(slot, why):
                return

    def _tell_of_death(self, slot: Slot, process: Process, status: int | None) -> str:
        """Tell of an instance's end, and of its partners', and log why it was."""
        hint = "" if self._config.log_dir else "; EngineConfig.log_dir keeps it"
        why = death(slot, process, status, hint)
        if status is None:
            why += f"; it was killed, and lives on {LONGEST_DEATH_S:g} s later"
        self.slots.forget(slot, why)
        if slot.was_felled:  # its end was told with the first one's
            slot.is_replaced = True
            return why
        _log.warning("instance %d is lost: %s", slot.instance_id, why)
        self._last_died_on = slot.restarts
        partners = [] if slot.team is None else slot.team.partners_up(slot)
        for each in partners:
            self.slots.forget(each, why)
        self._on_death(slot.instance_id, why, [each.instance_id for each in partners])
        return why

    async def _restart(self, slot: Slot, why: str) -> bool:
        """Start a dead instance again; False once no instance can be any more."""
        patient_until = self.clock.read() + _MEMORY_PATIENCE_S
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
                if slot.lost_because is not None:
                    return False
                why = str(error)
                slot.is_replaced |= slot.was_felled
                _log.log(
                    logging.INFO if slot.was_felled else logging.WARNING, "%s", why
                )
                if lacks_device_memory(why) and self.clock.read() < patient_until:
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
        if self._exhaustion.is_final():
            self._forgiven.set()
            self._exhaustion.tell(f"{limit} are used up; the last one: {why}")
            return False
        _log.error(
            "instance %d is not started again: %s are used up", slot.instance_id, limit
        )
        self._forgiven.clear()
        await self._forgiven.wait()
        if self._exhaustion.is_final():
            return False
        slot.given_up = False
        return True

    async def _watch(self) -> None:
        """Kill what is silent or stuck; its death is then handled like any other."""
        while True:
            await asyncio.sleep(self._watch_interval_s)
            now = self.clock.read()
            for slot in self.slots.values():
                why = slot.why_dead(now, self._config, self._watch_interval_s)
                if why:
                    slot.kill(why)
            self._exhaustion.look(now)
