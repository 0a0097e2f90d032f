"""The rollouts of an engine on its thread, one at a time: begun, and brought to an end.

A rollout has the engine, by its claim, until its session is over. What outlives a
rollout and is its successors' too is kept here: the numbers of chunks, length priors,
and the sums of what was done.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from aseer.context import LengthPriors
from aseer.errors import EngineError
from aseer.runtime.activity import Activity, Call
from aseer.runtime.call_log import CallLog
from aseer.runtime.calls import Settings
from aseer.runtime.identity import Identifier
from aseer.runtime.journal import Journal
from aseer.runtime.metrics import Figures
from aseer.runtime.session import Session
from aseer.runtime.weights import DROPPED, NO_WEIGHTS
from aseer.watch import wait_awake

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from aseer.config import EngineConfig, PolicyName
    from aseer.dgds.server import DraftServer
    from aseer.runtime.claims import Claim, Claims
    from aseer.runtime.instances import InstancePool
    from aseer.runtime.journal import JournalPlan
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.loop_thread import LoopThread
    from aseer.runtime.mailbox import Mailbox
    from aseer.runtime.weights import WeightKeeper
    from aseer.types import InstanceId, InstanceInfo, InstanceLoad, Response

_log = logging.getLogger("aseer")

#: Environment variable: set, and to something else than 0, it has every rollout compare
#: its books after each event. For whoever looks for a fault of ours: no setting, so
#: that a program need not be changed for it.
CHECK_VARIABLE = "ASEER_CHECK"


class Rollouts:
    """Begins rollouts, tells the one in progress of the instances, and ends it."""

    def __init__(
        self,
        config: EngineConfig,
        pool: InstancePool,
        keeper: WeightKeeper,
        claims: Claims,
        thread: LoopThread,
        log_dir: Path,
        *,
        infos: Mapping[InstanceId, InstanceInfo],
        loads: Mapping[InstanceId, InstanceLoad],
        limits: Callable[[], InstanceInfo],
        check_alive: Callable[[], None],
        draft_server: DraftServer | None,
        kv_pools: KvPools,
    ) -> None:
        """There is none so far.

        Args:
            infos, loads: of the instances that are up, at any moment.
            limits: of the instances; all have the same.
            check_alive: raises EngineError if no instance can come up any more.
        """
        self._config = config
        self._pool = pool
        self._keeper = keeper
        self._claims = claims
        self._thread = thread
        self._log_dir = log_dir
        self._infos = infos
        self._loads = loads
        self._limits = limits
        self._check_alive = check_alive
        self._draft_server = draft_server
        self._kv_pools = kv_pools
        self._length_priors = LengthPriors() if config.length_priors else None
        self._identifier = Identifier(config)
        self._seeds = Random(config.seed)
        self._next_chunk_id = 0
        self._session: Session | None = None
        self._done = Figures()  # by rollouts that are over

    async def begin(
        self,
        mailbox: Mailbox[Response],
        policy: PolicyName,
        chunk_size: int,
        asker: object,
        plan: JournalPlan | None = None,
    ) -> Session:
        """Begin a rollout; the engine is taken until the session is over.

        Raises:
            ConfigError: its journal is another rollout's, or cannot be used.
            RolloutInProgressError: one is in progress.
            EngineError: the engine is asleep, has no weights, or no instance is left.
        """
        self._check_alive()
        claim = await self._claims.take(Call.ROLLOUT, asker)
        journal = None
        try:
            self._check_alive()
            if not self._infos and self._pool.in_need_of_weights:
                raise EngineError(NO_WEIGHTS)
            if self._keeper.lacks_whole:
                raise EngineError(DROPPED)
            if plan is not None:
                journal = await self._open_journal(plan)
                self._claims.check_open()
                self._check_alive()
            session = Session(
                pool=self._pool,
                mailbox=mailbox,
                settings=self._settings(policy, chunk_size),
                post=self._thread.post,
                draft_server=self._draft_server,
                kv_pool=self._kv_pools if self._kv_pools.granularity else None,
                length_priors=self._length_priors,
                call_log=self._new_call_log(),
                journal=journal,
                seeds=self._seeds,
                checks_integrity=_is_to_check(),
            )
            for instance_id, info in sorted(self._infos.items()):
                session.instance_up(info, self._loads[instance_id])
        except BaseException:
            if journal is not None:
                journal.abandon()
            claim.release()
            raise
        self._session = session
        self._claims.set_rollout(_InTheWay(self, session))
        session.over.add_done_callback(lambda _: self._session_over(session, claim))
        return session

    async def drain(self, session: Session) -> None:
        """Wait until a rollout that was left has stopped; kill the engines that do
        not.
        """
        timeout_s = self._config.shutdown_timeout_s
        await wait_awake(session.over, timeout_s)
        if not session.over.done():
            self._pool.kill_busy(f"it did not stop its work within {timeout_s:g} s")
            await wait_awake(session.over, timeout_s)
        session.give_up()

    async def abort(self, asker: object) -> None:
        """See `Engine.abort_rollout`."""
        if self._claims.activity is not Activity.CLOSING:
            await self._claims.take(Call.ABORT, asker)

    async def stop(self) -> None:
        """The engine closes: let the instances stop what a rollout still runs."""
        session = self._session
        if session is not None and not session.over.done():
            session.engine_closes()
            await wait_awake(session.over, self._config.shutdown_timeout_s)

    def give_up(self) -> None:
        """Nothing runs any more: whoever waits for a rollout waits in vain."""
        if self._session is not None:
            self._session.fail(self._thread.closed_error())
            self._session.give_up()

    def tell(self, tell: Callable[[Session], None]) -> None:
        """Tell the rollout in progress of something, if there is one."""
        session = self._session
        if session is not None:
            session.guarded(lambda: tell(session))

    def count_into(self, figures: Figures) -> None:
        """Add what all rollouts have done so far."""
        figures.responses.update(self._done.responses)
        figures.counts.update(self._done.counts)
        if self._session is not None:
            self._session.count_into(figures)

    def _settings(self, policy: PolicyName, chunk_size: int) -> Settings:
        """Of the decisions of the rollout that begins."""
        return Settings(
            policy=policy,
            chunk_size=chunk_size,
            starvation_interval=self._config.starvation_interval,
            max_request_retries=self._config.max_request_retries,
            weight_version=self._keeper.version,
            first_chunk_id=self._next_chunk_id,
            granularity=self._kv_pools.granularity or None,
        )

    async def _open_journal(self, plan: JournalPlan) -> Journal:
        version, weights = self._keeper.version, self._pool.weights
        identify = partial(self._identifier.identify, self._limits(), version, weights)
        journal = Journal(plan, identify, self._thread.post)
        await journal.open()
        return journal

    def _new_call_log(self) -> CallLog | None:
        """For the rollout that begins, if it keeps one; named by its first chunk."""
        if not self._config.logs_calls:
            return None
        started = time.strftime("%Y%m%d-%H%M%S")
        name = f"rollout-{started}-{self._next_chunk_id}.calls"
        return CallLog(self._log_dir / name)

    def _session_over(self, session: Session, claim: Claim) -> None:
        self._next_chunk_id = session.next_chunk_id
        session.count_into(self._done)
        if self._session is session:
            self._session = None
        claim.release()


def _is_to_check() -> bool:
    is_set = os.environ.get(CHECK_VARIABLE, "") not in ("", "0")
    if is_set:
        _log.info("%s: this rollout checks itself, which is slow", CHECK_VARIABLE)
    return is_set


class _InTheWay:
    """See `aseer.runtime.claims.InTheWay`."""

    def __init__(self, rollouts: Rollouts, session: Session) -> None:
        self._rollouts = rollouts
        self._session = session

    def was_left(self, asker: object) -> bool:
        return self._session.was_left(asker)

    def is_held_up_by(self, asker: object) -> bool:
        return self._session.is_held_up_by(asker)

    def description(self) -> str:
        return self._session.description()

    async def end(self) -> None:
        self._session.leave()
        await self._rollouts.drain(self._session)

    async def abort(self) -> None:
        self._session.abort()
        await self._rollouts.drain(self._session)
