"""Requests that come one by one: joined to groups, answered each, and ended with their
callers.

The rollout behind the desk is a stand-in that answers when a test says so;
`tests/integration/test_desk.py` has engines.
"""

from __future__ import annotations

import asyncio
from array import array
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import (
    ConfigError,
    EngineClosedError,
    RolloutClosedError,
    RolloutError,
)
from aseer.inputs.prompt_image import PromptImage
from aseer.runtime.desk import Desk
from tests.unit.builders import task_of
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.types import Task

#: Nobody waits so long: groups begin when they are whole, or by the test's own clock.
NEVER_S = 1000.0


class FakeRollout:
    """See `aseer.Rollout`: gives what the test puts into it, or raises it."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled: list[str] = []
        self.is_closed = False
        self.report = "the report"

    async def __aenter__(self) -> FakeRollout:
        return self

    async def aclose(self) -> None:
        self.is_closed = True
        self.coming.put_nowait(None)

    def __aiter__(self) -> FakeRollout:
        return self

    async def __anext__(self) -> Any:
        found = await self.coming.get()
        if found is None:
            raise StopAsyncIteration
        if isinstance(found, Exception):
            raise found
        return found

    def progress(self) -> str:
        return "the progress"

    def cancel(self, group_id: str) -> None:
        self.cancelled.append(group_id)


class Source:
    """See `OpenSource`: what begins is kept."""

    def __init__(self) -> None:
        self.begun: list[Task] = []

    def prepare(self, given: Any) -> Task:
        """A task whose prompt and limits are those that were given."""
        if given.prompt == [0]:
            raise ConfigError("its prompt is bad")
        limit = (given.sampling or {}).get("max_tokens", 9)
        prompt = array("i", given.prompt).tobytes()
        images = [PromptImage(key, "/there", 1, 2) for key in given.images or ()]
        return replace(task_of(max_tokens=limit), prompt=prompt, images=tuple(images))

    def add(self, task: Task) -> None:
        self.begun.append(task)


class Open:
    """A desk, and what stands behind it."""

    def __init__(self, desk: Desk, rollout: FakeRollout, source: Source) -> None:
        self.desk = desk
        self.rollout = rollout
        self.source = source
        self.work: Any = desk._work

    def submit(self, *prompt: int, **settings: Any) -> asyncio.Task[Any]:
        loop = asyncio.get_running_loop()
        return loop.create_task(self.desk.submit(list(prompt), **settings))

    async def until_begun(self, num: int) -> list[Task]:
        await until(lambda: len(self.source.begun) == num)
        return self.source.begun

    def answer(self, task: Task, index: int) -> None:
        response = SimpleNamespace(group_id=task.group_id, index=index)
        self.rollout.coming.put_nowait(response)


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aseer.runtime.desk.Rollout", lambda work: work.rollout)


@asynccontextmanager
async def opened(join_s: float = NEVER_S) -> AsyncIterator[Open]:
    rollout, source = FakeRollout(), Source()
    work: Any = SimpleNamespace(rollout=rollout, is_over=False)
    async with asyncio.timeout(20), Desk(work, source, join_s) as desk:  # type: ignore[arg-type]
        yield Open(desk, rollout, source)
    assert rollout.is_closed


async def test_equal_requests_become_one_group_once_all_are_there() -> None:
    async with opened() as run:
        calls = [run.submit(5, 6, n=3) for _ in range(3)]
        (task,) = await run.until_begun(1)
        assert task.num_requests == 3
        for index in (2, 0, 1):
            run.answer(task, index)
        assert [(await call).index for call in calls] == [0, 1, 2], "each has its own"
        assert run.rollout.cancelled == []


async def test_the_time_of_a_group_that_is_whole_does_not_begin_the_next_one() -> None:
    async with opened() as run:
        first = run.submit(5, 6, n=2)
        await asyncio.sleep(0)
        (joining,) = run.desk._joining.values()
        assert joining.deadline is not None
        assert not joining.deadline.cancelled()
        second = run.submit(5, 6, n=2)
        (task,) = await run.until_begun(1)
        assert joining.deadline.cancelled()
        for index, call in enumerate((first, second)):
            run.answer(task, index)
            await call


async def test_without_a_number_a_group_begins_soon_after_its_first_request() -> None:
    async with opened(join_s=0.02) as run:
        calls = [run.submit(5, 6) for _ in range(2)]
        (first,) = await run.until_begun(1)
        assert first.num_requests == 2
        late = run.submit(5, 6)  # it runs as well, and is in a group of its own
        _, second = await run.until_begun(2)
        assert second.num_requests == 1
        assert second.group_id != first.group_id
        for task, index in ((second, 0), (first, 0), (first, 1)):
            run.answer(task, index)
        assert (await late).group_id == second.group_id
        assert {(await call).group_id for call in calls} == {first.group_id}


async def test_only_requests_that_are_alike_or_of_one_name_are_joined() -> None:
    async with opened() as run:
        short = {"max_tokens": 3}
        calls = [
            run.submit(5, 6, n=2),
            run.submit(5, 7, n=2),
            run.submit(5, 6, n=2, sampling=short),
            run.submit(5, 6, n=2, images=["one"]),
            run.submit(5, 6, n=2, images=["other"]),
            run.submit(5, 6, n=2, group="mine"),
            run.submit(5, 6, n=2, group="yours"),
        ]
        await asyncio.sleep(0)
        assert run.source.begun == []
        calls.append(run.submit(5, 6, n=2, group="mine"))
        (task,) = await run.until_begun(1)
        assert task.group_id.startswith("mine/")
        assert task.num_requests == 2
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)


async def test_a_name_is_free_again_once_its_group_has_begun() -> None:
    async with opened() as run:
        calls = [run.submit(5, 6, n=1, group="mine") for _ in range(2)]
        first, second = await run.until_begun(2)
        assert first.group_id != second.group_id
        for task in (first, second):
            run.answer(task, 0)
        assert {(await call).group_id for call in calls} == {
            first.group_id,
            second.group_id,
        }


async def test_a_bad_request_costs_only_its_caller() -> None:
    async with opened() as run:
        good = run.submit(5, 6, n=2, group="mine")
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match="another prompt or other settings"):
            await run.submit(5, 7, n=2, group="mine")
        with pytest.raises(ConfigError, match="its prompt is bad"):
            await run.submit(0, n=2)
        for n in (0, -1, "many"):
            with pytest.raises(ConfigError, match="an int >= 1, or None"):
                await run.submit(5, 6, n=n)
        other = run.submit(5, 6, n=2, group="mine")
        (task,) = await run.until_begun(1)
        for index, call in enumerate((good, other)):
            run.answer(task, index)
            assert (await call).index == index


async def test_who_gives_up_before_the_group_begins_is_no_part_of_it() -> None:
    async with opened() as run:
        left, stays = run.submit(5, 6, n=3), run.submit(5, 6, n=3)
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        last = run.submit(5, 6, n=3)
        (task,) = await run.until_begun(1)
        assert task.num_requests == 2
        for index, call in enumerate((stays, last)):
            run.answer(task, index)
            assert (await call).index == index
        assert run.rollout.cancelled == []


async def test_a_group_that_all_callers_gave_up_never_begins() -> None:
    async with opened(join_s=0.01) as run:
        call = run.submit(5, 6)
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        await asyncio.sleep(0.03)
        assert run.source.begun == []
        assert run.rollout.cancelled == []


async def test_a_group_is_cancelled_with_the_last_that_waits_for_it() -> None:
    async with opened() as run:
        calls = [run.submit(5, 6, n=3) for _ in range(3)]
        (task,) = await run.until_begun(1)
        calls[0].cancel()
        await asyncio.wait(calls[:1])
        assert run.rollout.cancelled == [], "two wait still"
        run.answer(task, 0)  # for nobody
        run.answer(task, 1)
        await calls[1]
        calls[2].cancel()
        await asyncio.wait(calls[2:])
        assert run.rollout.cancelled == [task.group_id]
        run.answer(task, 2)  # that was on its way
        await until(run.rollout.coming.empty)
        assert not run.desk._running


async def test_closing_answers_everybody_and_takes_nobody_any_more() -> None:
    async with opened() as run:
        waiting, joining = run.submit(5, n=1), run.submit(6, n=2)
        await run.until_begun(1)
        await run.desk.aclose()
        for call in (waiting, joining):
            with pytest.raises(RolloutClosedError, match="was closed before"):
                await call
        with pytest.raises(RolloutClosedError, match="was closed before"):
            await run.submit(5)
        await run.desk.aclose()


@pytest.mark.parametrize("is_over", [True, False])
async def test_what_ends_the_rollout_is_told_to_all_that_wait(is_over: bool) -> None:
    async with opened() as run:
        call = run.submit(5, n=1)
        await run.until_begun(1)
        run.rollout.coming.put_nowait(EngineClosedError("the engine was closed"))
        run.work.is_over = is_over
        with pytest.raises(EngineClosedError, match="the engine was closed"):
            await call
        with pytest.raises(EngineClosedError):
            await run.submit(5)


async def test_that_others_requests_failed_is_not_told_to_whoever_waits() -> None:
    """A rollout raises it at its end; whose request failed has it in the response."""
    async with opened() as run:
        call = run.submit(5, n=1)
        await run.until_begun(1)
        run.work.is_over = True
        run.rollout.coming.put_nowait(RolloutError("1 of 2 requests ended in an error"))
        with pytest.raises(RolloutClosedError, match="the desk's rollout has ended"):
            await call


async def test_a_rollout_that_failed_is_told_as_it_is() -> None:
    async with opened() as run:
        call = run.submit(5, n=1)
        await run.until_begun(1)
        run.rollout.coming.put_nowait(RolloutError("the rollout failed: a bug"))
        with pytest.raises(RolloutError, match="a bug"):
            await call


async def test_a_desk_that_was_never_entered_says_how_it_is_used() -> None:
    work: Any = SimpleNamespace(rollout=FakeRollout(), is_over=False)
    desk = Desk(work, Source(), NEVER_S)  # type: ignore[arg-type]
    with pytest.raises(RolloutClosedError, match=r"async with engine\.open_rollout"):
        await desk.submit([5])


async def test_figures_are_the_rollouts() -> None:
    async with opened() as run:
        assert run.desk.report == "the report"
        assert run.desk.progress() == "the progress"
