"""The instances asleep, so that a trainer has their memory; on the engine's thread."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from aseer.errors import EngineError, InstanceLostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.inputs.calls import WakeTags
    from aseer.runtime.instances import InstancePool
    from aseer.types import InstanceId

_log = logging.getLogger("aseer")


class Sleep:
    """Puts all instances to sleep, or none, and starts none again meanwhile.

    `begin` and `end` are never run at once: `aseer.runtime.activity` sees to that.
    """

    def __init__(self, pool: InstancePool) -> None:
        self._pool = pool
        self._level: int | None = None  # from the moment that the first is told
        self._told: set[InstanceId] = set()  # to sleep, and not to wake since
        self.has_weights = False
        """Whether weights are awake, and KV caches are not."""
        self.drops_weights = False
        """Whether an instance may have dropped its weights, the last time."""

    async def begin(self, instances: Iterable[InstanceId], level: int) -> None:
        """See `Engine.sleep`. An instance that dies meanwhile needs no sleep.

        Raises:
            EngineError: an instance cannot; the others were woken.
        """
        self._level, self.has_weights = level, False
        self.drops_weights = level > 1
        self._pool.hold_starts()  # what starts would take what is released
        try:
            asked = {i: self._ask_to_sleep(i, level) for i in instances}
            failed = await _answers(asked)
            self.drops_weights &= len(failed) < len(asked)
            for error in failed.values():
                raise error
        except BaseException:
            with suppress(EngineError):  # why they cannot wake is told in the log
                await self.end(())
            raise

    async def end(self, instances: Iterable[InstanceId], tags: WakeTags = None) -> None:
        """See `Engine.wake`; an instance that died or cannot is started again.

        While only weights are awake nothing is started, since it would take the memory
        of a KV cache.

        Raises:
            EngineError: no instance could.
        """
        waking = sorted(self._told.union(instances))
        self.has_weights = tags == ("weights",)
        if not self.has_weights:
            self._stay_awake()
        try:
            asked = {i: self._ask_to_wake(i, tags) for i in waking}
            for instance_id, answer in asked.items():
                # Also if nobody waits any more: one that cannot wake is of no use.
                answer.add_done_callback(partial(self._replace_failed, instance_id))
            failed = await _answers(asked)
            if failed and all(answer.exception() for answer in asked.values()):
                raise next(iter(failed.values()))
        except BaseException:
            self._stay_awake()
            self._pool.allow_starts()
            raise
        if not self.has_weights:
            self._pool.allow_starts()

    def _stay_awake(self) -> None:
        """From here on what comes up, and what was told to wake, sleeps no more."""
        self._level, self._told, self.has_weights = None, set(), False

    def instance_up(self, instance_id: InstanceId) -> None:
        """It was starting when the others fell asleep: it follows them."""
        if self._level is not None:
            asked = [self._ask_to_sleep(instance_id, self._level)]
            if self.has_weights:
                asked.append(self._ask_to_wake(instance_id, ("weights",)))
            for answer in asked:
                answer.add_done_callback(partial(self._replace_failed, instance_id))

    def _ask_to_wake(
        self, instance_id: InstanceId, tags: WakeTags
    ) -> asyncio.Future[object]:
        arguments = {} if tags is None else {"tags": list(tags)}
        return self._pool.ask(instance_id, "wake", **arguments)

    def _ask_to_sleep(
        self, instance_id: InstanceId, level: int
    ) -> asyncio.Future[object]:
        self._told.add(instance_id)
        return self._pool.ask(instance_id, "sleep", level=level)

    def _replace_failed(
        self, instance_id: InstanceId, asked: asyncio.Future[object]
    ) -> None:
        error = None if asked.cancelled() else asked.exception()
        if error is not None and not isinstance(error, InstanceLostError):
            why = f"it does not do as the others do: {error}"
            _log.error("instance %d is started again: %s", instance_id, why)
            self._pool.replace(instance_id, why)


async def _answers(
    asked: dict[InstanceId, asyncio.Future[object]],
) -> dict[InstanceId, BaseException]:
    """Wait for all; why those refuse that do. The owner hears of one that was lost."""
    if asked:
        await asyncio.wait(asked.values())
    errors = ((i, answer.exception()) for i, answer in asked.items())
    return {
        i: error
        for i, error in errors
        if error is not None and not isinstance(error, InstanceLostError)
    }
