"""The instances asleep, so that a trainer has their memory; on the engine's thread."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aseer.errors import EngineError, InstanceLostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.instance.pool import InstancePool
    from aseer.types import InstanceId

_log = logging.getLogger("aseer")


class Sleep:
    """Puts all instances to sleep, or none, and starts none again meanwhile."""

    def __init__(self, pool: InstancePool) -> None:
        self._pool = pool
        self._level: int | None = None  # while asleep

    async def begin(self, instances: Iterable[InstanceId], level: int) -> None:
        """See `Engine.sleep`.

        Raises:
            EngineError: an instance cannot; the others were woken.
        """
        asleep = list(instances)
        try:
            await _answers([self._tell(i, level) for i in asleep])
        except BaseException:
            with suppress(Exception):
                await self._wake(asleep)
            raise
        self._pool.hold_starts()  # they would take what was released
        self._level = level

    async def end(self, instances: Iterable[InstanceId]) -> None:
        """See `Engine.wake`; an instance that died is started again."""
        self._pool.allow_starts()
        await self._wake(instances)
        self._level = None

    def check_over(self) -> None:
        """See that the engine is awake.

        Raises:
            EngineError: it is not.
        """
        if self._level is not None:
            raise EngineError("the engine is asleep; wake() it first")

    def instance_up(self, instance_id: InstanceId) -> None:
        """It was starting when the others fell asleep: it follows them."""
        if self._level is not None:
            self._tell(instance_id, self._level).add_done_callback(_log_failure)

    def _tell(self, instance_id: InstanceId, level: int) -> asyncio.Future[Any]:
        return self._pool.ask(instance_id, "sleep", level=level)

    async def _wake(self, instances: Iterable[InstanceId]) -> None:
        asked = [self._pool.ask(i, "wake") for i in instances]
        await _answers(asked, may_be_lost=True)


async def _answers(
    asked: Iterable[asyncio.Future[Any]], *, may_be_lost: bool = False
) -> None:
    for error in await asyncio.gather(*asked, return_exceptions=True):
        if may_be_lost and isinstance(error, InstanceLostError):
            continue
        if isinstance(error, BaseException):
            raise error


def _log_failure(asked: asyncio.Future[Any]) -> None:
    error = None if asked.cancelled() else asked.exception()
    if error is not None:
        _log.error("an instance does not sleep, unlike the others: %s", error)
