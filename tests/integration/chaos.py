"""Processes and connections of a cluster fail at random; what that costs is counted.

A trainer with a journal and one instance of its own, and nodes behind proxies, with an
instance each, or one over two of them, do rollouts, each with new weights. Meanwhile
each of them, what runs below them, and the connections are killed, stopped, cut and
slowed down, and the journals' disk and hosts' /dev/shm are filled, at moments that a
seed decides. Tokens are a function of the prompt and the weights, so every response
must be what an undisturbed run generates with the weights that it names, once a
rollout. Some rollouts are cut short by an update; what they have then must be the
beginning of that.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

import aseer
from aseer.kv.process import MODULE
from tests.integration.chaos_trainer import BASE, config_for, digest, groups, weights
from tests.integration.counted import counts_file
from tests.integration.marked import is_marked, left_behind, own_environment
from tests.integration.nodes import ROOT, NodeProcess, Nodes, free_port
from tests.integration.own_shm import OwnShm
from tests.integration.proxy import Proxy, proxy_to
from tests.integration.watched import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.integration.chaos_settings import Outcome, Settings

_MODULE = "tests.integration.chaos_trainer"
_SLOW_BYTES_PER_S = 200_000
_DISK_BYTES = 32 << 20
_EBB_S = 0.03
_SAMPLE_S = 10.0
# Of a rollout that an update cuts short, as one of every four.
_CUT_SHORT = 3
_HOW = {
    "node": ("kill", "stop", "end"),
    "link": ("cut", "reset", "slow"),
    "disk": ("full",),
    "shm": ("full", "ebb"),
}
_PAUSES = ("cut", "stop", "full", "ebb")
# Without them no instance is missed.
_NEEDLESS = ("pool", "disk", "shm")
# A node that is told to end before it can listen dies of the signal.
_ORDERLY = {0, -signal.SIGTERM}


class Made(NamedTuple):
    """What an undisturbed run generates of a request."""

    digest: str
    tokens: list[int]


#: By the weights (`BASE` and those that are numbered), and the request.
Expected = dict[int, dict[str, Made]]


class _Work:
    """What rollout a number stands for. An odd version is that of a whole rollout."""

    def __init__(self, settings: Settings) -> None:
        self._num = settings.num_weights

    def line(self, number: int) -> str:
        """What the trainer is told."""
        version = self.version(number)
        following = None
        if number % 4 == _CUT_SHORT:
            following = self.which(version + 1)
        return json.dumps([number, self.which(version), version, following])

    def version(self, number: int) -> int:
        return 2 * number + 1

    def which(self, version: int) -> int:
        """The weights that a version stands for."""
        return BASE if version == 0 else (version // 2) % self._num


class _Trainer:
    """The trainer over all its lives."""

    def __init__(
        self, told: dict[str, Any], chaos: _Chaos, log: Path, prefix: tuple[str, ...]
    ) -> None:
        self._told = json.dumps(told)
        self._prefix = prefix
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
                *(*self._prefix, sys.executable, "-m", _MODULE, self._told),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )

    async def roll(self, number: int, line: str) -> set[str]:
        """A whole rollout, in as many lives as it takes; its requests."""
        while True:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{line}\n".encode())
            found: set[str] = set()
            async for said in self._said():
                if "over" in said:
                    return found
                if "id" in said:
                    self._chaos.take(number, said, found)
                else:
                    self._chaos.outcome.take_update(said)
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
        expected: Expected,
        outcome: Outcome,
        folder: Path,
        hosts: list[OwnShm],
    ) -> None:
        """Prepare.

        Args:
            hosts: the trainer's, and those of the nodes.
        """
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
        self._hosts = hosts
        self._work = _Work(settings)
        self._watches: dict[str, Watch] = {}
        self._hurt: list[tuple[str, float, bool]] = []
        self._up: list[int] = []
        self._is_whole = asyncio.Event()
        self._journals = folder / "journals"
        self._trainer = _Trainer(
            self._told(), self, folder / "trainer.txt", hosts[0].prefix
        )

    def _told(self) -> dict[str, Any]:
        settings = self._settings
        engine = settings.engine | {
            "num_instances": settings.num_own,
            "listen": self._nodes.address,
            "weights": "delta" if self._seed % 2 else "full",
            "start_timeout_s": settings.start_s,
            "key_file": str(self._nodes.key_file()),
            "journal_dir": str(self._journals),
            "node_timeout_s": settings.node_timeout_s,
            "heartbeat_timeout_s": settings.heartbeat_timeout_s,
            "max_restarts": 1000,
            "max_request_retries": 1000,
        }
        return {
            "engine": engine,
            "models": settings.models,
            "pools": settings.pools,
            "num_groups": settings.num_groups,
            "max_tokens": settings.max_tokens,
        }

    def note(self, what: str) -> None:
        self.outcome.notes.append(f"seed {self._seed}: {what}")

    def note_up(self, up: list[tuple[str, int]]) -> None:
        """Instances that are up: node, or "" for the trainer's host, and process."""
        self._up = [pid for _, pid in up]
        if not self._are_all(sorted(node for node, _ in up)):
            self._is_whole.clear()
            self._hurt = [(kind, at, True) for kind, at, _ in self._hurt]
            return
        self._is_whole.set()
        for kind, at, was_felt in self._hurt:
            if was_felt:
                self.outcome.recovery_s[kind].append(time.monotonic() - at)
        self._hurt = [each for each in self._hurt if not each[2]]

    def _are_all(self, up: list[str]) -> bool:
        """Whether instances are up wherever they are to be."""
        settings, names = self._settings, self._names.values()
        if settings.nodes_per_instance == 1:
            return up == sorted([*[""] * settings.num_own, *names])
        num_there = len(names) // settings.nodes_per_instance
        return len(up) == num_there and set(up) <= set(names)

    def take(self, number: int, said: dict[str, Any], found: set[str]) -> None:
        """A response of a rollout, or of a look at what an engine has."""
        name, version = said["id"], said["version"]
        self.outcome.num_responses += 1
        if "is_look" not in said:
            if name in found:
                self.outcome.num_doubled += 1
                self.note(f"{name} of rollout {number} came twice")
            found.add(name)
            if version != self._work.version(number):
                self.outcome.num_changed += 1
                self.note(f"{name} of rollout {number} has version {version}")
        made = self._expected[self._work.which(version)][name]
        tokens = said.get("tokens")
        if tokens is not None:
            self.outcome.num_cut_short += 1
            is_right = tokens == made.tokens[: len(tokens)]
            is_right &= "is_look" in said or number % 4 == _CUT_SHORT
        else:
            is_right = said["digest"] == made.digest
        if said["error"] is not None or not is_right:
            self.outcome.num_changed += 1
            self.note(f"{name} of rollout {number} is another: {said['error']}")

    async def run(self, until_s: float | None) -> None:
        """Fail, seed after seed until a moment, or one seed."""
        settings = self._settings
        async with AsyncExitStack() as stack:
            for which in range(settings.num_nodes):
                proxy = await stack.enter_async_context(proxy_to(self._nodes.port))
                self._proxies.append(proxy)
                self._start_node(which)
            await self._trainer.start()
            try:
                await self._roll_and_fail(until_s)
                await self._end()
            except* TimeoutError:
                self.outcome.num_hung += 1
                self.note("a rollout, or its end, hangs")
            finally:
                self._nodes.end()
                self._trainer.kill()

    async def _roll_and_fail(self, until_s: float | None) -> None:
        number = 0
        requests = self._expected[BASE].keys()
        async with asyncio.TaskGroup() as tasks:
            if until_s is None:
                failing = tasks.create_task(self._fail())
            else:
                failing = tasks.create_task(self._fail_until(until_s))
            is_last = False
            while not is_last:
                is_last = failing.done()  # one more after the last fault
                async with asyncio.timeout(self._settings.hang_s):
                    found = await self._trainer.roll(number, self._work.line(number))
                number += 1
                self.outcome.num_rollouts += 1
                missing = requests - found
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
        self._names[which] = name
        self._running[which] = self._nodes.start(
            name,
            where=("--controller", self._proxies[which].endpoint),
            num_instances=1,
            prefix=self._hosts[1 + which].prefix,
            module="tests.integration.counted",
        )
        self._is_whole.clear()

    async def _fail(self) -> None:
        async with asyncio.timeout(self._settings.start_s):
            await self._is_whole.wait()
        for _ in range(self._settings.num_events):
            await asyncio.sleep(self._rng.uniform(0.1, 1.5))
            await self._happen()
        for proxy in self._proxies:
            proxy.heal()

    async def _fail_until(self, until_s: float) -> None:
        """Fail for so long, while it is looked at what processes that last have.

        Between seeds all instances come up again.
        """
        async with asyncio.timeout(self._settings.start_s):
            await self._is_whole.wait()
        self._watch("trainer", self._trainer.pid, self._hosts[0])
        self._watch("node", self._running[0].pid, self._hosts[1])
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self._look())
            while time.monotonic() < until_s:
                self._rng = random.Random(self._seed)
                await self._fail()
                self._seed += 1
                self.outcome.num_seeds += 1
            looking.cancel()
        judged = {name: watch.judged() for name, watch in self._watches.items()}
        self.outcome.watched.update(judged)

    def _watch(self, name: str, pid: int, host: OwnShm) -> None:
        counts = counts_file(host.folder, pid)
        self._watches[name] = Watch(pid, counts, host.shared)

    async def _look(self) -> None:
        while True:
            for watch in self._watches.values():
                watch.look()
            await asyncio.sleep(_SAMPLE_S)

    async def _happen(self) -> None:
        rng = self._rng
        what = rng.choice(self._settings.victims)
        is_long = rng.random() < 0.4
        pause_s = (
            self._settings.long_s if is_long else rng.choice(self._settings.short_s)
        )
        which = rng.randrange(len(self._proxies))
        how = rng.choice(_HOW.get(what, ("kill", "stop", "kill")))
        if self._settings.lasting and (
            what == "trainer" or (what, which) == ("node", 0)
        ):
            how = "stop"
        length = ("-long" if is_long else "-short") if how in _PAUSES else ""
        kind = f"{what}-{how}{length}"
        self.outcome.faults[kind] += 1
        if what not in _NEEDLESS and (how in ("kill", "end") or length == "-long"):
            self._hurt.append((kind, time.monotonic(), False))
        match what:
            case "link":
                await self._fail_link(self._proxies[which], how, pause_s)
            case "trainer":
                await self._fail_trainer(how, pause_s)
            case "node":
                await self._fail_node(which, how, pause_s)
            case "disk":
                await self._fail_disk(pause_s)
            case "shm":
                await self._fail_shm(rng.choice(self._hosts), how, pause_s)
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

    async def _fail_shm(self, host: OwnShm, how: str, pause_s: float) -> None:
        """A host's /dev/shm is full for a while, or now and again."""
        until_s = time.monotonic() + pause_s
        pause_s = pause_s if how == "full" else _EBB_S
        while time.monotonic() < until_s:
            host.fill()
            await asyncio.sleep(pause_s)
            host.empty()
            await asyncio.sleep(0 if how == "full" else _EBB_S)

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
        nodes = [node.pid for node in self._running.values()]
        above, module = {
            "worker": (self._up, ""),
            "part": (nodes, "aseer.instance.main"),
            "pool": ([self._trainer.pid, *nodes], MODULE[0]),
        }[what]
        found: list[int] = []
        for pid in above:
            with suppress(psutil.Error):
                for child in psutil.Process(pid).children(recursive=True):
                    if not module or module in child.cmdline():
                        found.append(child.pid)
        return sorted(found)


async def _pause(pid: int, pause_s: float) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(pause_s)
        os.kill(pid, signal.SIGCONT)


def undisturbed(settings: Settings) -> Expected:
    """The responses of rollouts that nothing happens to, with each of the weights."""
    work = groups(settings.num_groups, settings.max_tokens)
    only_here = {"num_instances": 1, "nodes_per_instance": 1, "min_nodes": 0}
    config = config_for(settings.engine | only_here, chunk_size=0)
    told = {"models": settings.models}

    def made() -> dict[str, Made]:
        responses = engine.rollout_sync(work)
        return {r.request_id: Made(digest(r), list(r.token_ids)) for r in responses}

    with aseer.Engine(config) as engine:
        expected = {BASE: made()}
        for which in range(settings.num_weights):
            engine.update_weights_sync(weights(told, which))
            expected[which] = made()
    names = {tuple(sorted(each)) for each in expected.values()}
    texts = {tuple(each[n].digest for n in sorted(each)) for each in expected.values()}
    assert (len(names), len(texts)) == (1, len(expected)), "weights show in responses"
    return expected


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
    seed: int,
    settings: Settings,
    expected: Expected,
    outcome: Outcome,
    until_s: float | None = None,
) -> None:
    """Add what a seed's chaos shows to the outcome.

    Args:
        until_s: go on with further seeds in the same cluster until then, of
            `time.monotonic`; needs settings that last.
    """
    with own_environment() as (folder, mark), ExitStack() as stack:
        if "disk" in settings.victims:
            stack.enter_context(_small_disk(folder / "journals"))
        num_bytes = settings.shm_bytes if "shm" in settings.victims else None
        hosts = []
        for name in ("trainer", *(f"host{i}" for i in range(settings.num_nodes))):
            hosts.append(OwnShm(folder / name, num_bytes))
            stack.callback(hosts[-1].close)
        chaos = _Chaos(seed, settings, expected, outcome, folder, hosts)
        await chaos.run(until_s)
        for what in await asyncio.to_thread(left_behind, hosts, mark):
            outcome.num_left_behind += 1
            chaos.note(f"left behind: {what}")
