"""What an instance that starts must have before it works: the current weights."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aseer.errors import EngineError
from aseer.node.supply import NotCome
from aseer.weights.current import CurrentWeights, TrainersWeights

if TYPE_CHECKING:
    from aseer.runtime.instances import InstancePool
    from aseer.runtime.slot import Slot
    from aseer.runtime.team import Team

_log = logging.getLogger("aseer")

# Before weights that did not come are asked for again.
_RETRY_PAUSE_S = 1.0


class Readiness:
    """Brings instances of a pool to where they take work."""

    def __init__(self, pool: InstancePool) -> None:
        self._pool = pool

    async def bring(self, slot: Slot) -> None:
        """Wait for its hello, and let it load the current weights before it works; one
        of a team also until its partners have the same.
        """
        await slot.said_hello.wait()
        slot.has = CurrentWeights()
        self._pool.tell_change()
        while slot.has != self._pool.weights or not self._have_all(slot.team):
            if slot.has == self._pool.weights:
                await self._pool.await_change()
            elif not await self._load(slot, self._pool.weights):
                return
            else:
                self._pool.tell_change()
        self._pool.is_ready(slot)

    def _have_all(self, team: Team | None) -> bool:
        """Whether all of a team have the weights that are current."""
        slots = [] if team is None else team.slots
        return all(each.has == self._pool.weights for each in slots)

    async def _load(self, slot: Slot, wanted: CurrentWeights) -> bool:
        """Take a step towards the weights; False once the instance is not to start."""
        assert slot.has is not None
        theirs = wanted.whole
        if isinstance(theirs, TrainersWeights) and slot.has.whole is not theirs:
            if await self._has_from_trainer(slot, theirs):
                slot.has = CurrentWeights(theirs)
            return True
        way = slot.has.way_to(wanted)
        if way is None:
            slot.is_replaced = True  # it cannot go back, and is not at fault
            slot.failure = "the weights it had just loaded were taken back"
            slot.kill(slot.failure)
            return False
        try:
            for index in way:
                await self._pool.prepare_weights(slot.instance_id, index)
                await self._pool.ask(slot.instance_id, "commit_weights")
                is_adapters = index == wanted.adapters
                slot.has = slot.has.after(index, is_adapters=is_adapters)
            slot.failure = None
        except NotCome as error:  # its host may have room for them in a while
            if slot.failure is None:
                _log.warning("instance %d waits: %s", slot.instance_id, error)
            slot.failure = str(error)
            await asyncio.sleep(_RETRY_PAUSE_S)
        except EngineError as error:
            if wanted == self._pool.weights:
                slot.failure = str(error)
                slot.kill(slot.failure)
                return False
        return True

    async def _has_from_trainer(self, slot: Slot, theirs: TrainersWeights) -> bool:
        """Whether an instance holds such weights; if not, once others count."""
        if slot.identity in theirs.holders:
            return True
        _log.warning(
            "instance %d waits for the next weight update: the weights of the last one "
            "came straight from the trainer, and nobody else has them",
            slot.instance_id,
        )
        slot.needs_weights = True
        while self._pool.weights.whole is theirs:
            await self._pool.await_change()
        slot.needs_weights = False
        return False
