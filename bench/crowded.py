"""A whole controller at work with the engines of `crowd.py`.

Sockets and threads are those of an engine; nothing else of a `Host` is there.
"""

from __future__ import annotations

import asyncio
import mmap
import subprocess
import sys
import threading
import time
from array import array
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from crowd import Done, Go, Settings

import aseer
from aseer.dgds.messages import DraftingSpec
from aseer.dgds.server import DraftServer
from aseer.inputs.speculation import SpeculationConfig
from aseer.instance.messages import FROM_INSTANCE, FromInstance
from aseer.node.machine import Launch
from aseer.runtime import calls
from aseer.runtime.instances import InstancePool
from aseer.runtime.loop_thread import LoopThread
from aseer.runtime.mailbox import Mailbox, MailboxClosed
from aseer.runtime.session import Session
from aseer.transport.zeromq import bind_router
from aseer.types import GroupId, InstanceLoad, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from aseer.instance.messages import Report
    from aseer.node.messages import Located
    from aseer.transport.base import Message, Router
    from aseer.types import InstanceId, InstanceInfo, Response

REPORTS_PER_S = 5
GROUP_SIZE = 8
PROMPT_TOKENS = 4_000  # what a chunk is sent with, with what it generated earlier


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is simulated; `rounds` of each kind in a phase, after `warmup` of them."""

    instances: int = 1_000
    chunks: int = 200
    tokens: int = 20
    waiting: float = 0.25  # requests that wait, for each that runs
    warmup: int = 3
    rounds: int = 4
    phases: int = 3


class CrowdNode:
    """See `Node`; its processes are engines of the crowd, which is one process."""

    def __init__(self, router: Router[Any], endpoint: str, crowd: Crowd) -> None:
        self._router, self._crowd = router, crowd
        self.name, self.endpoint, self.drafts = "", endpoint, ""
        self.supplies = ()
        self.lost_because: str | None = None

    def send(self, peer: bytes, message: Message) -> None:
        self._router.send(peer, message)

    def forget(self, peer: bytes) -> None:
        self._router.forget(peer)

    async def start(
        self, peer: bytes, name: str, line: bytes, env: Mapping[str, str]
    ) -> CrowdProcess:
        self._crowd.tell(line)
        return CrowdProcess()

    async def locate(self) -> Located:
        raise NotImplementedError("no engine of the crowd needs another")

    def log_of(self, name: str) -> str:
        return ""


class CrowdProcess:
    """See `Process`; it never ends by itself."""

    part = ""

    async def wait(self) -> int:
        await asyncio.Event().wait()
        return 0

    async def end(self, grace_s: float) -> None:
        pass

    def kill(self) -> None:
        sys.stderr.write("an engine of the crowd was killed\n")

    async def note_shared_memory(self) -> None:
        pass

    def log_tail(self) -> str:
        return ""

    def cause(self) -> str | None:
        return None


class Crowd:
    """The process with the engines."""

    def __init__(self, settings: Settings) -> None:
        path = Path(settings.counter)
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self.taken = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("crowd.py")),
                msgspec.json.encode(settings).decode(),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def go(self, rounds: int, kind: str) -> None:
        go = Go(rounds, ends=int(kind != "reports"), fetches=kind == "drafts")
        self.tell(msgspec.json.encode(go))

    def done(self) -> Done:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the crowd has ended; its error is above")
        return msgspec.json.decode(line, type=Done)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Owner:
    """What `Host` does with what it hears from the pool."""

    def __init__(self, taken: memoryview) -> None:
        self._taken = taken
        self.infos: list[InstanceInfo] = []
        self.session: Session | None = None

    def instance_up(self, info: InstanceInfo) -> None:
        self.infos.append(info)

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        session = self.session
        if session is not None:
            session.guarded(lambda: session.instance_report(instance_id, report))
        self._taken[0] += 1

    def instance_down(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId] = ()
    ) -> None:
        raise AssertionError(why)

    def instance_left(self, instance_id: InstanceId, why: str) -> None:
        raise AssertionError(why)

    def instances_exhausted(self, why: str) -> None:
        raise AssertionError(why)

    def instances_need_weights(self, why: str) -> None:
        raise AssertionError(why)


class Serving:
    """A controller at work, between `with` and its end."""

    def __init__(self, size: Size, folder: Path) -> None:
        self._size = size
        self._endpoint = f"ipc://{folder}/ctrl"
        self._spec = DraftingSpec(
            settings=SpeculationConfig(method="dgds"),
            endpoint=f"ipc://{folder}/dgds",
            fetch_interval_s=1 / REPORTS_PER_S,
        )
        self.crowd = Crowd(
            Settings(
                chunks=size.chunks,
                tokens=size.tokens,
                bytes_per_token=4,
                share_finished=0.1,
                window=max(8, size.instances // 4),
                counter=str(folder / "taken"),
                endpoint=self._endpoint,
                drafts=self._spec.endpoint,
                seed=1,
            )
        )
        self._owner = Owner(self.crowd.taken)
        self._thread = LoopThread("aseer-engine")
        self.mailbox: Mailbox[Response] = Mailbox()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.num_read = 0
        self.num_tokens_read = 0

    def __enter__(self) -> Self:
        started: Future[Session] = Future()
        self._thread.start(lambda stop: self._main(stop, started))
        session = started.result()
        tasks = list(self._tasks())
        assert session.offer(tasks)
        self._reader.start()
        self.session = session
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.mailbox.close()
        self._thread.request_stop()
        self._thread.join(60)
        self.crowd.close()

    def wait_until_full(self) -> None:
        """Every instance has as many chunks as it runs."""
        wanted = self._size.instances * self._size.chunks
        while True:
            self.crowd.go(0, "reports")
            if (num := self.crowd.done().num_running) == wanted:
                return
            sys.stderr.write(f"{num} of {wanted} chunks run\n")
            time.sleep(1)

    def cpu_s(self) -> dict[str, float]:
        """CPU time so far: of the process, and of threads of it by name."""
        times = {"process": time.process_time()}
        for thread in threading.enumerate():
            assert thread.ident is not None
            clock = time.pthread_getcpuclockid(thread.ident)
            name = "reader" if thread is self._reader else thread.name
            times[name] = time.clock_gettime(clock)
        return times

    async def _main(self, stop: asyncio.Event, started: Future[Session]) -> None:
        try:
            await self._serve(stop, started)
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    async def _serve(self, stop: asyncio.Event, started: Future[Session]) -> None:
        size = self._size
        config = aseer.EngineConfig(
            model="sim", device="sim", num_instances=size.instances, chunk_size=0
        )
        with DraftServer(self._spec) as drafts:
            async with bind_router(self._endpoint, FROM_INSTANCE) as router:
                pool = InstancePool(
                    config,
                    [self._launch(i) for i in range(size.instances)],
                    CrowdNode(router, self._endpoint, self.crowd),
                    self._owner,
                    self._spec,
                )
                async with asyncio.TaskGroup() as tasks:
                    talking = tasks.create_task(self._talk(router, pool))
                    await pool.start()
                    watching = tasks.create_task(pool.supervise())
                    session = self._open(pool, drafts)
                    self._owner.session = session
                    started.set_result(session)
                    await stop.wait()
                    session.fail(aseer.AseerError("the benchmark is over"))
                    watching.cancel()
                    talking.cancel()

    async def _talk(self, router: Router[FromInstance], pool: InstancePool) -> None:
        await router.run(pool.on_message, pool.on_lost, pool.on_gone)

    def _launch(self, instance_id: int) -> Launch:
        return Launch(
            instance_id=instance_id, backend="sim", engine_args={}, env={}, share=""
        )

    def _open(self, pool: InstancePool, drafts: DraftServer) -> Session:
        session = Session(
            pool=pool,
            mailbox=self.mailbox,
            settings=calls.Settings(
                policy="context-aware",
                chunk_size=self._size.tokens * self._size.chunks,
                starvation_interval=256,
                weight_version=1,
                first_chunk_id=1,
            ),
            post=self._thread.post,
            draft_server=drafts,
        )
        for info in self._owner.infos:
            session.instance_up(info, InstanceLoad())
        return session

    def _tasks(self) -> Iterator[Task]:
        size = self._size
        prompt = array("i", range(PROMPT_TOKENS)).tobytes()
        sampling = aseer.SamplingParams().to_dict()
        num_running = size.instances * size.chunks
        for g in range(int(num_running * (1 + size.waiting)) // GROUP_SIZE):
            yield Task(
                group_id=GroupId(f"group-{g}"),
                num_requests=GROUP_SIZE,
                prompt=prompt,
                num_prompt_tokens=PROMPT_TOKENS,
                max_tokens=65_536,
                sampling=sampling,
            )

    def _read(self) -> None:
        while True:
            try:
                response = self.mailbox.get_blocking()
            except MailboxClosed:
                return
            self.num_read += 1
            self.num_tokens_read += len(response.token_ids)
