"""A rollout's groups on their way to the engine, in the user's thread.

A list is handed over at once. From an iterator groups are taken while fewer than
`max_pending_requests` requests are unfinished, a few at a time, and never before a
response that is ready is read; from an async iterator by a task of the reader's loop.

Every group that was taken from the user is accounted for: the session takes it, or its
requests come as aborted responses at the rollout's end. What goes wrong with the user's
iterator is raised at the end, too, after every response.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from aseer.buffer import aborted_responses
from aseer.errors import ConfigError, RolloutError, describe
from aseer.groups import check_group_id, check_groups
from aseer.journal.keys import KeyMaker
from aseer.watch import wait_awake

if TYPE_CHECKING:
    from aseer.groups import Group, GroupResolver, Groups
    from aseer.types import GroupKey, Response, Task

_log = logging.getLogger("aseer")

# Groups that one call to `pull` takes at most: encoding their prompts takes
# milliseconds, in which no response is read.
_PULL_AT_ONCE = 256
_NO_MORE: Any = object()
# For an async iterator that is cancelled to end, and clean up what it has.
_LONGEST_STOP_S = 30.0
# An async iterator that never waits is interrupted this often for others on its loop.
_LONGEST_TURN_S = 0.002


class TakesGroups(Protocol):
    """What a source of groups needs of a session."""

    @property
    def weight_version(self) -> int: ...

    def offer(self, tasks: list[Task]) -> bool:
        """Hand groups over; False if no more are taken."""
        ...

    def check_group(self, key: GroupKey) -> None:
        """See that a group fits the rollout's journal.

        Raises:
            ConfigError: it does not.
        """
        ...

    def close_intake_soon(self) -> None:
        """No more groups will be offered; from any thread."""
        ...


class GroupSource:
    """Takes a rollout's groups from its user, and keeps account of them."""

    def __init__(
        self,
        resolver: GroupResolver,
        groups: Groups,
        max_pending_requests: int,
        *,
        has_journal: bool = False,
    ) -> None:
        """Check the groups of a list; take none from an iterator yet.

        Args:
            has_journal: groups get keys, by which a journal knows them.
        Raises:
            ConfigError: a group of a list that cannot run.
        """
        self._resolver = resolver
        self._keys = KeyMaker() if has_journal else None
        self._max_pending = max_pending_requests
        self._session: TakesGroups | None = None
        self._source: Iterator[Group] | None = None
        self._async_source: AsyncIterable[Group] | None = None
        self._error: BaseException | None = None
        self._is_stopped = False
        self._num_taken = 0
        self._num_yielded = 0
        self._sizes: dict[str, int] = {}
        self._refused: deque[Response] = deque()
        self._room = asyncio.Event()
        self._waits_for_room = False
        self._pulling = threading.Lock()  # several threads may read one rollout
        self._puller = 0
        self._lock = threading.Lock()
        self._pump: asyncio.Task[None] | None = None
        self._ready: list[Task] = []
        check_groups(groups)
        if isinstance(groups, AsyncIterable):
            self._async_source = groups
        elif isinstance(groups, Iterator):
            self._source = groups
        else:
            self._ready = [self._count(task) for task in resolver.resolve_all(groups)]

    @property
    def needs_reader(self) -> bool:
        """Whether there may be more groups, which are taken only as somebody reads."""
        is_pulled = self._source is not None or self._waits_for_room
        return is_pulled and not self._is_stopped

    @property
    def keys(self) -> list[GroupKey] | None:
        """Of all groups, where they came as a list that has not begun; else None."""
        if self._source is not None or self._async_source is not None:
            return None
        return [task.key for task in self._ready if task.key is not None]

    def size_of(self, group_id: str) -> int:
        """Requests of a group that was taken."""
        return self._sizes[group_id]

    def check_known(self, group_id: str) -> None:
        """See that a group was taken.

        Raises:
            ConfigError: it was not.
        """
        if check_group_id(group_id) not in self._sizes:
            raise ConfigError(
                f"there is no group {group_id!r} among the {len(self._sizes)} "
                "given to this rollout so far"
            )

    def begin(self, session: TakesGroups) -> None:
        """Hand over what a list had; from here on the session gets all groups."""
        self._session = session
        ready, self._ready = self._ready, []
        self._offer(ready)
        if self._source is None and self._async_source is None:
            session.close_intake_soon()

    def pull(self) -> bool:
        """Take some groups from a plain iterator, if there is room for more requests.

        Returns:
            Whether it is worth calling again at once.

        Raises:
            RolloutError: the iterator itself called.
        """
        if not self._pulling.acquire(blocking=False):
            if self._puller == threading.get_ident():
                raise RolloutError(
                    "the iterator of groups reads from the rollout that it feeds; "
                    "hand over what it needs in another way"
                )
            return False  # another thread takes groups
        try:
            self._puller = threading.get_ident()
            return self._pull()
        finally:
            self._puller = 0
            self._pulling.release()

    def _pull(self) -> bool:
        if self._source is None or not self._has_room:
            return False
        tasks: list[Task] = []
        try:
            while len(tasks) < _PULL_AT_ONCE and self._has_room:
                group = _NO_MORE if self._is_stopped else next(self._source, _NO_MORE)
                if group is _NO_MORE:
                    self._source = None
                    break
                tasks.append(self._resolve(group))
        except Exception as error:  # the user's iterator, or a bad group of theirs
            self._error = error
            self._source = None
        finally:  # whatever interrupts it, what was taken is not lost
            self._offer(tasks)
            if self._source is None or self._is_stopped:
                self._end()
        return self._source is not None and self._has_room

    def start_pump(self) -> None:
        """Take groups from an async iterator, if there is one, on the running loop."""
        if self._async_source is not None and self._pump is None:
            # A task outside of any group: it outlives the call that starts it, and
            # ends with the rollout.
            loop = asyncio.get_running_loop()
            self._pump = loop.create_task(self._take_from(self._async_source))

    async def _take_from(self, source: AsyncIterable[Group]) -> None:
        turn_began = time.monotonic()
        try:
            async for group in source:
                self._offer([self._resolve(group)])
                if self._is_stopped:
                    break
                await self._wait_for_room()
                if time.monotonic() - turn_began > _LONGEST_TURN_S:
                    await asyncio.sleep(0)
                    turn_began = time.monotonic()
        except asyncio.CancelledError as error:
            if self._is_stopped:
                raise
            # Not ours: the user's iterator waited for something that was cancelled.
            self._error = RolloutError(
                "the async iterator of groups ended by a CancelledError of its own: "
                "what it waited for was cancelled"
            )
            self._error.__cause__ = error
        except Exception as error:  # the user's iterator, or a bad group of theirs
            self._error = error
        finally:
            self._end()

    async def _wait_for_room(self) -> None:
        while not self._has_room:
            self._room.clear()
            self._waits_for_room = True
            try:
                await self._room.wait()
            finally:
                self._waits_for_room = False

    def stop(self) -> None:
        """Take no further groups, from any thread."""
        self._is_stopped = True
        pump = self._pump
        if pump is not None and not pump.done():
            with suppress(RuntimeError):  # its loop is closed: it is gone already
                pump.get_loop().call_soon_threadsafe(pump.cancel)

    async def wait_stopped(self) -> None:
        """Stop, and wait until nothing is taken from the user's iterator any more."""
        self.stop()
        pump = self._pump
        if pump is None or pump.get_loop() is not asyncio.get_running_loop():
            return
        await wait_awake(pump, _LONGEST_STOP_S)
        if not pump.done():
            _log.warning(
                "the async iterator of groups was cancelled %g s ago and still waits "
                "for something; the rollout does not wait for it any longer",
                _LONGEST_STOP_S,
            )

    def yielded(self) -> None:
        """The user got a response: there is room for another request."""
        with self._lock:
            self._num_yielded += 1
        self._room.set()

    def next_refused(self) -> Response | None:
        """The next response of a group that the session took no more."""
        with self._lock:
            return self._refused.popleft() if self._refused else None

    def raise_error(self) -> None:
        """At the end, after every response: what went wrong with the user's groups."""
        error, self._error = self._error, None
        if isinstance(error, StopIteration | StopAsyncIteration):
            # Of a tokenizer, say; raised as it is, it would be taken for the end.
            raise RolloutError(
                f"a group could not be taken: its encoding raised {describe(error)}"
            ) from error
        if error is not None:
            raise error

    @property
    def _has_room(self) -> bool:
        return self._num_taken - self._num_yielded < self._max_pending

    def _resolve(self, group: Group) -> Task:
        task = self._count(self._resolver.resolve(group))
        if task.key is not None and self._session is not None:
            self._session.check_group(task.key)
        return task

    def _count(self, task: Task) -> Task:
        self._sizes[task.group_id] = task.num_requests
        self._num_taken += task.num_requests
        if self._keys is None:
            return task
        has_own_id = not self._resolver.has_made(task.group_id)
        return replace(task, key=self._keys.key_of(task, has_own_id=has_own_id))

    def _offer(self, tasks: list[Task]) -> None:
        session = self._session
        assert session is not None
        if tasks and not session.offer(tasks):
            self._is_stopped = True
            for task in tasks:
                self._refused += aborted_responses(task, session.weight_version)

    def _end(self) -> None:
        self._source = None
        if self._session is not None:
            self._session.close_intake_soon()


class OpenSource(GroupSource):
    """Groups that are handed over one at a time, as they come; none is remembered."""

    def __init__(self, resolver: GroupResolver) -> None:
        """Start with none."""
        super().__init__(resolver, [], sys.maxsize)

    def begin(self, session: TakesGroups) -> None:
        """The session takes groups from here on, until it ends."""
        self._session = session

    def prepare(self, group: Group) -> Task:
        """A group as a task that nothing knows of yet.

        Raises:
            ConfigError: it cannot run.
        """
        return self._resolver.prepare(group)

    def check_known(self, group_id: str) -> None:
        """Whoever hands groups over names only their own."""

    def add(self, task: Task) -> None:
        """Hand a group over, whose id no other of this rollout has."""
        self._offer([task])
