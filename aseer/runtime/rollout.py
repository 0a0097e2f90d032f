"""A rollout as its user sees it: an iterator of responses, in asyncio code or in plain
code.

    async with engine.rollout(groups) as rollout:
        async for response in rollout:
            ...

Both forms only read. What they read from is their `Work` (`aseer.runtime.work`), the
rollout's one life: it is opened at the first read, and read to its end, or left before.
Responses come from the engine's thread through its mailbox. Groups go the other way
from its source, which whoever reads drives along (`aseer.runtime.group_source`).

Leaving the `async with` block leaves the rollout, and waits until the engines have
stopped its work. A bare `for` loop that ends by a break, an exception or cancellation
leaves the rollout as well, because the iterator that only the loop held is gone then.
If something else holds that iterator (a variable, a debugger), the engine cannot know
that the loop is over; the `async with` form does not depend on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from aseer.runtime.mailbox import MailboxClosed
from aseer.runtime.steps import drive, drive_blocking, spared

if TYPE_CHECKING:
    from types import TracebackType

    from aseer.report import Progress, RolloutReport
    from aseer.runtime.work import Work
    from aseer.types import Response

T = TypeVar("T")
R = TypeVar("R")


class _Loop(Generic[T]):
    """The iterator of a `for` loop; dropping the iterator leaves an unfinished rollout.

    A frame that is left by an exception drops its reference to the iterator first:
    somebody may keep the exception, and with it the frames of its traceback.
    """

    def __init__(self, work: Work, next_item: Callable[[], T]) -> None:
        self._work = work
        self._next_item = next_item

    def __del__(self) -> None:
        self._work.leave()


class _AsyncLoop(_Loop[Awaitable[R]], AsyncIterator[R]):
    """What `async for` holds."""

    async def __anext__(self) -> R:
        next_item = self._next_item
        try:
            return await next_item()
        except BaseException:
            del self
            raise


class _SyncLoop(_Loop[R], Iterator[R]):
    """What `for` holds."""

    def __next__(self) -> R:
        next_item = self._next_item
        try:
            return next_item()
        except BaseException:
            del self
            raise


class Rollout:
    """Responses in the order they finish, for `async for`; see `Engine.rollout`.

    A rollout is read once: every loop over it takes from the same responses. To read
    from a rollout that was left raises `RolloutClosedError`.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except Exception:
            raise
        except BaseException:  # interrupted: the block's end, which leaves, never comes
            self._work.leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Response]:
        return _AsyncLoop(self._work, self._next)

    def by_group(self) -> AsyncIterator[list[Response]]:
        """Whole groups in the order they are complete, members by index."""
        return _AsyncLoop(self._work, self._next_group)

    @property
    def report(self) -> RolloutReport:
        """Figures of the finished rollout.

        Raises:
            AseerError: the rollout is not finished.
        """
        return self._work.report

    def progress(self) -> Progress | None:
        """How the rollout stands; None before it begins.

        A fraction of a second old, and with more than 1,000 instances some seconds.
        """
        return self._work.progress()

    def cancel(self, group_id: str) -> None:
        """End a group early, from any thread.

        Its running work is aborted and its unfinished requests come as Responses with
        finish reason `aborted` and the tokens they have. A group that is finished is
        left alone.

        Raises:
            ConfigError: no group of that id was given so far.
        """
        self._work.cancel(group_id)

    async def aclose(self) -> None:
        """Stop the work and wait until the engines have; safe to call at any time."""
        self._work.leave()
        await self._work.source.wait_stopped()
        await drive(self._work.close())

    async def _open(self) -> None:
        work = self._work
        if work.session is not None:
            return
        # The iterator of a loop before this one may be kept until this task is
        # suspended, and with it that loop's rollout, which would be in the way.
        await asyncio.sleep(0)
        opening = work.open(asyncio.current_task())
        work.begin(await spared(opening))  # goes on if this wait is cancelled
        work.check_not_left()  # by somebody else meanwhile
        work.source.start_pump()  # takes groups of an async iterator from here on

    async def _next(self) -> Response:
        work = self._work
        try:
            await self._open()
            work.check_not_left()
            # Groups of a plain iterator are taken here, a few before each response, so
            # that the iterator runs in the reader's own thread and is never far ahead.
            more = work.source.pull()
            while more and not work.mailbox.has_items:
                await asyncio.sleep(0)
                more = work.source.pull()
            try:
                response = await work.mailbox.get()
            except MailboxClosed:
                await work.source.wait_stopped()
                response = work.ended()  # or raises how it ended
        except StopIteration:  # which no coroutine may raise
            raise StopAsyncIteration from None
        except asyncio.CancelledError:
            # If this task asks for the engine before it reads on, it has left.
            work.mailbox.give_up(asyncio.current_task())
            raise
        work.source.yielded()
        return response

    async def _next_group(self) -> list[Response]:
        while True:
            group = self._work.complete_group(await self._next())
            if group is not None:
                return group


class SyncRollout:
    """Responses in the order they finish, for `for`; see `Engine.rollout_sync`.

    A rollout is read once: every loop over it takes from the same responses. To read
    from a rollout that was left raises `RolloutClosedError`.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> Self:
        try:
            self._open()
        except Exception:
            raise
        except BaseException:  # interrupted: the block's end, which leaves, never comes
            self._work.leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Response]:
        return _SyncLoop(self._work, self._next)

    def by_group(self) -> Iterator[list[Response]]:
        """Whole groups in the order they are complete, members by index."""
        return _SyncLoop(self._work, self._next_group)

    @property
    def report(self) -> RolloutReport:
        """See `Rollout.report`."""
        return self._work.report

    def progress(self) -> Progress | None:
        """See `Rollout.progress`."""
        return self._work.progress()

    def cancel(self, group_id: str) -> None:
        """See `Rollout.cancel`."""
        self._work.cancel(group_id)

    def close(self) -> None:
        """Stop the work and wait until the engines have; safe to call at any time."""
        drive_blocking(self._work.close())

    def _open(self) -> None:
        work = self._work
        if work.session is None:
            work.begin(work.open(None).result())

    def _next(self) -> Response:
        work = self._work
        try:
            self._open()
            work.check_not_left()
            more = work.source.pull()  # see `Rollout._next`
            while more and not work.mailbox.has_items:
                more = work.source.pull()
            try:
                response = work.mailbox.get_blocking()
            except MailboxClosed:
                response = work.ended()  # or raises how it ended
        except (KeyboardInterrupt, SystemExit):
            work.leave()  # whoever interrupts a wait does not come back to it
            raise
        work.source.yielded()
        return response

    def _next_group(self) -> list[Response]:
        while True:
            group = self._work.complete_group(self._next())
            if group is not None:
                return group
