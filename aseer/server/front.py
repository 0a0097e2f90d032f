"""The engine behind the HTTP routes: who may sample, and when it is paused.

    run      +--- a desk is open: requests are sampled ---+
             |                                            | pause, update_weights
             +<-- resume --- drained: no desk is open ----+

Requests that come while the engine is paused wait. A pause lets what runs finish, or
aborts it; weights are only ever replaced while nothing runs, so that no response is of
two.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from aseer.errors import AseerError, ConfigError, RolloutClosedError
from aseer.runtime.desk import JOIN_S
from aseer.weights.sending import check_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from aseer.report import Progress
    from aseer.runtime.desk import Desk
    from aseer.server.wire import Ask
    from aseer.types import InstanceInfo, Response

PauseMode = Literal["wait", "abort", "keep"]


class EngineLike(Protocol):
    """What is needed of an `aseer.Engine`."""

    @property
    def instances(self) -> list[InstanceInfo]: ...

    @property
    def weight_version(self) -> int: ...

    def open_rollout(self, *, join_s: float) -> AbstractAsyncContextManager[Desk]: ...

    async def abort_rollout(self) -> None: ...

    async def update_weights(
        self, source: str, *, version: int | None = None
    ) -> object: ...


class Front:
    """Samples for many callers, and changes weights between."""

    def __init__(self, engine: EngineLike, *, join_s: float = JOIN_S) -> None:
        """Nothing is sampled until `run` runs.

        Args:
            join_s: seconds in which equal requests become one group.
        """
        self._engine = engine
        self._join_s = join_s
        self._desk: Desk | None = None
        self._num_running = 0
        self._is_paused = False
        self._has_ended = False  # the desk's rollout, by itself
        self._failure: AseerError | None = None
        self._changed = asyncio.Condition()
        self._control = asyncio.Lock()  # one pause, resume or update at a time

    @property
    def is_paused(self) -> bool:
        """Whether requests wait for `resume`."""
        return self._is_paused

    @property
    def num_running(self) -> int:
        """Responses that are being sampled."""
        return self._num_running

    def progress(self) -> Progress | None:
        """What was sampled since the last pause; None while paused."""
        return self._desk.progress() if self._desk is not None else None

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            AseerError: the engine has failed; callers get the same.
        """
        try:
            while True:
                await self._until(lambda: not self._is_paused)
                async with self._engine.open_rollout(join_s=self._join_s) as desk:
                    await self._set_desk(desk)
                    await self._until(lambda: self._is_paused or self._has_ended)
                    await self._until(lambda: not self._num_running)
                await self._set_desk(None)
        except AseerError as error:
            self._failure = error
            await self._notify()
            raise

    async def sample(self, ask: Ask) -> list[Response]:
        """The responses that are asked for, by their number; waits while paused.

        Raises:
            ConfigError: the request cannot run.
            AseerError: what ended the desk's rollout, or the engine.
        """
        while True:
            async with self._admitted(ask.n) as desk:
                try:
                    return await self._submit(desk, ask)
                except ExceptionGroup as several:
                    error = several.exceptions[0]
                if isinstance(error, ConfigError) or not isinstance(error, AseerError):
                    raise error  # of this request alone
                self._has_ended = True
                if not isinstance(error, RolloutClosedError):
                    raise error
                # It was aborted before it began: it is as new, for the next desk.

    async def pause(self, mode: PauseMode) -> None:
        """Take no requests, and wait until nothing runs.

        Args:
            mode: "abort" ends what runs early; "wait" lets it finish, and so does
                "keep", since a response of two weights would be neither's.
        """
        async with self._control:
            await self._pause(mode)

    async def resume(self) -> None:
        """Take requests again; those that waited begin."""
        async with self._control:
            await self._set_paused(False)

    async def abort(self) -> None:
        """End early what runs; requests that come after it are sampled."""
        async with self._control:
            if not self._is_paused:
                try:
                    await self._pause("abort")
                finally:  # also for a client that does not wait for the answer
                    await self._set_paused(False)

    async def update_weights(self, directory: str, version: int | None) -> int:
        """Let what runs finish, and switch to a checkpoint; the new version.

        Raises:
            WeightUpdateError: the weights are as before.
        """
        check_source(directory, awaits=False)  # or all would wait for nothing
        async with self._control:
            was_paused = self._is_paused
            try:
                await self._pause("wait")
                await self._engine.update_weights(directory, version=version)
                return self._engine.weight_version
            finally:
                await self._set_paused(was_paused)

    async def _pause(self, mode: PauseMode) -> None:
        await self._set_paused(True)
        if mode == "abort":
            await self._engine.abort_rollout()
        await self._until(lambda: self._desk is None)

    async def _submit(self, desk: Desk, ask: Ask) -> list[Response]:
        group, size = ask.group, ask.group_size
        if ask.n > 1 and group is None:
            group, size = secrets.token_hex(8), ask.n
        elif ask.sampling.get("seed") not in (None, -1) and group is None:
            # Members of a group have streams of their own: equal requests with equal
            # seeds are sampled alike only if they are groups of one.
            group, size = secrets.token_hex(8), 1
        async with asyncio.TaskGroup() as tasks:
            sampled = [
                tasks.create_task(
                    desk.submit(ask.prompt, ask.sampling, group=group, n=size)
                )
                for _ in range(ask.n)
            ]
        return [task.result() for task in sampled]

    @property
    def _is_open(self) -> bool:
        return not self._is_paused and not self._has_ended

    @asynccontextmanager
    async def _admitted(self, n: int) -> AsyncIterator[Desk]:
        async with self._changed:
            while (desk := self._desk) is None or self._failure or not self._is_open:
                if self._failure is not None:
                    raise self._failure
                await self._changed.wait()
            self._num_running += n
        try:
            yield desk
        finally:
            self._num_running -= n
            await asyncio.shield(self._notify())

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait for a change after which something holds.

        Raises:
            AseerError: the engine has failed.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or holds())
        if self._failure is not None:
            raise self._failure

    async def _set_paused(self, is_paused: bool) -> None:
        self._is_paused = is_paused
        await asyncio.shield(self._notify())

    async def _set_desk(self, desk: Desk | None) -> None:
        self._desk = desk
        self._has_ended = False
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
