"""The instances asleep, so that a trainer has their memory; on the engine's thread."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aseer.errors import EngineError, InstanceLostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.instance.pool import InstancePool
    from aseer.types import InstanceId

_log = logging.getLogger("aseer")


class Sleep:
    """Puts all instances to sleep, or none, and starts none again meanwhile.

    `begin` and `end` are never run at once: `aseer.activity` sees to that.
    """

    def __init__(self, pool: InstancePool) -> None:
        self._pool = pool
        self._level: int | None = None  # from the moment that the first is told

    async def begin(self, instances: Iterable[InstanceId], level: int) -> None:
        """See `Engine.sleep`. An instance that dies meanwhile needs no sleep.

        Raises:
            EngineError: an instance cannot; the others were woken.
        """
        self._level = level
        self._pool.hold_starts()  # what starts would take what is released
        asleep = list(instances)
        try:
            for error in await self._ask(asleep, "sleep", level=level):
                raise error
        except BaseException:
            await self.end(asleep)
            raise

    async def end(self, instances: Iterable[InstanceId]) -> None:
        """See `Engine.wake`; an instance that died or cannot is started again.

        Raises:
            EngineError: no instance could.
        """
        self._level = None  # what comes up from here on stays awake
        waking = list(instances)
        failed = []
        try:
            failed = await self._ask(waking, "wake")
        finally:
            self._pool.allow_starts()
        if failed and len(failed) == len(waking):
            raise failed[0]

    def instance_up(self, instance_id: InstanceId) -> None:
        """It was starting when the others fell asleep: it follows them."""
        if self._level is not None:
            asked = self._pool.ask(instance_id, "sleep", level=self._level)
            asked.add_done_callback(lambda a: self._replace_failed(instance_id, a))

    async def _ask(
        self, instances: list[InstanceId], what: Any, **arguments: Any
    ) -> list[EngineError]:
        """Ask all; what those said that cannot. One that cannot wake is replaced."""
        asked = [self._pool.ask(i, what, **arguments) for i in instances]
        failed = []
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for instance_id, answer in zip(instances, answers, strict=True):
            if isinstance(answer, EngineError):
                if isinstance(answer, InstanceLostError):
                    continue  # its owner hears of that
                failed.append(answer)
                if what == "wake":
                    self._replace(instance_id, answer)
            elif isinstance(answer, BaseException):
                raise answer
        return failed

    def _replace_failed(
        self, instance_id: InstanceId, asked: asyncio.Future[Any]
    ) -> None:
        error = None if asked.cancelled() else asked.exception()
        if error is not None and not isinstance(error, InstanceLostError):
            self._replace(instance_id, error)

    def _replace(self, instance_id: InstanceId, error: BaseException) -> None:
        why = f"it does not do as the others do: {error}"
        _log.error("instance %d is started again: %s", instance_id, why)
        self._pool.replace(instance_id, why)
