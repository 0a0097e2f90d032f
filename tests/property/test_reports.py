"""Whatever happens to reports on their way, a response is right or its chunk runs anew.

First the intake alone; then instances with a simulated engine, a controller, and the
transport in memory with its faults between them.
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

from aseer.controller import Abort, Dispatch, Finished
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
from aseer.intake import Intake
from aseer.transport.memory import Faults, MemoryRouter
from aseer.types import ChunkId, ChunkProgress, InstanceId
from tests.unit.core import controller_of, task_of

if TYPE_CHECKING:
    from aseer.controller import Command
    from aseer.instance.messages import FromInstance

NUM_INSTANCES = 2
# Reports in a row, of an idle engine whose chunks the controller thinks run.
NUM_IDLE = 20
CHARS = "aäé漢🙂"


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[list[int], str, list[ChunkProgress]]:
    """A chunk's tokens and text, and reports of parts of them, in any order."""
    tokens = draw(st.lists(st.integers(0, 999), max_size=12))
    text = draw(st.text(CHARS, max_size=12))
    cuts = st.tuples(st.integers(0, 12), st.integers(0, 12))
    reports = []
    for (a, b), (c, d) in draw(st.lists(st.tuples(cuts, cuts), max_size=12)):
        part = tokens[a:b]
        reports.append(
            ChunkProgress(
                chunk_id=ChunkId(0),
                start=a,
                tokens=array("i", part).tobytes(),
                logprobs=array("f", part).tobytes(),
                text_start=c,
                text=text[c:d],
            )
        )
    return tokens, text, reports


@given(cut_streams())
def test_what_is_taken_is_always_a_beginning(
    case: tuple[list[int], str, list[ChunkProgress]],
) -> None:
    tokens, text, reports = case
    taken, logprobs, texts = array("i"), array("f"), list[str]()
    intake = Intake(taken, logprobs, texts, len(tokens))
    for report in reports:
        before = len(taken), len("".join(texts))
        follows = intake.take(report)
        assert taken.tolist() == tokens[: len(taken)]
        assert logprobs.tolist() == taken.tolist()
        assert "".join(texts) == text[: len("".join(texts))]
        if not follows:
            assert (len(taken), len("".join(texts))) == before
            assert intake.is_broken
        else:
            assert len(taken) >= report.start + len(report.tokens) // 4


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
        is_idle = not busy and self._controller.num_running(InstanceId(i))
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
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_faults_on_the_way_up_change_no_response(
    up: dict[str, float], reference: dict[str, Any], seed: int
) -> None:
    assert responses_of(seed, up)[0] == reference


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_faults_on_both_ways_change_no_response(
    reference: dict[str, Any], seed: int
) -> None:
    assert responses_of(seed, FAULTS[-1], {"drop": 0.1, "repeat": 0.2})[0] == reference
