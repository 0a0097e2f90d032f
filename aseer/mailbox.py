"""A queue from the engine's thread to whoever consumes: an event loop or a plain
thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

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

    @property
    def is_closed(self) -> bool:
        """Whether nothing will come any more."""
        return self._closed

    def put(self, item: T) -> None:
        """Add an item."""
        with self._changed:
            self._items.append(item)
            self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """No more items; `error` is raised once all are taken. The first call
        counts.
        """
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
        while True:
            with self._changed:
                if self._items or self._closed:
                    return self._take()
                waiter = loop.create_future()
                self._waiters.append((loop, waiter))
            await waiter

    def get_blocking(self) -> T:
        """The next item, blocking this thread.

        Raises:
            MailboxClosed: there is none and it is closed.
        """
        with self._changed:
            while not (self._items or self._closed):
                self._changed.wait()
            return self._take()

    def _take(self) -> T:
        if self._items:
            return self._items.popleft()
        if self._error is not None:
            raise self._error
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
