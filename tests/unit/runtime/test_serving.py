"""What the instance process makes of what it is told: each thing costs only itself."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aseer.instance.base import InstanceSpec
from aseer.instance.main import Instance
from aseer.instance.messages import (
    FROM_INSTANCE,
    TO_INSTANCE,
    Answer,
    Ask,
    Report,
    Run,
    Stop,
)
from aseer.instance.sim import SimBackend
from aseer.transport.memory import MemoryRouter
from aseer.types import Chunk, ChunkId, GroupId, InstanceId, RequestId
from tests.unit.builders import by_chunk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.instance.messages import FromInstance
    from aseer.types import ChunkProgress

NAME = b"0.1"


def chunk_of(chunk_id: int, *, prompt: bytes = bytes(8), max_tokens: int = 5) -> Chunk:
    return Chunk(
        chunk_id=ChunkId(chunk_id),
        request_id=RequestId(f"g/{chunk_id}"),
        group_id=GroupId("g"),
        instance_id=InstanceId(0),
        prompt=prompt,
        generated=b"",
        max_tokens=max_tokens,
        min_tokens=0,
        sampling={"temperature": 0.0, "ignore_eos": True},
        seed=None,
        num_reserved_blocks=1,
    )


class Controller:
    """Tells an instance, and keeps what it says."""

    def __init__(self, router: MemoryRouter[FromInstance]) -> None:
        self.router = router
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()
        self.progress: asyncio.Queue[ChunkProgress] = asyncio.Queue()
        self.num_messages = 0

    def on_message(self, peer: bytes, message: FromInstance) -> None:
        self.num_messages += 1
        if isinstance(message, Answer):
            self.answers.put_nowait(message)
        elif isinstance(message, Report):
            for report in by_chunk(message.chunks):
                self.progress.put_nowait(report)

    async def end_of(self, chunk_id: int) -> tuple[list[ChunkProgress], str]:
        """All that is reported of a chunk, and why it ended."""
        reports = []
        while not reports or reports[-1].end is None:
            report = await self.progress.get()
            if report.chunk_id == chunk_id:
                reports.append(report)
        return reports, reports[-1].end.reason


@asynccontextmanager
async def serving(backend: SimBackend | None = None) -> AsyncIterator[Controller]:
    """An instance in this process."""
    spec = InstanceSpec(
        endpoint="",
        identity=NAME.decode(),
        instance_id=0,
        backend="sim",
        report_interval_s=0.0,
        engine_args={"step_s": 0.0},
    )
    router: MemoryRouter[FromInstance] = MemoryRouter(FROM_INSTANCE)
    controller = Controller(router)
    with router.connect(NAME, TO_INSTANCE) as dealer:
        instance = Instance(backend or SimBackend(spec), dealer, 0.0)
        async with asyncio.TaskGroup() as tasks:
            talking = tasks.create_task(router.run(controller.on_message))
            working = tasks.create_task(instance.serve())
            yield controller
            router.send(NAME, Stop())
            await working
            talking.cancel()


async def test_a_chunk_that_cannot_be_run_ends_as_an_error_and_others_go_on() -> None:
    async with serving() as controller:
        controller.router.send(NAME, Run(chunk_of(1, prompt=b"abc")))
        controller.router.send(NAME, Run(chunk_of(2)))
        reports, reason = await controller.end_of(1)
        assert reason == "error"
        assert "ValueError" in (reports[-1].end.error or "")  # type: ignore[union-attr]
        assert (await controller.end_of(2))[1] == "length"


async def test_a_chunk_that_is_sent_twice_runs_once() -> None:
    async with serving() as controller:
        for _ in range(2):
            controller.router.send(NAME, Run(chunk_of(1)))
        reports, reason = await controller.end_of(1)
        assert reason == "length"
        starts = [report.start for report in reports]
        ends = [report.start + len(report.tokens) // 4 for report in reports]
        assert starts == [0, *ends[:-1]]
        assert ends[-1] == 5
        text_ends = [r.text_start + len(r.text.encode()) for r in reports]
        assert [r.text_start for r in reports] == [0, *text_ends[:-1]]


@pytest.mark.parametrize("value", [object(), b"x" * 2000], ids=["no type", "too large"])
async def test_an_answer_that_cannot_be_sent_is_the_askers_error(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def describe_weights(self: SimBackend) -> Any:
        return value

    monkeypatch.setattr(SimBackend, "describe_weights", describe_weights)
    monkeypatch.setattr("aseer.transport.base.MAX_MESSAGE_BYTES", 1000)
    async with serving() as controller:
        controller.router.send(NAME, Ask(1, "describe_weights", {}))
        answer = await controller.answers.get()
        assert answer.ask_id == 1
        assert "Error: " in answer.error
        controller.router.send(NAME, Run(chunk_of(2)))
        assert (await controller.end_of(2))[1] == "length"


async def test_a_long_report_is_cut_into_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aseer.instance.main._REPORT_BYTES", 0)
    async with serving() as controller:
        for i in range(20):
            controller.router.send(NAME, Run(chunk_of(i, max_tokens=1)))
        for i in range(20):
            if i == 0:
                before = controller.num_messages
            assert (await controller.end_of(i))[1] == "length"
        assert controller.num_messages - before >= 20
