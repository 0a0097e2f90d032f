"""A thread that runs one event loop, and the ways into that loop from other threads.

    other threads                          this thread
    submit(coroutine function) --------->  a task; its result, or its error, comes back
    post(function)             --------->  a callback; an error is its own to tell

Whatever ends a call completes the future that somebody waits for: the call's own end,
its cancellation, and the end of the thread, which fails the calls that are left.

A process that the user forks has a copy of all this, and no thread: what is asked of
the copy is refused, and to end it does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from aseer.errors import EngineClosedError, EngineError, describe, root_of
from aseer.runtime.turns import short_turns
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

_log = logging.getLogger("aseer")
# A join looks that often whether this process was stopped meanwhile.
_JOIN_STEP_S = 0.5


class LoopThread:
    """Runs `main` on an event loop of its own until `main` returns."""

    def __init__(self, name: str) -> None:
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: asyncio.TaskGroup
        self._tasks: dict[Future[Any], asyncio.Task[None]] = {}
        self._pending: set[Future[Any]] = set()
        self._stop: asyncio.Event | None = None
        self._is_stopping = self._is_ending = False
        self._main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # From other threads

    @property
    def is_here(self) -> bool:
        """Whether it is this process's, and not that of one which forked this one."""
        return os.getpid() == self._pid

    def start(self, main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
        """Start the thread.

        Args:
            main: runs on the thread's loop; is to return soon after the event is set.
        Raises:
            EngineError: the system has no room for a thread.
        """
        self._main = main
        try:
            self._thread.start()
        except RuntimeError as error:
            raise EngineError(
                f"the engine's thread cannot be started ({error}); look at the limits "
                "on processes and memory"
            ) from error

    def request_stop(self) -> None:
        """Set `main`'s event; `ended` tells when the thread is over. Idempotent."""
        if not self.is_here:
            return
        self._is_stopping = True  # for a thread that has no loop yet
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None:
            with suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(stop.set)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it ended."""
        if not self.is_here:
            return True
        clock = WakingClock(2 * _JOIN_STEP_S)
        while self._thread.is_alive() and clock.read() < timeout_s:
            self._thread.join(_JOIN_STEP_S)
        return not self._thread.is_alive()

    def post(self, function: Callable[[], object]) -> bool:
        """Run a function on the loop, soon; False if the thread has ended."""
        loop = self._loop
        if loop is None or not self.is_here or self.ended.is_set():
            return False
        try:
            loop.call_soon_threadsafe(self._do, function)
        except RuntimeError:  # the loop was closed meanwhile
            return False
        return True

    def submit(self, call: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine function on the loop; the future has what comes of it.

        Raises:
            EngineError: the thread has ended; the cause, if it failed.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # it is cancelled by `cancel` alone
        self._pending.add(future)
        if not self.post(lambda: self._begin(call, future)):
            self._pending.discard(future)
            raise self.closed_error()
        if self.ended.is_set():  # it may have ended before it took the call
            self._fail_pending()
        return future

    def cancel(self, future: Future[Any]) -> None:
        """Cancel a submitted call that nobody waits for any more."""
        self.post(lambda: self._cancel(future))

    def closed_error(self) -> EngineError:
        """What a call is told once nothing can run any more."""
        if not self.is_here:
            return EngineClosedError(
                f"the engine is open in process {self._pid}, and process {os.getpid()} "
                "was forked from that one; use it there, or open another engine here"
            )
        if self.failure is None:
            return EngineClosedError("the engine is closed")
        error = EngineError(f"the engine failed: {describe(self.failure)}")
        error.__cause__ = root_of(self.failure)
        return error

    # On the thread

    def _run(self) -> None:
        try:
            runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
            with short_turns(), runner:
                runner.run(self._serve())
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            self.ended.set()
            self._fail_pending()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if self._is_stopping:
            self._stop.set()
        async with asyncio.TaskGroup() as self._calls:
            try:
                await self._main(self._stop)
            except BaseException as error:
                self.failure = self.failure or error
                raise
            finally:
                self._is_ending = True
                for task in self._tasks.values():
                    task.cancel()

    def _begin(
        self, call: Callable[[], Coroutine[Any, Any, T]], future: Future[T]
    ) -> None:
        if self._is_ending:  # it fails with the calls that are left
            return
        task = self._calls.create_task(self._complete(call, future))
        self._tasks[future] = task
        task.add_done_callback(lambda _: self._over(future))

    async def _complete(
        self, call: Callable[[], Coroutine[Any, Any, T]], future: Future[T]
    ) -> None:
        try:
            result = await call()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # it ends the thread, and this call with it
            self.failure = self.failure or error
            raise
        else:
            future.set_result(result)

    def _over(self, future: Future[Any]) -> None:
        """A call's task has ended, be it by a cancellation before its first step."""
        self._tasks.pop(future, None)
        self._pending.discard(future)
        if not future.done():
            future.set_exception(self.closed_error())

    def _cancel(self, future: Future[Any]) -> None:
        task = self._tasks.get(future)
        if task is not None:
            task.cancel()

    def _fail_pending(self) -> None:
        for future in list(self._pending):
            with suppress(Exception):  # completed by the other thread just now
                future.set_exception(self.closed_error())
        self._pending.clear()

    def _do(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception:
            _log.exception("a call posted to the engine's thread failed")
