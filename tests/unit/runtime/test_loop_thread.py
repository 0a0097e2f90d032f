"""A thread's loop: whatever ends a call, its future is completed."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from aseer.errors import EngineClosedError, EngineError
from aseer.runtime.loop_thread import LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

    Main = Callable[[asyncio.Event], Coroutine[Any, Any, None]]

# What a test waits for comes at once, or never.
SOON_S = 10.0


async def until_stopped(stop: asyncio.Event) -> None:
    await stop.wait()


def started(main: Main = until_stopped) -> LoopThread:
    """A thread that takes calls already."""
    thread, is_up = LoopThread("test"), threading.Event()

    async def serve(stop: asyncio.Event) -> None:
        is_up.set()
        await main(stop)

    thread.start(serve)
    assert is_up.wait(SOON_S)
    return thread


@contextmanager
def running() -> Iterator[LoopThread]:
    thread = started()
    try:
        yield thread
    finally:
        thread.request_stop()
        assert thread.join(SOON_S)


@contextmanager
def held(thread: LoopThread) -> Iterator[None]:
    """The loop does nothing meanwhile; what is posted is done in one go after it."""
    is_held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        go_on.wait(SOON_S)

    assert thread.post(hold)
    assert is_held.wait(SOON_S)
    try:
        yield
    finally:
        go_on.set()


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


def test_a_call_returns_what_the_coroutine_returned() -> None:
    async def seven() -> int:
        await asyncio.sleep(0)
        return 7

    with running() as thread:
        assert thread.submit(seven).result(SOON_S) == 7


def test_a_calls_error_is_its_own() -> None:
    async def fail() -> None:
        raise KeyError("x")

    async def fine() -> str:
        return "fine"

    with running() as thread:
        with pytest.raises(KeyError):
            thread.submit(fail).result(SOON_S)
        assert thread.submit(fine).result(SOON_S) == "fine"
    assert thread.failure is None


def test_a_call_that_is_not_even_a_coroutine_is_its_own_error() -> None:
    def fail() -> None:
        raise KeyError("x")

    with running() as thread, pytest.raises(KeyError):
        thread.submit(fail).result(SOON_S)  # type: ignore[arg-type]


def test_calls_begin_in_the_order_of_their_submission() -> None:
    began: list[int] = []

    async def note(i: int) -> None:
        began.append(i)

    with running() as thread:
        with held(thread):
            calls = [thread.submit(lambda i=i: note(i)) for i in range(50)]  # type: ignore[misc]
        for call in calls:
            call.result(SOON_S)
    assert began == list(range(50))


def test_a_cancelled_call_ends_and_so_does_the_wait_for_it() -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await forever()
        finally:
            ended.set()

    with running() as thread:
        call = thread.submit(wait)
        thread.submit(lambda: asyncio.sleep(0)).result(SOON_S)
        thread.cancel(call)
        with pytest.raises(EngineClosedError):
            call.result(SOON_S)
        assert ended.is_set()


def test_a_call_that_is_cancelled_before_its_first_step_ends_too() -> None:
    with running() as thread:
        with held(thread):
            call = thread.submit(forever)
            thread.cancel(call)
        with pytest.raises(EngineClosedError):
            call.result(SOON_S)


def test_cancelling_what_is_over_changes_nothing() -> None:
    async def seven() -> int:
        return 7

    with running() as thread:
        call = thread.submit(seven)
        assert call.result(SOON_S) == 7
        thread.cancel(call)
        assert thread.submit(seven).result(SOON_S) == 7
        assert call.result() == 7


def test_the_end_of_the_thread_ends_calls_that_wait_and_those_that_did_not_begin() -> (
    None
):
    with running() as thread:
        waiting = thread.submit(forever)
        thread.submit(lambda: asyncio.sleep(0)).result(SOON_S)
        with held(thread):
            thread.request_stop()
            late = [thread.submit(forever) for _ in range(3)]
        for call in (waiting, *late):
            with pytest.raises(EngineClosedError, match="closed"):
                call.result(SOON_S)
    with pytest.raises(EngineClosedError):
        thread.submit(forever)
    assert not thread.post(lambda: None)


def test_a_call_made_while_calls_are_ended_ends_too() -> None:
    late = []

    with running() as thread:

        async def makes_another() -> None:
            try:
                await forever()
            finally:
                late.append(thread.submit(forever))

        first = thread.submit(makes_another)
        thread.submit(lambda: asyncio.sleep(0)).result(SOON_S)
    for call in (first, *late):
        with pytest.raises(EngineClosedError):
            call.result(SOON_S)
    assert len(late) == 1


def test_a_failed_thread_tells_every_caller_the_cause() -> None:
    async def fail(stop: asyncio.Event) -> None:
        await stop.wait()
        raise ExceptionGroup("outer", [OSError("no room")])

    thread = started(fail)
    call = thread.submit(forever)
    thread.request_stop()
    assert thread.join(SOON_S)
    for _ in range(2):
        with pytest.raises(EngineError, match="OSError: no room") as caught:
            call.result(SOON_S)
        assert isinstance(caught.value.__cause__, OSError)
        assert not isinstance(caught.value, EngineClosedError)
    with pytest.raises(EngineError, match="no room"):
        thread.submit(forever)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_the_whole_thread_ends_the_call_it_came_from() -> None:
    async def leave() -> None:
        raise SystemExit(3)

    thread = started()
    other = thread.submit(forever)
    call = thread.submit(leave)
    assert thread.join(SOON_S)
    for future in (call, other):
        with pytest.raises(EngineError, match="SystemExit"):
            future.result(SOON_S)
    assert isinstance(thread.failure, SystemExit)


def test_a_stop_before_the_loop_runs_is_not_lost() -> None:
    thread = LoopThread("test")
    thread.request_stop()
    thread.start(until_stopped)
    assert thread.join(SOON_S)
    assert thread.failure is None
    thread.request_stop()


def test_nothing_can_be_called_before_the_start() -> None:
    thread = LoopThread("test")
    assert not thread.post(lambda: None)
    with pytest.raises(EngineClosedError):
        thread.submit(forever)


def test_what_is_posted_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise KeyError("x")

    with running() as thread:
        done = threading.Event()
        thread.post(fail)
        thread.post(done.set)
        assert done.wait(SOON_S)
    assert thread.failure is None
    assert "a call posted to the engine's thread failed" in caplog.text


def test_a_join_that_takes_too_long_says_so() -> None:
    with running() as thread:
        assert not thread.join(0.0)


def test_a_thread_that_cannot_be_had_is_an_error_that_says_where_to_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(EngineError, match=r"can't start new thread.*limits"):
        LoopThread("test").start(until_stopped)
