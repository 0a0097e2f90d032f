"""Processes and connections of a cluster fail at random; what that costs is counted.

A trainer with a journal and one instance of its own, and nodes behind proxies, with an
instance each, do rollouts. Meanwhile each of them, what runs below them, and the
connections are killed, stopped, cut and slowed down, and the journals' disk is filled,
at moments that a seed decides. Tokens are a function of the prompt, so every response
must be what an undisturbed run generates, once a rollout.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil

import aseer
from aseer.kv.process import MODULE
from aseer.node.cleanup import SHARED_MEMORY
from tests.integration.chaos_trainer import config_for, digest, groups
from tests.integration.marked import is_marked, left_behind, own_environment
from tests.integration.nodes import ROOT, NodeProcess, Nodes, free_port
from tests.integration.proxy import Proxy, proxy_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.integration.chaos_settings import Outcome, Settings

_MODULE = "tests.integration.chaos_trainer"
_SLOW_BYTES_PER_S = 200_000
_DISK_BYTES = 32 << 20
_HOW = {
    "node": ("kill", "stop", "end"),
    "link": ("cut", "reset", "slow"),
    "disk": ("full",),
}
_PAUSES = ("cut", "stop", "full")
# A node that is told to end before it can listen dies of the signal.
_ORDERLY = {0, -signal.SIGTERM}


class _Trainer:
    """The trainer over all its lives."""

    def __init__(self, told: dict[str, Any], chaos: _Chaos, log: Path) -> None:
        self._told = json.dumps(told)
        self._chaos = chaos
        self._log = log
        self._process: asyncio.subprocess.Process
        self._was_killed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        self._was_killed = False
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", _MODULE, self._told),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )

    async def roll(self, number: int) -> dict[str, str]:
        """A whole rollout, in as many lives as it takes; digests by request."""
        while True:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{number}\n".encode())
            found: dict[str, str] = {}
            async for said in self._said():
                if "over" in said:
                    return found
                self._chaos.take(number, said, found)
            status = await self._process.wait()
            if not self._was_killed:
                self._chaos.outcome.num_crashed += 1
                words = self._log.read_text()[-500:]
                self._chaos.note(f"the trainer ended with status {status}: {words}")
            self._chaos.note_up([])
            await self.start()

    async def watch(self) -> None:
        """Hear what is up after the last rollout, until its end."""
        async for _ in self._said():
            pass

    async def close(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await self._process.wait()

    def kill(self) -> None:
        self._was_killed = True
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _said(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, but for what is up."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "up" in said:
                self._chaos.note_up(said["up"])
            else:
                yield said


class _Chaos:
    """One seed's run."""

    def __init__(
        self,
        seed: int,
        settings: Settings,
        expected: dict[str, str],
        outcome: Outcome,
        folder: Path,
    ) -> None:
        self._seed = seed
        self._rng = random.Random(seed)
        self._settings = settings
        self._expected = expected
        self.outcome = outcome
        self._nodes = Nodes(folder, free_port())
        self._proxies: list[Proxy] = []
        self._running: dict[int, NodeProcess] = {}
        self._names: dict[int, str] = {}
        self._leaving: list[NodeProcess] = []
        self._seen: dict[tuple[int, str], str] = {}
        self._hurt: list[tuple[str, float, bool]] = []
        self._up: list[int] = []
        self._is_whole = asyncio.Event()
        self._journals = folder / "journals"
        self._trainer = _Trainer(self._told(), self, folder / "trainer.txt")

    def _told(self) -> dict[str, Any]:
        settings = self._settings
        engine = settings.engine | {
            "num_instances": 1,
            "listen": self._nodes.address,
            "key_file": str(self._nodes.key_file()),
            "journal_dir": str(self._journals),
            "node_timeout_s": settings.node_timeout_s,
            "heartbeat_timeout_s": settings.heartbeat_timeout_s,
            "max_restarts": 1000,
            "max_request_retries": 1000,
        }
        return {
            "engine": engine,
            "num_groups": settings.num_groups,
            "max_tokens": settings.max_tokens,
        }

    def note(self, what: str) -> None:
        self.outcome.notes.append(f"seed {self._seed}: {what}")

    def note_up(self, up: list[tuple[str, int]]) -> None:
        """Instances that are up: node, or "" for the trainer's host, and process."""
        self._up = [pid for _, pid in up]
        nodes = [node for node, _ in up]
        if sorted(nodes) != sorted(["", *self._names.values()]):
            self._is_whole.clear()
            self._hurt = [(kind, at, True) for kind, at, _ in self._hurt]
            return
        self._is_whole.set()
        for kind, at, was_felt in self._hurt:
            if was_felt:
                self.outcome.recovery_s[kind].append(time.monotonic() - at)
        self._hurt = [each for each in self._hurt if not each[2]]

    def take(self, number: int, said: dict[str, Any], found: dict[str, str]) -> None:
        """A response of a rollout."""
        name, made = said["id"], said["digest"]
        self.outcome.num_responses += 1
        if name in found:
            self.outcome.num_doubled += 1
            self.note(f"{name} of rollout {number} came twice")
        found[name] = made
        before = self._seen.setdefault((number, name), made)
        if said["error"] is not None or {before, made} != {self._expected.get(name)}:
            self.outcome.num_changed += 1
            self.note(f"{name} of rollout {number} is another: {said['error']}")

    async def run(self) -> None:
        settings = self._settings
        async with AsyncExitStack() as stack:
            for which in range(settings.num_nodes):
                proxy = await stack.enter_async_context(proxy_to(self._nodes.port))
                self._proxies.append(proxy)
                self._start_node(which)
            await self._trainer.start()
            try:
                await self._roll_and_fail()
                await self._end()
            except* TimeoutError:
                self.outcome.num_hung += 1
                self.note("a rollout, or its end, hangs")
            finally:
                self._nodes.end()
                self._trainer.kill()

    async def _roll_and_fail(self) -> None:
        number = 0
        async with asyncio.TaskGroup() as tasks:
            failing = tasks.create_task(self._fail())
            is_last = False
            while not is_last:
                is_last = failing.done()  # one more after the last fault
                async with asyncio.timeout(self._settings.hang_s):
                    found = await self._trainer.roll(number)
                number += 1
                self.outcome.num_rollouts += 1
                missing = self._expected.keys() - found.keys()
                self.outcome.num_lost += len(missing)
                if missing:
                    self.note(f"rollout {number} lacks {sorted(missing)}")

    async def _end(self) -> None:
        """All is well again, and ends in order."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._trainer.watch())
            try:
                async with asyncio.timeout(self._settings.start_s):
                    await self._is_whole.wait()
            except TimeoutError:
                self.outcome.num_hung += 1
                self.note("not all instances came up again")
            async with asyncio.timeout(self._settings.hang_s):
                statuses = [await self._trainer.close()]
        for node in (*self._running.values(), *self._leaving):
            try:
                statuses.append(await node.wait(self._settings.start_s))
                if statuses[-1] not in _ORDERLY:
                    self.note(f"a node failed; it said: {node.said[-1500:]}")
            except subprocess.TimeoutExpired:
                self.outcome.num_hung += 1
                self.note(f"a node does not end; it said: {node.said[-500:]}")
        if not set(statuses) <= _ORDERLY:
            self.outcome.num_crashed += 1
            self.note(f"the trainer and the nodes ended with statuses {statuses}")

    def _start_node(self, which: int) -> None:
        name = f"node{which}-{self._seed}-{sum(self.outcome.faults.values())}"
        where = ("--controller", self._proxies[which].endpoint)
        self._names[which] = name
        self._running[which] = self._nodes.start(name, where=where, num_instances=1)
        self._is_whole.clear()

    async def _fail(self) -> None:
        async with asyncio.timeout(self._settings.start_s):
            await self._is_whole.wait()
        for _ in range(self._settings.num_events):
            await asyncio.sleep(self._rng.uniform(0.1, 1.5))
            await self._happen()
        for proxy in self._proxies:
            proxy.heal()

    async def _happen(self) -> None:
        rng = self._rng
        what = rng.choice(self._settings.victims)
        is_long = rng.random() < 0.4
        pause_s = (
            self._settings.long_s if is_long else rng.choice(self._settings.short_s)
        )
        which = rng.randrange(len(self._proxies))
        how = rng.choice(_HOW.get(what, ("kill", "stop", "kill")))
        length = ("-long" if is_long else "-short") if how in _PAUSES else ""
        kind = f"{what}-{how}{length}"
        self.outcome.faults[kind] += 1
        takes_instances = what not in ("pool", "disk")
        if takes_instances and (how in ("kill", "end") or length == "-long"):
            self._hurt.append((kind, time.monotonic(), not length))
        match what:
            case "link":
                await self._fail_link(self._proxies[which], how, pause_s)
            case "trainer":
                await self._fail_trainer(how, pause_s)
            case "node":
                await self._fail_node(which, how, pause_s)
            case "disk":
                await self._fail_disk(pause_s)
            case _:
                await self._fail_process(what, how, pause_s)

    async def _fail_link(self, proxy: Proxy, how: str, pause_s: float) -> None:
        if how == "reset":
            proxy.reset()
            return
        if how == "cut":
            proxy.cut()
        else:
            proxy.slow_down(_SLOW_BYTES_PER_S)
        await asyncio.sleep(pause_s)
        proxy.heal()

    async def _fail_trainer(self, how: str, pause_s: float) -> None:
        if how == "kill":
            self._is_whole.clear()
            self._trainer.kill()
        else:
            await _pause(self._trainer.pid, pause_s)

    async def _fail_node(self, which: int, how: str, pause_s: float) -> None:
        node = self._running[which]
        if how == "stop":
            await _pause(node.pid, pause_s)
            return
        if how == "kill":
            node.kill()
        else:
            node.signal(signal.SIGTERM)
            self._leaving.append(node)
        self._start_node(which)

    async def _fail_disk(self, pause_s: float) -> None:
        """Nothing more can be written where the journals are, for a while."""
        filler = self._journals / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        await asyncio.sleep(pause_s)
        filler.unlink(missing_ok=True)

    async def _fail_process(self, what: str, how: str, pause_s: float) -> None:
        victims = [pid for pid in self._processes(what) if is_marked(pid)]
        if not victims:
            return
        victim = self._rng.choice(victims)
        if how == "kill":
            if what != "pool":
                self._is_whole.clear()
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        else:
            await _pause(victim, pause_s)

    def _processes(self, what: str) -> list[int]:
        """Of that kind, by their ids."""
        if what == "instance":
            return self._up
        above = self._up
        if what == "pool":
            above = [self._trainer.pid, *(node.pid for node in self._running.values())]
        found: list[int] = []
        for pid in above:
            with suppress(psutil.Error):
                for child in psutil.Process(pid).children(recursive=True):
                    if what == "worker" or MODULE[0] in child.cmdline():
                        found.append(child.pid)
        return sorted(found)


async def _pause(pid: int, pause_s: float) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(pause_s)
        os.kill(pid, signal.SIGCONT)


def undisturbed(settings: Settings) -> dict[str, str]:
    """Digests of the responses of a rollout that nothing happens to."""
    work = groups(settings.num_groups, settings.max_tokens)
    config = config_for(settings.engine, num_instances=1, chunk_size=0)
    with aseer.Engine(config) as engine:
        return {r.request_id: digest(r) for r in engine.rollout_sync(work)}


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A disk of its own for a folder, which can be filled; needs root."""
    folder.mkdir()
    options = f"size={_DISK_BYTES}"
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def run_seed(
    seed: int, settings: Settings, expected: dict[str, str], outcome: Outcome
) -> None:
    """Add what a seed's chaos shows to the outcome."""
    shared_before = set(os.listdir(SHARED_MEMORY))
    with own_environment() as (folder, mark), ExitStack() as stack:
        if "disk" in settings.victims:
            stack.enter_context(_small_disk(folder / "journals"))
        chaos = _Chaos(seed, settings, expected, outcome, folder)
        await chaos.run()
        for what in await asyncio.to_thread(left_behind, folder, mark, shared_before):
            outcome.num_left_behind += 1
            chaos.note(f"left behind: {what}")
