"""How many instances can one controller serve, and how long does it block a trainer?

A whole controller (session, decisions, buffer, recorder, draft server, sockets) runs in
this process, as an engine runs it; beside it, in another process, are simulated engines
that say what real ones say (`crowd.py`). Each of 1,000 runs 200 chunks and reports 5
times a second: 20 tokens of every chunk with their logprobs and text. Three kinds of
rounds take turns:

- `reports`: nothing else happens;
- `ends`: with each report one chunk ends, and another starts, so that chunks have 4,000
  tokens; every tenth end finishes its request;
- `drafts`: as well as that, each engine asks after each report for what siblings wrote.
  That is the dearest case: the siblings of nearly every chunk run on other engines, so
  that each token is given out seven times.

The engines report as fast as they are heard, so that a second of theirs may take longer
than one. What it costs is the CPU time of all threads of this process, which other
programs on the machine lengthen less than the wall time. `cores_at_1000_instances` is
that by second, for reports and ends; `cores_with_drafts` is it for all, and
`us_per_report` has the threads: the engine's, the draft server's, ZeroMQ's and the one
that reads responses (`process` is all of them). `reports_per_s` and `chunk_ends_per_s`
are how many of one kind alone fill a core.

`loop_block_ms` is how long this program's main thread, which asks for nothing but to
run a line of Python every half millisecond, was kept from that by the engine's threads:
how late it was, but at most what they computed meanwhile. Rounds with drafts count.

`us_per_1000_response_tokens` is the time to make a response's lists of numbers. It is
not part of the above, where responses are shorter than those of a rollout in which
as many tokens are finished as are generated: there it is paid for every token.

Expected: at most one core, and no block of 5 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from common import print_result, quantiles, result_line
from crowd import Done, Go, Settings, allow_many_files

import aseer
from aseer.config import SpeculationConfig
from aseer.core.outputs import Outputs
from aseer.dgds.messages import DraftingSpec
from aseer.dgds.server import DraftServer
from aseer.instance.messages import FROM_INSTANCE, FromInstance
from aseer.node.machine import Launch
from aseer.runtime.instances import InstancePool
from aseer.runtime.loop_thread import LoopThread
from aseer.runtime.mailbox import Mailbox, MailboxClosed
from aseer.runtime.session import Session
from aseer.transport.zeromq import bind_router
from aseer.types import GroupId, InstanceLoad, Past, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from aseer.instance.messages import Report
    from aseer.transport.base import Message, Router
    from aseer.types import InstanceId, InstanceInfo, Response

KINDS = ("reports", "ends", "drafts")
REPORTS_PER_S = 5
GROUP_SIZE = 8
PROMPT_TOKENS = 4_000  # what a chunk is sent with, with what it generated earlier
PROBE_S = 0.0005


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

    def log_of(self, name: str) -> str:
        return ""


class CrowdProcess:
    """See `Process`; it never ends by itself."""

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

    def instance_down(self, instance_id: InstanceId, why: str) -> None:
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
            policy="context-aware",
            chunk_size=self._size.tokens * self._size.chunks,
            starvation_interval=256,
            max_request_retries=3,
            weight_version=1,
            first_chunk_id=1,
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


class Probe:
    """Notes how long the calling thread is kept from running by others."""

    def __init__(self, serving: Serving) -> None:
        idents = [
            thread.ident
            for thread in threading.enumerate()
            if thread.name.startswith("aseer")
        ]
        self._clocks = [time.pthread_getcpuclockid(i) for i in idents if i is not None]
        self.blocks_ms: list[float] = []

    def watch(self, is_over: threading.Event) -> None:
        """Until that is so."""
        while not is_over.is_set():
            computed, since = self._computed(), time.perf_counter()
            time.sleep(PROBE_S)
            late = time.perf_counter() - since - PROBE_S
            computed = self._computed() - computed
            self.blocks_ms.append(1e3 * max(0.0, min(late, computed)))

    def _computed(self) -> float:
        return sum(map(time.clock_gettime, self._clocks))


def measure_phase(serving: Serving, probe: Probe, rounds: int, kind: str) -> Phase:
    """Go so many rounds of a kind, in which this thread is the trainer's."""
    before = serving.cpu_s()
    is_over = threading.Event()
    dones: list[Done] = []

    def wait() -> None:
        dones.append(serving.crowd.done())
        is_over.set()

    serving.crowd.go(rounds, kind)
    waiting = threading.Thread(target=wait)
    waiting.start()
    probe.watch(is_over)
    waiting.join()
    after = serving.cpu_s()
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    probing = spent.pop("MainThread")
    spent["process"] -= probing
    return Phase(dones[0], spent)


@dataclass(frozen=True)
class Phase:
    """What was done, and the seconds of CPU time that threads spent on it."""

    done: Done
    spent_s: dict[str, float]

    def us_per_report(self, thread: str) -> float:
        return 1e6 * self.spent_s[thread] / self.done.num_reports


def run(size: Size) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        with Serving(size, Path(folder)) as serving:
            serving.wait_until_full()
            probe = Probe(serving)
            measure_phase(serving, probe, size.warmup, "drafts")
            probe.blocks_ms.clear()
            phases: dict[str, list[Phase]] = {kind: [] for kind in KINDS}
            for i in range(size.phases):
                for kind in KINDS[:: 1 if i % 2 else -1]:
                    phase = measure_phase(serving, probe, size.rounds, kind)
                    phases[kind].append(phase)
            return figures_of(size, phases, probe) | {
                "num_responses": serving.num_read,
                "us_per_1000_response_tokens": us_per_1000_response_tokens(),
            }


def figures_of(
    size: Size, phases: dict[str, list[Phase]], probe: Probe
) -> dict[str, Any]:
    """The figures of all phases."""
    cost = {
        kind: {
            thread: quantiles([p.us_per_report(thread) for p in of_kind], 1)
            for thread in ("process", "aseer-engine", "aseer-dgds", "reader")
        }
        for kind, of_kind in phases.items()
    }
    us = {kind: cost[kind]["process"]["median"] for kind in KINDS}
    ends_per_report = _mean(phases["ends"], "num_ends", "num_reports")
    us_per_end = (us["ends"] - us["reports"]) / ends_per_report
    blocks = np.array(probe.blocks_ms)
    return {
        "cores_at_1000_instances": _cores(us["ends"]),
        "cores_with_drafts": _cores(us["drafts"]),
        "cores_of_reports": _cores(us["reports"]),
        "reports_per_s": round(1e6 / us["reports"]),
        "chunk_ends_per_s": round(1e6 / us_per_end) if us_per_end > 0 else None,
        "loop_block_ms_p99": round(float(np.quantile(blocks, 0.99)), 2),
        "loop_block_ms_max": round(float(blocks.max()), 2),
        "num_probes": len(blocks),
        "us_per_report": cost,
        "us_per_chunk_end": round(us_per_end, 1),
        "bytes_per_report": round(
            _mean(phases["reports"], "report_bytes", "num_reports")
        ),
        "asked_per_fetch": round(_mean(phases["drafts"], "num_asked", "num_fetches")),
        "given_per_fetch": round(_mean(phases["drafts"], "num_given", "num_fetches")),
        "num_instances": size.instances,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _cores(us_per_report: float) -> float:
    return round(us_per_report * REPORTS_PER_S * 1_000 / 1e6, 3)


def _mean(phases: list[Phase], what: str, per: str) -> float:
    done = [phase.done for phase in phases]
    return float(
        sum(getattr(d, what) for d in done) / max(1, sum(getattr(d, per) for d in done))
    )


def us_per_1000_response_tokens() -> float:
    """CPU time to make a response's lists, of 20,000 tokens."""
    num = 20_000
    outputs = Outputs()
    handle = outputs.open()
    values = bytes(4 * num)
    outputs.restore(handle, Past(tokens=values, logprobs=values, text=b""))
    times = []
    for _ in range(20):
        begun = time.thread_time()
        outputs.token_ids(handle)
        outputs.logprobs_of_tokens(handle)
        times.append(time.thread_time() - begun)
    return round(1e9 * sorted(times)[len(times) // 2] / num, 1)


def main() -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instances", type=int, default=1_000)
    parser.add_argument("--phases", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a small run, in seconds")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    size = Size(instances=args.instances, phases=args.phases)
    if args.smoke:
        size = replace(size, instances=10, chunks=50, warmup=1, rounds=2, phases=1)
    allow_many_files()
    line = result_line("controller", settings=asdict(size), figures=run(size))
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
