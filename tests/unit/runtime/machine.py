"""A machine for an `InstancePool` without processes and sockets.

Its "processes" are tasks of the test's loop: `aseer.instance.main.Instance` with a
simulated engine, joined to the pool by the in-memory transport. A test may have any of
the engine's methods fail, wait or kill it, and sees what it was asked.
"""

from __future__ import annotations

import asyncio
import zlib
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from aseer.config import EngineConfig
from aseer.errors import InstanceStartError, describe
from aseer.instance.base import InstanceSpec
from aseer.instance.main import Instance
from aseer.instance.messages import (
    FROM_INSTANCE,
    TO_INSTANCE,
    Failed,
    Hello,
    Report,
    Run,
)
from aseer.instance.sim import SimBackend
from aseer.node.local import LocalNode
from aseer.node.machine import Launch
from aseer.runtime.instances import InstancePool
from aseer.transport.base import PROTOCOL_VERSION
from aseer.transport.memory import MemoryRouter
from aseer.types import Chunk, ChunkId, GroupId, InstanceId, RequestId
from aseer.weights.checks import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import pytest

    from aseer.instance.messages import FromInstance
    from aseer.node.leftovers import Leftovers
    from aseer.transport.base import Router
    from aseer.types import InstanceInfo

SIGKILL = -9


class Exited(BaseException):
    """What `os._exit` does to a process that is a task."""


class Backend(SimBackend):
    """A simulated engine whose weights are names, and that fails as it is told."""

    def __init__(self, spec: InstanceSpec, machine: Machine) -> None:
        super().__init__(spec)
        self._machine = machine
        self._identity = spec.identity
        self._prepared_name = ""
        self.weights = ""
        self.told: list[tuple[str, dict[str, Any]]] = []

    async def start(self) -> InstanceInfo:
        await self._machine.at(self._identity, "start")
        return await super().start()

    async def describe_weights(self) -> ModelSpec:
        await self._machine.at(self._identity, "describe_weights")
        return ModelSpec({"w": TensorSpec("F32", (1,))}, dtype="F32")

    async def prepare_weights(self, index: str, others: Sequence[str] = ()) -> None:
        await self._machine.at(self._identity, "prepare_weights")
        self._prepared_name = index

    async def commit_weights(self) -> None:
        await self._machine.at(self._identity, "commit_weights")
        self.weights = self._prepared_name
        self._weights = zlib.crc32(self.weights.encode()) << 32

    async def discard_weights(self) -> None:
        await self._machine.at(self._identity, "discard_weights")

    async def transfer_weights(self, step: str, info: dict[str, Any]) -> Any:
        await self._machine.at(self._identity, step)
        self.told.append((step, info))
        answer = await super().transfer_weights(step, info)
        if step == "finish":
            self.weights = f"sent-{self._weights >> 32}"
        return answer

    async def sleep(self, level: int) -> None:
        await self._machine.at(self._identity, "sleep")
        await super().sleep(level)

    async def wake(self, tags: list[str] | None = None) -> None:
        await self._machine.at(self._identity, "wake")
        self._sleeping -= {"weights", "kv_cache"} if tags is None else set(tags)

    @property
    def is_asleep(self) -> bool:
        return bool(self._sleeping)

    @property
    def sleeping(self) -> set[str]:
        return self._sleeping


class Process:
    """What the pool takes for an `InstanceProcess`."""

    part = ""

    def __init__(self, machine: Machine, spec: InstanceSpec) -> None:
        self._machine = machine
        self._spec = spec
        self.identity = spec.identity
        self.pid = 0
        self.backend = Backend(spec, machine)
        self._ended: asyncio.Future[int] = machine.loop.create_future()
        self._task = machine.tasks.create_task(self._live())
        self._task.add_done_callback(lambda _: self._set_ended(SIGKILL))

    async def _live(self) -> None:
        machine, spec = self._machine, self._spec
        name = spec.identity.encode()
        with machine.router.connect(name, TO_INSTANCE) as dealer:
            try:
                info = await self.backend.start()
                await dealer.send(Hello(machine.protocol, info))
                await Instance(self.backend, dealer, spec.report_interval_s).serve()
                self._set_ended(0)
            except Exception as error:
                await dealer.send(Failed(describe(error)))
                self._set_ended(1)
            except BaseExceptionGroup as group:
                if group.subgroup(Exited) is None:
                    raise
                self._set_ended(13)
            except Exited:
                self._set_ended(13)

    def _set_ended(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    async def end(self, grace_s: float) -> None:
        if grace_s:
            await asyncio.wait([self._ended], timeout=grace_s)
        self.kill()
        await asyncio.wait([self._task])

    def kill(self) -> None:
        self._task.cancel()

    async def note_shared_memory(self) -> None:
        return None

    def log_tail(self) -> str:
        return "the last line"

    def cause(self) -> str | None:
        return None


class Machine:
    """Where the instances run."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.loop = asyncio.get_running_loop()
        self.tasks = tasks
        self.router: MemoryRouter[FromInstance] = MemoryRouter(FROM_INSTANCE)
        self.protocol = PROTOCOL_VERSION
        self.processes: dict[str, Process] = {}
        #: What happens in a method: by identity ("*" = all) and method's name.
        self.scripts: dict[tuple[str, str], Callable[[], Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.num_refused_starts = 0
        self._changed = asyncio.Event()

    async def start(
        self,
        name: str,
        line: bytes,
        env: dict[str, str],
        log_path: Path,
        leftovers: Leftovers,
        interpreter: object = None,
    ) -> Process:
        del name, env, log_path, leftovers, interpreter
        spec = msgspec.json.decode(line, type=InstanceSpec)
        if self.num_refused_starts:
            self.num_refused_starts -= 1
            raise InstanceStartError("no room for a process")
        process = self.processes[spec.identity] = Process(self, spec)
        self._changed.set()
        return process

    async def at(self, identity: str, what: str) -> None:
        """An engine's method runs: do what the test wants to happen there."""
        self.asked.append((identity, what))
        self._changed.set()
        for name in (identity, "*"):
            script = self.scripts.get((name, what))
            if script is not None:
                result = script()
                if asyncio.iscoroutine(result) or asyncio.isfuture(result):
                    await result

    def fail(self, identity: str, what: str, error: BaseException) -> None:
        def fail() -> None:
            raise error

        self.scripts[identity, what] = fail

    def hold(self, identity: str, what: str) -> asyncio.Event:
        """Have a method wait for the event."""
        go_on = asyncio.Event()
        self.scripts[identity, what] = go_on.wait
        return go_on

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so, looked at whenever anything happens here."""
        while not is_so():
            self._changed.clear()
            try:
                async with asyncio.timeout(0.01):  # or something that says nothing
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def until_asked(self, identity: str, what: str) -> None:
        await self.until(lambda: (identity, what) in self.asked)


class Owner:
    """Who hears of the instances; see `PoolOwner`."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.infos: dict[InstanceId, InstanceInfo] = {}
        self.reports: list[tuple[InstanceId, Report]] = []

    def instance_up(self, info: InstanceInfo) -> None:
        self.infos[info.instance_id] = info
        self.told.append(("up", info.instance_id))

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        assert instance_id in self.infos, "it reports before it is up"
        self.reports.append((instance_id, report))

    def instance_down(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId] = ()
    ) -> None:
        for each in (instance_id, *partners):
            self.infos.pop(each)
        self.told.append(("down", instance_id, *partners, why))

    def instance_left(self, instance_id: InstanceId, why: str) -> None:
        self.infos.pop(instance_id)
        self.told.append(("left", instance_id, why))

    def instances_exhausted(self, why: str) -> None:
        self.told.append(("exhausted", why))

    def instances_need_weights(self, why: str) -> None:
        self.told.append(("in need", why))

    def kinds(self) -> list[tuple[Any, ...]]:
        """What was told, without the reasons."""
        alone = ("exhausted", "in need")
        return [each[:1] if each[0] in alone else each[:2] for each in self.told]

    def whys(self) -> list[str]:
        return [each[-1] for each in self.told if each[0] in ("down", "exhausted")]


def config_of(**settings: Any) -> EngineConfig:
    """Two simulated instances that report at once."""
    defaults: dict[str, Any] = {
        "model": "sim",
        "device": "sim",
        "num_instances": 2,
        "report_interval_s": 0.005,
        "shutdown_timeout_s": 5.0,
    }
    return EngineConfig(**defaults | settings)


def launches_of(config: EngineConfig, **engine_args: Any) -> list[Launch]:
    args = {"step_s": 0.0, "num_kv_blocks": 256, **engine_args}
    assert config.num_instances is not None
    return [
        Launch(instance_id=i, backend="sim", engine_args=args, env={}, share="a test")
        for i in range(config.num_instances)
    ]


def chunk_of(chunk_id: int, instance_id: int = 0, *, max_tokens: int = 5) -> Chunk:
    return Chunk(
        chunk_id=ChunkId(chunk_id),
        request_id=RequestId(f"g/{chunk_id}"),
        group_id=GroupId("g"),
        instance_id=InstanceId(instance_id),
        prompt=bytes(8),
        generated=b"",
        max_tokens=max_tokens,
        min_tokens=0,
        sampling={"temperature": 0.0, "ignore_eos": True},
        seed=None,
        num_reserved_blocks=1,
    )


class NoLeftovers:
    """An engine's list of leftovers; these instances leave nothing."""

    run_dir = Path("/nowhere")


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that are there for real processes take no time."""

    def exit_process(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr("aseer.runtime.supervisor._RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr("aseer.runtime.supervisor._WATCH_INTERVAL_S", 0.005)
    monkeypatch.setattr("aseer.runtime.supervisor._NOTE_INTERVAL_S", 0.01)
    monkeypatch.setattr("aseer.instance.sim.os._exit", exit_process)


@asynccontextmanager
async def machine_of(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    """A machine that pools start their instances on; it ends what is left."""
    quick(monkeypatch)
    async with asyncio.TaskGroup() as tasks:
        machine = Machine(tasks)
        monkeypatch.setattr("aseer.node.local.InstanceProcess.start", machine.start)
        yield machine
        for process in machine.processes.values():
            process.kill()


def node_of(router: Router[FromInstance]) -> LocalNode:
    """This machine, but for its files."""
    leftovers = cast("Leftovers", NoLeftovers())
    return LocalNode(router, "nowhere", leftovers, Path("/nowhere"))


class Running:
    """A pool with its owner, on a machine."""

    def __init__(self, machine: Machine, config: EngineConfig, **engine_args: Any):
        self.machine = machine
        self.owner = Owner()
        self.pool = InstancePool(
            config,
            launches_of(config, **engine_args),
            node_of(machine.router),
            self.owner,
        )

    def process(self, identity: str) -> Process:
        return self.machine.processes[identity]

    async def until(self, *told: tuple[Any, ...]) -> None:
        """Wait until the owner has heard all that."""
        await self.machine.until(lambda: set(told) <= set(self.owner.kinds()))

    async def run_to_its_end(self, chunk_id: int, instance_id: int = 0) -> str:
        """Run a chunk; why it ended."""
        chunk = chunk_of(chunk_id, instance_id)
        self.pool.run_chunk(InstanceId(instance_id), Run(chunk))
        await self.machine.until(lambda: chunk_id in self.ends())
        return self.ends()[chunk_id]

    def ends(self) -> dict[int, str]:
        return {
            chunk_id: end.reason
            for _, report in self.owner.reports
            for chunk_id, end in report.chunks.ended()
        }


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch,
    config: EngineConfig | None = None,
    *,
    machine: Machine | None = None,
    **engine_args: Any,
) -> AsyncIterator[Running]:
    """A pool whose instances are all up and supervised; of that nothing is told."""
    async with machine_of(monkeypatch) as made:
        run = Running(machine or made, config or config_of(), **engine_args)
        talking = made.tasks.create_task(
            run.machine.router.run(
                run.pool.on_message, run.pool.on_lost, run.pool.on_gone
            )
        )
        await run.pool.start()
        assert sorted(run.owner.kinds()) == [("up", i) for i in sorted(run.owner.infos)]
        run.owner.told.clear()
        supervising = made.tasks.create_task(run.pool.supervise())
        try:
            yield run
        finally:
            supervising.cancel()
            await asyncio.wait([supervising])
            await run.pool.stop(1.0)
            talking.cancel()
