"""Work in steps that waits for other threads: one body for asyncio code and plain code.

A body is a generator. It yields a future of another thread's to get the future's
result, or `Either` to have something done in the way of whoever runs it: `drive` runs a
body on an event loop, `drive_blocking` in a plain thread. However a step ends, the body
hears of it at its `yield`, and may clean up.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from aseer.runtime.loop_thread import LoopThread

T = TypeVar("T")


class Either(NamedTuple):
    """A step that plain code calls and asyncio code awaits."""

    blocking: Callable[[], Any]
    awaited: Callable[[], Awaitable[Any]]


Step = Future[Any] | Either


async def drive(steps: Generator[Step, Any, T]) -> T:
    """Run steps on the running event loop; futures outlive a wait that is cancelled."""
    resume: Callable[[], Step] = partial(next, steps)
    while True:
        try:
            step = resume()
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            if isinstance(step, Either):
                value = await step.awaited()
            else:
                value = await spared(step)
            resume = partial(steps.send, value)
        except BaseException as error:
            resume = partial(steps.throw, error)


def drive_blocking(steps: Generator[Step, Any, T]) -> T:
    """Run steps in this thread."""
    resume: Callable[[], Step] = partial(next, steps)
    while True:
        try:
            step = resume()
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            value = step.blocking() if isinstance(step, Either) else step.result()
            resume = partial(steps.send, value)
        except BaseException as error:
            resume = partial(steps.throw, error)


async def spared(future: Future[T]) -> T:
    """Wait for another thread's future, which outlives a wait that is cancelled."""
    waiting = asyncio.wrap_future(future)
    # An error that comes when nobody waits any more is nobody's: asyncio would log it.
    waiting.add_done_callback(lambda w: w.cancelled() or w.exception())
    await asyncio.wait([waiting])
    return waiting.result()


async def result_of(thread: LoopThread, call: Future[T]) -> T:
    """Wait for a call on a thread's loop; cancel it if this wait is cancelled."""
    try:
        return await spared(call)
    except asyncio.CancelledError:
        thread.cancel(call)
        raise
