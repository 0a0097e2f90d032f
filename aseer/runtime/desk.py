"""A rollout for callers that bring one request at a time and wait for its response.

    async with engine.open_rollout() as desk:
        async with asyncio.TaskGroup() as tasks:
            for prompt in prompts:
                for _ in range(8):
                    tasks.create_task(episode(desk, prompt))

    async def episode(desk, prompt):
        response = await desk.submit(prompt, group="...", n=8)

Agent loops and token servers ask for one response at a time, but the scheduler and the
drafts need whole groups. So requests that belong together are *joined*: requests of the
same group name, or, without a name, of equal prompts and settings, until `n` are there
or `join_s` has passed since the first. A request that comes later begins a group of its
own: it runs as well, but nothing is known of its siblings.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from aseer.errors import (
    AseerError,
    ConfigError,
    RolloutClosedError,
    RolloutError,
)
from aseer.groups import Group, check_group_id
from aseer.inputs.fields import refusal
from aseer.inputs.plain import as_int
from aseer.runtime.rollout import Rollout
from aseer.types import GroupId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from aseer.inputs.tokenizer import Message
    from aseer.report import Progress, RolloutReport
    from aseer.runtime.group_source import OpenSource
    from aseer.runtime.work import Work
    from aseer.types import Response, Task

#: Siblings that are submitted by one loop arrive within milliseconds. Waiting longer
#: would leave engines idle at the beginning of a step.
JOIN_S = 0.05


class _Joining:
    """A group whose requests are still coming."""

    def __init__(self, task: Task, n: int | None) -> None:
        self.task = task
        self.n = n
        self.waiting: list[asyncio.Future[Response]] = []
        self.deadline: asyncio.TimerHandle | None = None
        self.group_id = ""  # once the group runs

    @property
    def is_whole(self) -> bool:
        return self.n is not None and len(self.waiting) >= self.n


class Desk:
    """Takes single requests, and runs them as groups; see `Engine.open_rollout`.

    All calls are to be made on the event loop that entered the block.
    """

    def __init__(self, work: Work, source: OpenSource, join_s: float) -> None:
        self._work = work
        self._source = source
        self._join_s = join_s
        self._rollout = Rollout(work)
        self._joining: dict[object, _Joining] = {}
        self._running: dict[str, list[asyncio.Future[Response]]] = {}
        self._numbers = count()
        self._reader: asyncio.Task[None] | None = None
        self._end: BaseException | None = None

    async def __aenter__(self) -> Self:
        await self._rollout.__aenter__()
        # It ends with the rollout, which `__aexit__` ends.
        self._reader = asyncio.get_running_loop().create_task(self._read())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Take no more requests, and end those that run. May be called again.

        Whoever still waits for a response gets a `RolloutClosedError`.
        """
        self._fail(RolloutClosedError("the desk was closed before this response came"))
        await self._rollout.aclose()
        if self._reader is not None:
            await asyncio.wait([self._reader])

    @property
    def has_ended(self) -> bool:
        """Whether no more requests are taken: it was closed, or its rollout ended."""
        return self._end is not None

    @property
    def report(self) -> RolloutReport:
        """Figures of the rollout.

        Raises:
            AseerError: the desk is open still, or its rollout failed.
        """
        return self._rollout.report

    def progress(self) -> Progress | None:
        """See `Rollout.progress`."""
        return self._rollout.progress()

    async def submit(
        self,
        prompt: Sequence[int] | str | Sequence[Message],
        sampling: Mapping[str, Any] | object | None = None,
        *,
        group: str | None = None,
        n: int | None = None,
        images: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Response:
        """Sample one response.

        Args:
            prompt: see `aseer.Group`, as for `sampling`, `images`,
                `chat_template_kwargs` and `tools`.
            group: name of the group that the request belongs to; all requests of a name
                bring the same prompt and settings.
            n: requests that the group will have, so that it starts when all are there;
                None = it starts `join_s` after the first.

        Returns:
            The response. Its `group_id` is made by the desk; a group that was left by
            every caller is cancelled.

        Raises:
            ConfigError: the request cannot run.
            RolloutClosedError: the desk is closed, or was never entered.
            AseerError: what ended the rollout.
        """
        if self._end is not None:
            raise self._end
        if self._reader is None:
            raise RolloutClosedError(
                "the desk is not open; use it as a context manager: `async with "
                "engine.open_rollout() as desk:`"
            )
        size = None if n is None else as_int(n)
        if n is not None and (size is None or size < 1):
            raise refusal("n", n, "an int >= 1, or None")
        given = Group(
            prompt,
            n=1,
            sampling=sampling,
            images=images,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
        )
        task = self._source.prepare(given)
        key = _content_of(task) if group is None else check_group_id(group)
        joining = self._joining.get(key)
        if joining is None:
            joining = self._joining[key] = _Joining(task, size)
            loop = asyncio.get_running_loop()
            joining.deadline = loop.call_later(self._join_s, self._start, key)
        elif _content_of(joining.task) != _content_of(task):
            raise ConfigError(
                f"group={group!r} was given with another prompt or other settings; "
                "requests of one group have the same"
            )
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        joining.waiting.append(future)
        if joining.is_whole:
            self._start(key)
        try:
            return await future
        finally:
            self._let_go(joining)

    def _start(self, key: object) -> None:
        """Hand a group over with those that are there."""
        joining = self._joining.pop(key)
        if joining.deadline is not None:
            joining.deadline.cancel()
        waiting = [future for future in joining.waiting if not future.done()]
        if waiting:
            name = f"{key}/" if isinstance(key, str) else ""
            group_id = GroupId(f"{name}desk-{next(self._numbers)}")
            joining.group_id = group_id
            self._running[group_id] = waiting
            num = len(waiting)
            self._source.add(replace(joining.task, group_id=group_id, num_requests=num))

    def _let_go(self, joining: _Joining) -> None:
        """End a group that nobody waits for any more."""
        group_id = joining.group_id
        waiting = self._running.get(group_id)
        if waiting is None or not all(future.done() for future in waiting):
            return
        del self._running[group_id]
        if any(future.cancelled() for future in waiting):
            self._rollout.cancel(group_id)

    async def _read(self) -> None:
        error: BaseException = RolloutClosedError("the desk's rollout has ended")
        try:
            async for response in self._rollout:
                waiting = self._running.get(response.group_id)
                if waiting is not None and not waiting[response.index].done():
                    waiting[response.index].set_result(response)
        except AseerError as ended:
            # What a rollout says of requests that failed is nothing to the others.
            if not (isinstance(ended, RolloutError) and self._work.is_over):
                error = ended
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Nothing will be answered any more."""
        if self._end is None:
            self._end = error
        for joining in self._joining.values():
            if joining.deadline is not None:
                joining.deadline.cancel()
        left = [j.waiting for j in self._joining.values()] + list(
            self._running.values()
        )
        self._joining.clear()
        self._running.clear()
        for future in (f for waiting in left for f in waiting if not f.done()):
            future.set_exception(self._end)


def _content_of(task: Task) -> object:
    """What requests have in common that can be one group."""
    limits = (task.max_tokens, task.min_tokens, task.seed)
    images = tuple((image.key, image.start) for image in task.images)
    return (task.prompt, images, *limits, repr(task.sampling))
