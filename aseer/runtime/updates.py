"""A weight update on the engine's thread: way made for it, sent, switched, or given up.

The caller's side is `aseer.runtime.weight_update`; what the instances are told is
`aseer.runtime.weights` for files, and `aseer.runtime.direct_update` for what comes
straight from a trainer's GPUs. An update has the engine, by its claim, until it ends.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from aseer.errors import WeightUpdateError, describe
from aseer.runtime.activity import Call
from aseer.runtime.direct_update import DirectUpdate, check_are_here
from aseer.runtime.open_update import OpenUpdates
from aseer.weights.direct import check_started_for
from aseer.weights.files import no_place
from aseer.weights.target import read_sent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aseer.dgds.server import DraftServer
    from aseer.runtime.activity import Taking
    from aseer.runtime.claims import Claim
    from aseer.runtime.instances import InstancePool
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.weights import Pause, Plan, SwitchTimes, WeightKeeper
    from aseer.types import InstanceId, InstanceInfo
    from aseer.weights.files import Index
    from aseer.weights.target import Sent, WeightTarget

_CALLS: dict[Pause | None, Taking] = {
    None: Call.UPDATE,
    "wait": Call.UPDATE_AFTER,
    "abort": Call.UPDATE_INSTEAD,
}


class Updates:
    """The weight updates of an engine, one at a time."""

    def __init__(
        self,
        keeper: WeightKeeper,
        pool: InstancePool,
        infos: Mapping[InstanceId, InstanceInfo],
        take: Callable[[Taking, object], Awaitable[Claim]],
        check_alive: Callable[[], None],
        *,
        transfer_backend: str | None,
        draft_server: DraftServer | None,
        kv_pools: KvPools,
    ) -> None:
        """There is none so far.

        Args:
            infos: of the instances that are up, at any moment.
            take: takes the engine for a call.
            check_alive: raises EngineError if no instance can come up any more.
            transfer_backend: vLLM's transfer engine that the engines were started with.
        """
        self._keeper = keeper
        self._pool = pool
        self._infos = infos
        self._take = take
        self._check_alive = check_alive
        self._draft_server = draft_server
        self._kv_pools = kv_pools
        self._open = OpenUpdates(keeper)
        self.transfer_backend = transfer_backend

    async def begin(
        self, version: int | None, pause: Pause | None, asker: object, way: str
    ) -> Plan:
        """Make way for new weights, and keep the way free until the update is over.

        Args:
            way: how they are to come: "host", or one of `aseer.weights.direct.WAYS`.
        Raises:
            RolloutInProgressError: a rollout is in progress, and `pause` is None.
            WeightUpdateError: the version is not a later one, or the instances take no
                weights in this way.
        """
        # First, or a rollout would be aborted for nothing.
        self._keeper.next_version(version)
        if way != "host":
            check_started_for(way, self.transfer_backend)
            check_are_here(self._pool, self._takers, way)
        claim = await self._take(_CALLS[pause], asker)
        try:
            self._check_alive()
            return await self._keeper.begin(self._pool, self._takers, version, claim)
        except BaseException:
            claim.release()
            raise

    async def switch(self, plan: Plan, index: Index) -> SwitchTimes:
        """Take every instance to weights that were sent; see `WeightKeeper.switch`."""
        try:
            times = await self._keeper.switch(
                plan, self._pool, self._takers, is_adapters=index.lora_rank > 0
            )
            await self._drop_older(plan.version)
        finally:
            plan.claim.release()
        return times

    async def _drop_older(self, version: int) -> None:
        """What else outlives a rollout, and was made with older weights, goes."""
        if self._draft_server is not None:
            self._draft_server.set_weight_version(version)
        await self._kv_pools.drop_older(version)

    @property
    def _takers(self) -> list[InstanceId]:
        """Instances that an update begins with; if none is up, those that need one."""
        return sorted(self._infos) or self._pool.in_need_of_weights

    def direct(self, transfer: str) -> DirectUpdate:
        """An update that goes straight from a trainer's GPUs, to be made and settled.

        Args:
            transfer: how; one of `aseer.weights.direct.WAYS`.
        """
        members = {*self._infos, *self._pool.in_need_of_weights}
        return DirectUpdate(self._pool, members, transfer)

    async def settle_direct(
        self, plan: Plan, update: DirectUpdate, *, verify: bool
    ) -> None:
        """End a direct update, whose weights were sent.

        Raises:
            WeightUpdateError: they were not, or the engines' weights differ.
        """
        try:
            if not update.is_sent:
                raise WeightUpdateError(
                    "no weights were sent; with transfer="
                    f"{update.transfer!r} the process that has the engine calls the "
                    "target's send(), as do all others of the trainer"
                )
            if verify:
                await update.compare()
            self._keeper.settle(plan, self._pool, update)
            await self._drop_older(plan.version)
        except WeightUpdateError as error:
            told = self.fail_direct(plan, update, str(error))
            raise WeightUpdateError(f"{error}; {told}") from error
        except BaseException as error:
            self.fail_direct(plan, update, describe(error))
            raise
        plan.claim.release()

    def fail_direct(self, plan: Plan, update: DirectUpdate, why: str) -> str:
        """End a direct update that failed; what the engine has now, in words."""
        update.fail(why)
        plan.claim.release()
        return self._keeper.failed(plan, self._pool)

    async def begin_open(
        self,
        version: int | None,
        pause: Pause | None,
        timeout_s: float,
        asker: object,
        way: str,
    ) -> WeightTarget:
        """As `begin`, for senders in other processes."""
        plan = await self.begin(version, pause, asker, way)
        direct = None if way == "host" else self.direct(way)
        try:
            return self._open.begin(plan, timeout_s, direct)
        except OSError as error:
            self._keeper.abandon(plan)
            raise no_place(error) from error

    async def finish_open(self, target: WeightTarget) -> tuple[Sent, SwitchTimes]:
        """See `Engine.finish_update`."""
        plan, _ = self._open.take(target, "was finished already")
        try:
            sent = read_sent(plan.directory)
        except BaseException:
            self._keeper.abandon(plan)
            raise
        return sent, await self.switch(plan, sent.index)

    def abandon_open(self, target: WeightTarget) -> None:
        """See `Engine.abandon_update`; one that is over stays so."""
        with suppress(WeightUpdateError):
            plan, direct = self._open.take(target, "was abandoned")
            if direct is not None:
                direct.fail("the weight update was abandoned")
            self._keeper.abandon(plan)

    @property
    def open_direct(self) -> DirectUpdate | None:
        """What sends to an open update's instances, if it goes straight to them."""
        return self._open.direct

    async def finish_direct(self, target: WeightTarget) -> DirectUpdate:
        """See `Engine.finish_update`."""
        plan, direct = self._open.take(target, "was finished already")
        assert direct is not None
        await self.settle_direct(plan, direct, verify=False)
        return direct
