"""The engine behind the routes: one request, or one caller, stops nobody else."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import ConfigError, WeightUpdateError
from aseer.server.front import Front
from aseer.server.wire import Ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.types import InstanceInfo

SOON_S = 5.0


class Desk:
    """Answers a prompt's first token, or raises what the engine has for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def submit(self, prompt: list[int], sampling: Any, **named: Any) -> Any:
        await self._engine.goes_on.wait()
        error = self._engine.errors.get(prompt[0])
        if error is not None:
            raise error
        return prompt[0]


class Engine:
    """Opens desks, and aborts when the test says so."""

    weight_version = 0

    def __init__(self) -> None:
        self.num_desks = 0
        self.errors: dict[int, Exception] = {}
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.aborts = asyncio.Event()
        self.aborts.set()

    @property
    def instances(self) -> list[InstanceInfo]:
        return []

    @asynccontextmanager
    async def open_rollout(self, *, join_s: float) -> AsyncIterator[Any]:
        self.num_desks += 1
        yield Desk(self)

    async def abort_rollout(self) -> None:
        await self.aborts.wait()

    async def update_weights(self, source: str, *, version: int | None = None) -> None:
        raise AssertionError("it is called with directories alone")


def ask_of(token: int) -> Ask:
    return Ask([token], {}, 1, None, None, wants_logprobs=False)


@asynccontextmanager
async def fronted() -> AsyncIterator[tuple[Front, Engine]]:
    engine = Engine()
    front = Front(engine)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(SOON_S):
        running = tasks.create_task(front.run())
        yield front, engine
        running.cancel()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_fault_in_one_request_costs_no_other_request_its_desk() -> None:
    async with fronted() as (front, engine):
        for error in (ConfigError("its prompt is bad"), TypeError("a bug")):
            engine.errors[1] = error
            with pytest.raises(type(error)):
                await front.sample(ask_of(1))
            assert await front.sample(ask_of(2)) == [2]
        assert engine.num_desks == 1


async def test_who_aborts_and_does_not_wait_for_the_answer_pauses_nobody() -> None:
    async with fronted() as (front, engine):
        assert await front.sample(ask_of(2)) == [2]
        engine.aborts.clear()
        aborting = asyncio.get_running_loop().create_task(front.abort())
        await settled()
        assert front.is_paused
        aborting.cancel()
        await asyncio.wait([aborting])
        assert not front.is_paused
        assert await front.sample(ask_of(3)) == [3]


async def test_weights_that_are_not_there_are_refused_before_anybody_waits() -> None:
    async with fronted() as (front, engine):
        engine.goes_on.clear()
        running = asyncio.get_running_loop().create_task(front.sample(ask_of(2)))
        await settled()
        for directory in ("/no/such/directory", "x" * 5000):
            with pytest.raises(WeightUpdateError, match="there is no directory"):
                await front.update_weights(directory, None)
        assert not front.is_paused
        engine.goes_on.set()
        assert await running == [2]
