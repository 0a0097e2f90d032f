"""One body for plain and asyncio code: each step's end comes back to its `yield`."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest

from aseer.runtime.steps import Either, drive, drive_blocking, result_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from aseer.runtime.steps import Step


def done(result: object) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


def both(steps: Callable[[], Generator[Step, Any, Any]]) -> list[Any]:
    """What a body returns, in plain code and on a loop."""
    return [drive_blocking(steps()), asyncio.run(drive(steps()))]


def test_each_steps_result_is_the_value_of_its_yield() -> None:
    async def awaited() -> str:
        await asyncio.sleep(0)
        return "either"

    def steps() -> Generator[Step, Any, list[Any]]:
        first = yield done(1)
        second = yield Either(lambda: "either", awaited)
        return [first, second]

    assert both(steps) == [[1, "either"]] * 2


def test_a_body_without_steps_just_returns() -> None:
    def steps() -> Generator[Step, Any, int]:
        return 3
        yield done(0)

    assert both(steps) == [3, 3]


@pytest.mark.parametrize("kind", ["future", "either"])
def test_an_error_is_raised_at_the_yield_and_the_body_may_go_on(kind: str) -> None:
    def fail() -> None:
        raise KeyError("x")

    async def fail_async() -> None:
        fail()

    def steps() -> Generator[Step, Any, str]:
        try:
            yield done(KeyError("x")) if kind == "future" else Either(fail, fail_async)
        except KeyError:
            after = yield done("after")
            return str(after)
        return "no error"

    assert both(steps) == ["after", "after"]


def test_an_error_that_the_body_does_not_take_is_the_callers() -> None:
    def steps() -> Generator[Step, Any, None]:
        yield done(KeyError("x"))

    with pytest.raises(KeyError):
        drive_blocking(steps())
    with pytest.raises(KeyError):
        asyncio.run(drive(steps()))


def test_an_interrupt_comes_to_the_body() -> None:
    heard = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def steps() -> Generator[Step, Any, None]:
        try:
            yield Either(interrupt, lambda: asyncio.sleep(0))
        except KeyboardInterrupt:
            heard.append("interrupt")
            raise

    with pytest.raises(KeyboardInterrupt):
        drive_blocking(steps())
    assert heard == ["interrupt"]


async def test_a_cancelled_wait_comes_to_the_body_and_spares_the_future() -> None:
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    heard = []

    def steps() -> Generator[Step, Any, None]:
        try:
            yield future
        except asyncio.CancelledError:
            heard.append("cancelled")
            heard.append((yield done("cleaned up")))
            raise

    driving = asyncio.get_running_loop().create_task(drive(steps()))
    await asyncio.sleep(0)
    driving.cancel()
    await asyncio.wait([driving])
    assert driving.cancelled()
    assert heard == ["cancelled", "cleaned up"]
    future.set_result(1)  # which nothing has cancelled


class Thread:
    def __init__(self) -> None:
        self.cancelled: list[Future[Any]] = []

    def cancel(self, future: Future[Any]) -> None:
        self.cancelled.append(future)


async def test_who_waits_no_more_cancels_the_call() -> None:
    thread, call = Thread(), Future[int]()
    call.set_running_or_notify_cancel()
    waiting = asyncio.get_running_loop().create_task(result_of(thread, call))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert thread.cancelled == [call]
    call.set_exception(KeyError("x"))


async def test_a_calls_result_or_error_is_the_waits() -> None:
    thread = Thread()
    assert await result_of(thread, done(7)) == 7  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        await result_of(thread, done(KeyError("x")))  # type: ignore[arg-type]
    assert thread.cancelled == []


async def test_an_error_that_comes_when_nobody_waits_any_more_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thread, call = Thread(), Future[int]()
    waiting = asyncio.get_running_loop().create_task(result_of(thread, call))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    call.set_exception(KeyError("x"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del waiting
    gc.collect()
    assert caplog.text == ""
