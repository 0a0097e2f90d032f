"""A rollout as its user sees it: an iterator of responses, in asyncio code or in plain
code.

Responses come from the engine's thread through a mailbox. Groups go the other way: a
list at once; an iterator's whenever fewer than `max_pending_requests` requests are
unfinished; an async iterator's by a task of the consumer's loop, as it produces them.

Leaving is noticed by the iterator that the `for` loop holds: when the loop ends by a
break, an exception or cancellation, the iterator goes, and with it the rollout's work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from aseer.errors import AseerError, ConfigError, EngineClosedError
from aseer.groups import Group, GroupResolver, check_group_id, check_groups
from aseer.mailbox import Mailbox, MailboxClosed
from aseer.types import GroupId, Response

if TYPE_CHECKING:
    from concurrent.futures import Future

    from aseer.config import EngineConfig, PolicyName
    from aseer.engine import Engine
    from aseer.host import Host
    from aseer.report import Progress, RolloutReport
    from aseer.session import Session
    from aseer.types import Task

Groups = Iterable[Group] | AsyncIterable[Group]
R = TypeVar("R", bound="_Common")
_PULL_AT_ONCE = 256


class _Common:
    """What both forms share: intake, cancelling, leaving, the report."""

    def __init__(
        self,
        host: Host,
        resolver: GroupResolver,
        groups: Groups,
        policy: PolicyName,
        chunk_size: int,
        max_pending_requests: int,
    ) -> None:
        self._host = host
        self._resolver = resolver
        self._how = (policy, chunk_size)
        self._max_pending = max_pending_requests
        self._mailbox: Mailbox[Response] = Mailbox()
        self._opening: Future[Session] | None = None
        self._session: Session | None = None
        self._intake_error: BaseException | None = None
        self._num_taken = 0
        self._num_yielded = 0
        self._left = False
        self._source: Iterator[Group] | None = None
        self._async_source: AsyncIterable[Group] | None = None
        self._ready: list[Task] = []
        self._group_sizes: dict[str, int] = {}
        self._groups: dict[str, list[Response]] = {}
        self._cancelled_early: list[str] = []
        check_groups(groups)
        if isinstance(groups, AsyncIterable):
            self._async_source = groups
        elif isinstance(groups, Iterator):
            self._source = groups
        else:
            self._ready = [self._count(t) for t in resolver.resolve_all(groups)]

    @property
    def report(self) -> RolloutReport:
        """Figures of the finished rollout.

        Raises:
            AseerError: it is not finished.
        """
        report = self._session.report if self._session is not None else None
        if report is None:
            raise AseerError("the rollout is not finished; iterate it to its end first")
        return report

    def progress(self) -> Progress | None:
        """The rollout as of a fraction of a second ago; None before it starts."""
        return self._session.progress if self._session is not None else None

    def cancel(self, group_id: str) -> None:
        """End a group early, from any thread.

        Its running work is aborted and its unfinished requests come as Responses with
        finish reason `aborted` and the tokens they have. A group that is finished is
        left alone.

        Raises:
            ConfigError: no such group was given so far.
        """
        if check_group_id(group_id) not in self._group_sizes:
            raise ConfigError(
                f"there is no group {group_id!r} among the {len(self._group_sizes)} "
                "given to this rollout so far"
            )
        session = self._session
        if session is None:
            self._cancelled_early.append(group_id)
        else:
            self._host.post(lambda: session.cancel(GroupId(group_id)))

    def _count(self, task: Task) -> Task:
        self._group_sizes[task.group_id] = task.num_requests
        self._num_taken += task.num_requests
        return task

    def _open(self) -> Future[Session]:
        """The session to come; the same one when a wait for it was broken off."""
        opening = self._opening
        if opening is None or _failed(opening):
            coroutine = self._host.open_session(self._mailbox, *self._how)
            self._opening = opening = self._host.submit(coroutine)
        return opening

    def _begin(self, session: Session) -> None:
        if self._left:
            return
        self._session = session
        self._submit(self._ready)
        self._ready = []
        for group_id in self._cancelled_early:
            self.cancel(group_id)
        if self._source is None and self._async_source is None:
            self._close_intake()

    def _submit(self, tasks: list[Task]) -> None:
        session = self._session
        assert session is not None
        if tasks:
            self._host.post(lambda: session.add(tasks))

    def _close_intake(self) -> None:
        session = self._session
        assert session is not None
        self._host.post(session.close_intake)

    @property
    def _has_room(self) -> bool:
        return self._num_taken - self._num_yielded < self._max_pending

    def _pull(self) -> None:
        """Take groups from a plain iterator while there is room for more requests."""
        while self._source is not None and self._has_room and not self._left:
            tasks: list[Task] = []
            resolve = self._resolver.resolve
            try:
                while len(tasks) < _PULL_AT_ONCE and self._has_room:
                    tasks.append(self._count(resolve(next(self._source))))
            except StopIteration:
                self._source = None
            except Exception as error:  # the user's iterator, or a bad group of his
                self._intake_error = error
                self._source = None
            self._submit(tasks)
            if self._source is None:
                self._close_intake()

    def _took(self, response: Response) -> Response:
        self._num_yielded += 1
        return response

    def _complete_group(self, response: Response) -> list[Response] | None:
        """The response's group, by index, if this was its last."""
        members = self._groups.setdefault(response.group_id, [])
        members.append(response)
        if len(members) < self._group_sizes[response.group_id]:
            return None
        del self._groups[response.group_id]
        return sorted(members, key=lambda r: r.index)

    def _leave(self) -> None:
        """Stop the work, from any thread; nobody will read on."""
        self._left = True
        session, opening = self._session, self._opening
        if session is not None and not session.over.done():
            self._host.post(session.leave)
        elif session is None and opening is not None:
            opening.add_done_callback(self._leave_opened)
        self._mailbox.close()

    def _leave_opened(self, opening: Future[Session]) -> None:
        if not _failed(opening):
            self._host.post(opening.result().leave)

    def _drained(self) -> Future[None] | None:
        """Done when the engines have stopped the rollout's work."""
        session = self._session
        if session is None or self._host.ended.is_set():
            return None
        return self._host.submit(self._host.drain(session))

    def _raise_intake_error(self) -> None:
        """At the end, after every response: what went wrong with the user's groups."""
        error, self._intake_error = self._intake_error, None
        if error is not None:
            raise error


def _failed(opening: Future[Session]) -> bool:
    return opening.done() and (opening.cancelled() or opening.exception() is not None)


class _Loop(Generic[R]):
    """A loop over a rollout; dropped before the end, it leaves the rollout."""

    def __init__(self, rollout: R) -> None:
        self._rollout = rollout
        self._over = False

    def __del__(self) -> None:
        if not self._over:
            self._rollout._leave()


class Rollout(_Common):
    """Responses in the order they finish, for `async for`; see `Engine.rollout`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pump: asyncio.Task[None] | None = None
        self._room = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Response]:
        return _AsyncResponses(self)

    def by_group(self) -> AsyncIterator[list[Response]]:
        """Whole groups in the order they are complete, members by index."""
        return _AsyncGroups(self)

    async def aclose(self) -> None:
        """Stop the work and wait until the engines have; safe to call at any time."""
        self._leave()
        if self._pump is not None:
            await asyncio.wait([self._pump])
        drained = self._drained()
        if drained is not None:
            await asyncio.wrap_future(drained)

    async def _next(self) -> Response:
        if self._session is None and not self._left:
            # The frames of an iteration that was just cancelled, and the iterator in
            # them, live until this task is suspended: the last rollout is left then.
            await asyncio.sleep(0)
            opening = asyncio.wrap_future(self._open())
            self._begin(await asyncio.shield(opening))
            if self._async_source is not None and not self._left:
                # Outlives this call; `_leave` cancels it, `aclose` waits for it.
                loop = asyncio.get_running_loop()
                self._pump = loop.create_task(self._take_from(self._async_source))
        self._pull()
        try:
            response = self._took(await self._mailbox.get())
        except MailboxClosed:
            self._raise_intake_error()
            raise StopAsyncIteration from None
        self._room.set()
        return response

    async def _take_from(self, source: AsyncIterable[Group]) -> None:
        try:
            async for group in source:
                self._submit([self._count(self._resolver.resolve(group))])
                while not self._has_room:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:  # the user's iterator, or a bad group of his
            self._intake_error = error
        finally:
            self._close_intake()

    def _leave(self) -> None:
        super()._leave()
        pump = self._pump
        if pump is not None and not pump.done():
            with suppress(RuntimeError):  # its loop is closed: it is gone already
                pump.get_loop().call_soon_threadsafe(pump.cancel)


class _AsyncResponses(_Loop[Rollout]):
    """What `async for` holds."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Response:
        try:
            return await self._rollout._next()
        except StopAsyncIteration:
            self._over = True
            raise


class _AsyncGroups:
    """As `_AsyncResponses`, by whole groups."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._responses = _AsyncResponses(rollout)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Response]:
        while True:
            group = self._rollout._complete_group(await anext(self._responses))
            if group is not None:
                return group


class SyncRollout(_Common):
    """Responses in the order they finish, for `for`; see `Engine.rollout_sync`."""

    def __iter__(self) -> Iterator[Response]:
        return _Responses(self)

    def by_group(self) -> Iterator[list[Response]]:
        """Whole groups in the order they are complete, members by index."""
        responses = _Responses(self)
        return (g for r in responses if (g := self._complete_group(r)) is not None)

    def close(self) -> None:
        """Stop the work and wait until the engines have; safe to call at any time."""
        self._leave()
        drained = self._drained()
        if drained is not None:
            drained.result()

    def _next(self) -> Response:
        if self._session is None and not self._left:
            self._begin(self._open().result())
        self._pull()
        try:
            return self._took(self._mailbox.get_blocking())
        except MailboxClosed:
            self._raise_intake_error()
            raise StopIteration from None


class _Responses(_Loop[SyncRollout]):
    """What `for` holds."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Response:
        try:
            return self._rollout._next()
        except StopIteration:
            self._over = True
            raise


async def rollout(
    groups: Groups,
    *,
    engine: Engine | None = None,
    config: EngineConfig | None = None,
    policy: PolicyName | None = None,
    chunk_size: int | None = None,
) -> AsyncIterator[Response]:
    """Sample every group's responses on the engine that is open here; see
    `Engine.rollout`.

    Args:
        groups: see `Engine.rollout`.
        engine: to use; None = the one whose context this code runs in.
        config: opens an engine for this call only, and closes it at the end.
        policy: instead of the engine's.
        chunk_size: instead of the engine's; 0 = undivided.
    Raises:
        ConfigError: both `engine` and `config` are given.
        EngineClosedError: neither is given and no engine is open here.
    """
    from aseer.engine import Engine, current_engine

    if engine is not None and config is not None:
        raise ConfigError("give engine= or config=, not both")
    async with AsyncExitStack() as own:
        if config is not None:
            engine = await own.enter_async_context(Engine(config))
        engine = engine or current_engine.get()
        if engine is None:
            raise EngineClosedError(
                "no engine is open here; call this inside `async with "
                "aseer.Engine(...)`, or give engine= or config="
            )
        responses = engine.rollout(groups, policy=policy, chunk_size=chunk_size)
        async for response in responses:
            yield response
