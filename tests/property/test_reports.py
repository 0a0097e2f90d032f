"""Whatever happens to reports on their way, a response is right or its chunk runs anew.

First what takes them alone; then instances with a simulated engine, a controller, and
the transport in memory with its faults between them.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aseer.core.columns import columns_of
from aseer.core.commands import Abort, Dispatch, Finished
from aseer.core.outputs import Outputs
from aseer.instance.base import InstanceSpec
from aseer.instance.main import Instance
from aseer.instance.messages import (
    FROM_INSTANCE,
    TO_INSTANCE,
    AbortChunks,
    Report,
    Run,
)
from aseer.instance.sim import SimBackend
from aseer.transport.memory import Faults, MemoryRouter
from aseer.types import ChunkEnd, ChunkId, ChunkProgress, InstanceId
from tests.unit.builders import controller_of, task_of

if TYPE_CHECKING:
    from aseer.core.commands import Command
    from aseer.instance.messages import FromInstance

NUM_INSTANCES = 2
# Reports in a row, of an idle engine whose chunks the controller thinks run.
NUM_IDLE = 20
CHARS = "aäé漢🙂"


class Stream:
    """A chunk's tokens and text, and what a request takes of reports of their parts.

    This is the rule that the native code must follow, told one report at a time.
    """

    def __init__(self, chunk_id: int, tokens: list[int], text: str) -> None:
        self.chunk_id = chunk_id
        self.tokens = tokens
        self.text = text.encode()
        self.num_taken = self.num_text = 0
        self.is_over = False

    def refuses(self, report: ChunkProgress) -> bool:
        """Take what of a report is new; whether it does not follow on what was."""
        if self.is_over:
            return False
        self.is_over = report.end is not None
        end = report.start + len(report.tokens) // 4
        text_end = report.text_start + len(report.text.encode())
        if report.start > self.num_taken or report.text_start > self.num_text:
            return True
        if end > len(self.tokens):
            return True
        self.num_taken = max(self.num_taken, end)
        self.num_text = max(self.num_text, text_end)
        return False


@st.composite
def cut_streams(
    draw: st.DrawFn,
) -> tuple[list[Stream], list[list[tuple[Stream, ChunkProgress]]]]:
    """Chunks, and messages of reports of parts of them, in any order."""
    streams = [
        Stream(
            draw(st.integers(0, 3)) * 16 + i,  # some share a row of the table
            draw(st.lists(st.integers(0, 999), max_size=12)),
            draw(st.text(CHARS, max_size=12)),
        )
        for i in range(3)
    ]
    cut = st.integers(0, 12)
    messages = []
    for _ in range(draw(st.integers(0, 6))):
        message = []
        for i in draw(st.lists(st.integers(0, 2), max_size=4)):
            stream = streams[i]
            a, b = draw(cut), draw(cut)
            text = stream.text.decode()
            c, d = sorted((draw(cut), draw(cut)))
            part = stream.tokens[a:b]
            report = ChunkProgress(
                chunk_id=ChunkId(stream.chunk_id),
                start=a,
                tokens=array("i", part).tobytes(),
                logprobs=array("f", part).tobytes(),
                text_start=len(text[:c].encode()) + max(0, c - len(text)),
                text=text[c:d],
                end=ChunkEnd(reason="stop") if draw(st.integers(0, 9)) == 0 else None,
            )
            message.append((stream, report))
        messages.append(message)
    return streams, messages


@given(cut_streams())
def test_what_is_taken_is_always_a_beginning(
    case: tuple[list[Stream], list[list[tuple[Stream, ChunkProgress]]]],
) -> None:
    streams, messages = case
    outputs = Outputs()
    handles = [outputs.open() for _ in streams]
    for stream, handle in zip(streams, handles, strict=True):
        outputs.begin(stream.chunk_id, handle, len(stream.tokens))
    for message in messages:
        before = sum(stream.num_taken for stream in streams)
        refused = [i for i, (s, report) in enumerate(message) if s.refuses(report)]
        num_new = sum(stream.num_taken for stream in streams) - before
        columns = columns_of(report for _, report in message)
        assert outputs.take_columns(columns) == (num_new, refused)
        for stream, handle in zip(streams, handles, strict=True):
            taken = stream.tokens[: stream.num_taken]
            assert outputs.token_ids(handle) == outputs.logprobs_of_tokens(handle)
            assert outputs.token_ids(handle) == taken
            assert outputs.text(handle) == stream.text[: stream.num_text]
    assert outputs.num_running == sum(not stream.is_over for stream in streams)


class Rollout:
    """A controller and its instances, over a transport with faults."""

    def __init__(self, seed: int, up: dict[str, float], down: dict[str, float]) -> None:
        self._rng = random.Random(seed)
        self._faults = (up, down)
        self._router: MemoryRouter[FromInstance] = MemoryRouter(FROM_INSTANCE)
        self._controller = controller_of(chunk_size=9, max_request_retries=10**6)
        self._names: dict[bytes, int] = {}
        self._num_idle = [0] * NUM_INSTANCES
        self._num_started = 0
        self._ends = ExitStack()
        self._wanted: asyncio.Queue[int] = asyncio.Queue()
        self.responses: dict[str, Any] = {}
        self.num_lost = 0

    async def run(self) -> None:
        settings = {"temperature": 0.0, "ignore_eos": False}
        tasks = [
            task_of(
                f"g{i}",
                num_requests=3,
                num_prompt_tokens=3 + i,
                max_tokens=40,
                sampling=settings,
            )
            for i in range(3)
        ]
        with self._ends:
            async with asyncio.TaskGroup() as group:
                talking = group.create_task(self._router.run(self._on_message))
                running = {i: self._start(group, i) for i in range(NUM_INSTANCES)}
                self._do(self._controller.add_groups(tasks, 0.0))
                while self._controller.num_unfinished:
                    i = await self._wanted.get()
                    if i < 0:
                        continue
                    running[i].cancel()
                    down = self._controller.instance_down(InstanceId(i), 0.0, "idle")
                    self._do(down)
                    self.num_lost += 1
                    running[i] = self._start(group, i)
                for task in (talking, *running.values()):
                    task.cancel()

    def _start(self, group: asyncio.TaskGroup, i: int) -> asyncio.Task[None]:
        name = b"%d.%d" % (i, self._num_started)
        self._num_started += 1
        self._names = {n: j for n, j in self._names.items() if j != i} | {name: i}
        self._num_idle[i] = 0
        dealer = self._ends.enter_context(self._router.connect(name, TO_INSTANCE))
        up, down = self._faults
        dealer.up.faults = Faults(random.Random(self._rng.random()), **up)
        dealer.down.faults = Faults(random.Random(self._rng.random()), **down)
        spec = InstanceSpec(
            endpoint="",
            identity=name.decode(),
            instance_id=i,
            backend="sim",
            report_interval_s=0.0,
            engine_args={"step_s": 0.0, "num_kv_blocks": 64, "block_size": 4},
        )

        async def work() -> None:
            backend = SimBackend(spec)
            info = await backend.start()
            self._do(self._controller.instance_up(info, 0.0))
            await Instance(backend, dealer, spec.report_interval_s).serve()

        return group.create_task(work())

    def _on_message(self, peer: bytes, message: FromInstance) -> None:
        i = self._names.get(peer)
        if i is None:
            return
        assert isinstance(message, Report)
        self._do(self._controller.progress(message.chunks, 0.0))
        self._controller.check_integrity()
        busy = message.load.num_running + message.load.num_waiting
        is_idle = not busy and self._controller.running.num_on(InstanceId(i))
        self._num_idle[i] = self._num_idle[i] + 1 if is_idle else 0
        if self._num_idle[i] == NUM_IDLE:
            self._wanted.put_nowait(i)
        if not self._controller.num_unfinished:
            self._wanted.put_nowait(-1)

    def _do(self, commands: list[Command]) -> None:
        names = {i: name for name, i in self._names.items()}
        for command in commands:
            match command:
                case Dispatch(chunk):
                    self._router.send(names[chunk.instance_id], Run(chunk))
                case Abort(instance_id, chunk_id):
                    self._router.send(names[instance_id], AbortChunks([chunk_id]))
                case Finished(r):
                    assert r.request_id not in self.responses
                    key = (r.token_ids, r.logprobs, r.text, r.finish_reason)
                    self.responses[r.request_id] = key


def responses_of(
    seed: int, up: dict[str, float], down: dict[str, float] | None = None
) -> tuple[dict[str, Any], int]:
    rollout = Rollout(seed, up, down or {})
    asyncio.run(rollout.run())
    return rollout.responses, rollout.num_lost


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    responses, num_lost = responses_of(0, {})
    assert len(responses) == 9
    assert num_lost == 0
    assert all(len(r[0]) == len(r[1]) == len(r[2]) > 0 for r in responses.values())
    return responses


FAULTS = [
    {"repeat": 0.3},
    {"delay": 0.3},
    {"drop": 0.15},
    {"drop": 0.1, "repeat": 0.2, "delay": 0.2},
]


@pytest.mark.parametrize("up", FAULTS, ids=lambda f: " ".join(f))
@settings(max_examples=settings.default.max_examples // 6)
@given(seed=st.integers(0, 2**32))
def test_faults_on_the_way_up_change_no_response(
    up: dict[str, float], reference: dict[str, Any], seed: int
) -> None:
    assert responses_of(seed, up)[0] == reference


@settings(max_examples=settings.default.max_examples // 6)
@given(seed=st.integers(0, 2**32))
def test_faults_on_both_ways_change_no_response(
    reference: dict[str, Any], seed: int
) -> None:
    assert responses_of(seed, FAULTS[-1], {"drop": 0.1, "repeat": 0.2})[0] == reference
