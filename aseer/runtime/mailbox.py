"""A queue from the engine's thread to whoever consumes: an event loop or a plain
thread.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class MailboxClosed(Exception):
    """Nothing is left and nothing will come."""


class Mailbox(Generic[T]):
    """Unbounded, thread-safe; the consumer may wait in either way.

    Its bound is the rollout itself: one item a response.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._closed = False
        self._error: BaseException | None = None
        self._gave_up: weakref.ref[object] | None = None
        self._reader: weakref.ref[object] | None = None  # the last that asked
        self._num_blocked = 0
        #: Whether nothing more comes beyond what is on its way, unless somebody reads.
        self.needs_reader: Callable[[], bool] = lambda: False

    @property
    def is_closed(self) -> bool:
        """Whether nothing will come any more."""
        return self._closed

    @property
    def error(self) -> BaseException | None:
        """Why nothing will come any more, if that is an error."""
        return self._error

    @property
    def has_items(self) -> bool:
        """Whether `get` would not wait."""
        return bool(self._items) or self._closed

    def give_up(self, reader: object) -> None:
        """A reader's wait was broken off, and the reader may or may not come back."""
        self._gave_up = weakref.ref(reader)

    def was_given_up_by(self, reader: object) -> bool:
        """Whether this reader broke a wait off, and nobody waits, or has since."""
        gave_up = self._gave_up
        if self._waiters or self._num_blocked:
            return False
        return reader is not None and gave_up is not None and gave_up() is reader

    def is_held_up_by(self, reader: object) -> bool:
        """Whether the end cannot come before this task or thread reads on."""
        if self._reader is None or self._waiters or self._num_blocked:
            return False
        return self._reader() is reader and self.needs_reader()

    def put(self, item: T) -> None:
        """Add an item."""
        with self._changed:
            self._items.append(item)
            self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """No more items; `error` is why, if that is an error. The first call counts."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._error = error
            self._wake()

    async def get(self) -> T:
        """The next item, waiting on the running event loop.

        Raises:
            MailboxClosed: there is none and it is closed.
        """
        loop = asyncio.get_running_loop()
        self._gave_up = None
        self._reader = weakref.ref(asyncio.current_task(loop))
        while True:
            with self._changed:
                if self._items or self._closed:
                    return self._take()
                waiting = (loop, loop.create_future())
                self._waiters.append(waiting)
            try:
                await waiting[1]
            except BaseException:  # who breaks off many waits leaves nothing behind
                with self._changed, suppress(ValueError):  # woken just now
                    self._waiters.remove(waiting)
                raise

    def get_blocking(self) -> T:
        """The next item, blocking this thread.

        Raises:
            MailboxClosed: there is none and it is closed.
        """
        self._reader = weakref.ref(threading.current_thread())
        with self._changed:
            self._num_blocked += 1
            try:
                while not (self._items or self._closed):
                    self._changed.wait()
                return self._take()
            finally:
                self._num_blocked -= 1

    def _take(self) -> T:
        if self._items:
            return self._items.popleft()
        raise MailboxClosed

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, waiter in self._waiters:
            with suppress(RuntimeError):  # its loop is closed: nobody waits there
                loop.call_soon_threadsafe(_resolve, waiter)
        self._waiters.clear()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
