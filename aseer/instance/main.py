"""The instance process: an engine, the control channel, and a lifeline to the
controller.

Started by the controller as `python -m aseer.instance.main` with an `InstanceSpec` on
standard input, which stays open. When the controller is gone, however it died, this
process and each that vLLM started below it end themselves and one another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import traceback
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvloop

from aseer.core.columns import columns_of
from aseer.errors import describe
from aseer.instance.base import Backend, EngineDied, InstanceSpec
from aseer.instance.messages import (
    TO_INSTANCE,
    AbortChunks,
    Answer,
    Ask,
    Failed,
    Hello,
    Report,
    Run,
    Stop,
    ToInstance,
)
from aseer.node.leftovers import hold
from aseer.node.lifeline import (
    Lifeline,
    end_group,
    watch,
    watch_below,
    watch_in_children,
)
from aseer.transport.base import PROTOCOL_VERSION
from aseer.transport.zeromq import connect_dealer
from aseer.types import ChunkEnd, ChunkProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aseer.transport.base import Dealer
    from aseer.types import Chunk, ChunkId

_log = logging.getLogger("aseer.instance")
# A report's size is bounded by the time between two, unless the controller did not read
# for long. Far below `MAX_MESSAGE_BYTES`, and too large to cost anything in messages.
_REPORT_BYTES = 4 << 20
_ending = threading.Lock()  # held by whoever ends this process, to the end


class Instance:
    """Runs the controller's chunks on a backend and reports on them."""

    def __init__(
        self,
        backend: Backend,
        dealer: Dealer[ToInstance],
        report_interval_s: float,
    ) -> None:
        self._backend = backend
        self._dealer = dealer
        self._interval = report_interval_s
        self._running: dict[ChunkId, asyncio.Task[None]] = {}
        self._pending: dict[ChunkId, _Pending] = {}
        self._chunk_over = asyncio.Event()
        self._answering = asyncio.Lock()

    async def serve(self) -> None:
        """Work until told to stop.

        Raises:
            EngineDied: the engine cannot go on.
        """
        async with asyncio.TaskGroup() as tasks:
            reporter = tasks.create_task(self._report())
            attendant = tasks.create_task(self._backend.attend())
            while True:
                message = await self._dealer.receive()
                match message:
                    case Run(chunk) if chunk.chunk_id not in self._pending:
                        self._pending[chunk.chunk_id] = pending = _Pending()
                        task = tasks.create_task(self._run(chunk, pending))
                        self._running[chunk.chunk_id] = task
                    case AbortChunks(chunk_ids):
                        for chunk_id in self._running.keys() & chunk_ids:
                            tasks.create_task(self._abort(chunk_id))
                    case Ask():
                        tasks.create_task(self._answer(message))
                    case Stop():
                        break
            reporter.cancel()
            attendant.cancel()
            for task in self._running.values():
                task.cancel()

    async def _run(self, chunk: Chunk, pending: _Pending) -> None:
        try:
            pending.end = await self._backend.run(chunk, pending.emit)
        except asyncio.CancelledError:
            pending.end = ChunkEnd(reason="aborted")
        except EngineDied:
            raise
        except Exception as error:  # of what this chunk asks for: it costs no other
            _log.exception("chunk %d failed", chunk.chunk_id)
            pending.end = ChunkEnd(reason="error", error=describe(error))
        finally:
            del self._running[chunk.chunk_id]
            self._chunk_over.set()

    async def _abort(self, chunk_id: ChunkId) -> None:
        """Ask the engine while it can still say what it has; else just stop waiting."""
        task = self._running.get(chunk_id)
        if task is None:
            return
        if self._pending[chunk_id].started:
            await self._backend.abort(chunk_id)
        else:
            task.cancel()

    async def _answer(self, ask: Ask) -> None:
        async with self._answering:
            try:
                method = getattr(self._backend, ask.what)
                answer = Answer(ask.ask_id, await method(**ask.arguments))
            except EngineDied:
                raise
            except Exception as error:
                _log.exception("%s failed", ask.what)
                answer = Answer(ask.ask_id, error=describe(error))
            try:
                await self._dealer.send(answer)
            except Exception as error:  # it is too large, or of no type that is sent
                _log.exception("what %s returned cannot be sent", ask.what)
                await self._dealer.send(Answer(ask.ask_id, error=describe(error)))

    async def _report(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._interval):
                    await self._chunk_over.wait()
            except TimeoutError:
                pass
            self._chunk_over.clear()
            reports = [r for c, p in self._pending.items() if (r := p.take(c))]
            for report in reports:
                if report.end is not None:
                    del self._pending[report.chunk_id]
            for part in _in_parts(reports):
                await self._dealer.send(Report(columns_of(part), self._backend.load()))


def _in_parts(reports: list[ChunkProgress]) -> Iterator[list[ChunkProgress]]:
    """Cut a report into messages that are not too large; one at least, if empty."""
    part: list[ChunkProgress] = []
    num_bytes = 0
    for report in reports:
        part.append(report)
        num_bytes += len(report.tokens) + len(report.logprobs) + len(report.text)
        if num_bytes > _REPORT_BYTES:
            yield part
            part, num_bytes = [], 0
    yield part


class _Pending:
    """A chunk's output that is not reported yet."""

    __slots__ = (
        "cached",
        "end",
        "logprobs",
        "num_reported",
        "started",
        "text",
        "text_reported",
        "tokens",
    )

    def __init__(self) -> None:
        self.num_reported = 0  # tokens
        self.text_reported = 0  # bytes
        self.tokens = array("i")
        self.logprobs = array("f")
        self.text = ""
        self.cached: int | None = None
        self.end: ChunkEnd | None = None
        self.started = False

    def emit(
        self,
        *,
        tokens: list[int] | None = None,
        logprobs: list[float] | None = None,
        text: str = "",
        num_cached_tokens: int | None = None,
    ) -> None:
        """See `Emit`."""
        self.started = True
        self.tokens.extend(tokens or ())
        self.logprobs.extend(logprobs or ())
        self.text += text
        if num_cached_tokens is not None:
            self.cached = num_cached_tokens

    def take(self, chunk_id: ChunkId) -> ChunkProgress | None:
        """What is new since the last call; None if nothing is."""
        if not (self.tokens or self.text or self.end) and self.cached is None:
            return None
        report = ChunkProgress(
            chunk_id=chunk_id,
            start=self.num_reported,
            tokens=self.tokens.tobytes(),
            logprobs=self.logprobs.tobytes(),
            text_start=self.text_reported,
            text=self.text,
            num_cached_tokens=self.cached,
            end=self.end,
        )
        self.num_reported += len(self.tokens)
        self.text_reported += len(self.text.encode())
        self.tokens = array("i")
        self.logprobs = array("f")
        self.text = ""
        self.cached = None
        return report


def make_backend(spec: InstanceSpec) -> Backend:
    """The backend a spec names."""
    if spec.backend == "sim":
        from aseer.instance.sim import SimBackend

        return SimBackend(spec)
    from aseer.instance.vllm.backend import VllmBackend

    return VllmBackend(spec)


def _follow(spec: InstanceSpec) -> int:
    """Have workers of an engine whose leader is on another node, as long as they live.

    Whoever started this process ends it with its leader, of whose end nothing is heard.
    """
    if spec.backend == "sim":
        from aseer.instance.sim import follow
    else:
        from aseer.instance.vllm.follower import follow
    try:
        follow(spec.engine_args)
    except Exception:
        traceback.print_exc()
    return 1


async def _main(spec: InstanceSpec) -> int:
    async with connect_dealer(
        spec.endpoint, spec.identity.encode(), TO_INSTANCE
    ) as dealer:
        backend = make_backend(spec)
        try:
            info = await backend.start()
            await dealer.send(Hello(PROTOCOL_VERSION, info))
            await Instance(backend, dealer, spec.report_interval_s).serve()
        except Exception as error:
            traceback.print_exc()
            await dealer.send(Failed(describe(error)))
            return 1
        finally:
            await backend.close()
    return 0


def _end(lifeline: Lifeline) -> None:
    """The controller is gone; this process must not exit before all is removed."""
    with _ending:
        end_group(lifeline)


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    # Read byte by byte: what follows the line is the lifeline's.
    line = bytearray()
    while (byte := os.read(sys.stdin.fileno(), 1)) not in (b"\n", b""):
        line += byte
    spec = msgspec.json.decode(bytes(line), type=InstanceSpec)
    lifeline = Lifeline.of_this_process()
    hold(Path(lifeline.run_dir))
    # A thread, since the engine's start blocks the event loop.
    watch(lifeline, lambda: _end(lifeline), sys.stdin.fileno())
    watch_in_children(lifeline)
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)  # this thread's, and so its children's
    status = _follow(spec) if spec.follows else uvloop.run(_main(spec))
    sys.stdout.flush()
    with _ending:
        # Not sys.exit: taking torch down lasts seconds in which no thread runs, and a
        # controller that died then would have left nobody to clean up.
        os._exit(status)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a process of vLLM's: multiprocessing imports us there
    watch_below(Lifeline.of_this_process())
