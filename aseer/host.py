"""What lives on the engine's thread: its event loop, the socket, the pool, the rollout.

The public `Engine` owns the thread and calls in from outside; everything here runs on
the thread's own loop.

    user's thread                       engine's thread
    Engine, Rollout  --call()-->  Host -- Session -- InstancePool -- Router
                     <--Mailbox--              (pure Controller inside)
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from aseer.context import LengthPriors
from aseer.dgds.server import make_draft_server
from aseer.errors import (
    ConfigError,
    EngineClosedError,
    EngineError,
    describe,
    root_of,
)
from aseer.instance.messages import FROM_INSTANCE, Report
from aseer.instance.pool import InstancePool
from aseer.instance.sleep import Sleep
from aseer.kv.pool import KvPool, plan_kv_pool
from aseer.leftovers import Leftovers, sweep
from aseer.session import Session
from aseer.transport.zeromq import bind_router, make_socket_dir
from aseer.types import InstanceId, InstanceInfo, InstanceLoad
from aseer.watch import WakingClock, wait_awake
from aseer.weights.keeper import NO_INSTANCE, WeightKeeper, weights_dir_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aseer.config import EngineConfig, PolicyName
    from aseer.instance.launch import Launch
    from aseer.mailbox import Mailbox
    from aseer.types import Response
    from aseer.weights.keeper import Pause, Plan, SwitchTimes

_log = logging.getLogger("aseer")
_POOL_GRACE_S = 3.0
_JOIN_STEP_S = 0.5
T = TypeVar("T")


class Host:
    """The engine's thread and what runs on it."""

    def __init__(self, config: EngineConfig, launches: list[Launch]) -> None:
        pool_plan = plan_kv_pool(config, launches)
        self._config = config
        self._launches = launches
        try:
            if config.log_dir is not None:
                Path(config.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"log_dir cannot be used: {error}") from error
        sweep()
        self.run_dir = make_socket_dir()
        self.weights_dir = weights_dir_of(config, self.run_dir)
        self._leftovers = Leftovers(self.run_dir)
        self._leftovers.add(self.weights_dir)
        self.weights = WeightKeeper(self.weights_dir)
        self.log_dir = Path(config.log_dir or self.run_dir)
        self.infos: dict[InstanceId, InstanceInfo] = {}
        self.limits: InstanceInfo  # what the latest to come up said; all say the same
        self.started: Future[None] = Future()
        self.ended = threading.Event()
        self._loads: dict[InstanceId, InstanceLoad] = {}
        self._exhausted: str | None = None
        self._sleep: Sleep | None = None
        self._session: Session | None = None
        self._next_chunk_id = 0
        self._pool: InstancePool | None = None
        self._draft_server = make_draft_server(config, self.run_dir)
        self._length_priors = LengthPriors() if config.length_priors else None
        self.kv_pool: KvPool | None = None
        if pool_plan is not None:
            self.kv_pool = KvPool(
                pool_plan, config, len(launches), self.log_dir, self._leftovers
            )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._is_stopping = False
        self._thread = threading.Thread(
            target=self._run, name="aseer-engine", daemon=True
        )

    # From the user's threads

    def start(self) -> None:
        """Start the thread; `started` tells how it went."""
        self._thread.start()

    def request_stop(self) -> None:
        """Begin the end; `ended` tells when it is reached. May be called again."""
        self._is_stopping = True  # for a thread that has no loop yet
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None:
            with suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(stop.set)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it ended."""
        clock = WakingClock(2 * _JOIN_STEP_S)
        while self._thread.is_alive() and clock.read() < timeout_s:
            self._thread.join(_JOIN_STEP_S)
        return not self._thread.is_alive()

    def post(self, function: Callable[[], object]) -> None:
        """Run a function on the engine's thread, some time soon."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._do, function)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the engine's thread; its result comes with the future.

        Raises:
            EngineClosedError: the thread has ended.
        """
        loop = self._loop
        if loop is not None and not self.ended.is_set():
            with suppress(RuntimeError):
                return asyncio.run_coroutine_threadsafe(coroutine, loop)
        coroutine.close()
        raise EngineClosedError("the engine is closed")

    # On the engine's thread

    async def open_session(
        self, mailbox: Mailbox[Response], policy: PolicyName, chunk_size: int
    ) -> Session:
        """Begin a rollout.

        Raises:
            RolloutInProgressError: one is in progress.
            EngineError: no instance is left.
        """
        if self._exhausted is not None:
            raise EngineError(self._exhausted)
        assert self._sleep is not None
        self._sleep.check_over()
        await self._end_left()
        await self.weights.idle()  # from here to its end nothing else may run
        last = self._session
        if last is not None and not last.over.done():
            raise last.refusal(
                "an engine runs one at a time: iterate it to its end, or close it first"
            )
        assert self._pool is not None
        assert self._loop is not None
        session = Session(
            pool=self._pool,
            mailbox=mailbox,
            policy=policy,
            chunk_size=chunk_size,
            starvation_interval=self._config.starvation_interval,
            max_request_retries=self._config.max_request_retries,
            weight_version=self.weights.version,
            first_chunk_id=last.next_chunk_id if last else 0,
            loop=self._loop,
            draft_server=self._draft_server,
            kv_pool=self.kv_pool,
            length_priors=self._length_priors,
        )
        for instance_id, info in sorted(self.infos.items()):
            session.instance_up(info, self._loads[instance_id])
        self._session = session
        if session.was_left:
            session.leave()
        return session

    async def drain(self, session: Session) -> None:
        """Wait until a rollout that was left has stopped; kill the engines that do
        not.
        """
        assert self._pool is not None
        timeout_s = self._config.shutdown_timeout_s
        await wait_awake(session.over, timeout_s)
        if not session.over.done():
            self._pool.kill_busy(f"it did not stop its work within {timeout_s:g} s")
            await wait_awake(session.over, timeout_s)

    async def begin_weight_update(
        self, version: int | None, pause: Pause | None
    ) -> Plan:
        """Make way for new weights, and keep the way free until the update is over.

        Raises:
            RolloutInProgressError: a rollout is in progress, and `pause` is None.
            WeightUpdateError: the version is not a later one.
        """
        assert self._pool is not None
        assert self._sleep is not None
        self._sleep.check_over()
        plan = await self.weights.begin(self._pool, self.infos, version)
        try:
            await self._make_way(pause, ", or give pause='wait' or pause='abort'")
        except BaseException:
            self.weights.abandon(plan)
            raise
        return plan

    def abandon_weight_update(self, beginning: Future[Plan]) -> None:
        """Give an update up whose caller was cancelled while it began."""
        if not beginning.cancelled() and beginning.exception() is None:
            plan = beginning.result()
            self.post(lambda: self.weights.abandon(plan))

    async def switch_weights(self, plan: Plan) -> SwitchTimes:
        """Take every instance to weights that were sent; see `WeightKeeper.switch`."""
        assert self._pool is not None
        times = await self.weights.switch(plan, self._pool, self.infos)
        # What else outlives a rollout, and was made with the old weights, goes here.
        if self._draft_server is not None:
            self._draft_server.set_weight_version(plan.version)
        if self.kv_pool is not None:
            await self.kv_pool.drop_older(plan.version)
        return times

    async def sleep(self, level: int) -> None:
        """See `Engine.sleep`."""
        assert self._sleep is not None
        await self._make_way()
        await self.weights.idle()
        if not self.infos:
            raise EngineError(self._exhausted or NO_INSTANCE)
        await self._sleep.begin(self.infos, level)

    async def wake(self) -> None:
        """See `Engine.wake`."""
        assert self._sleep is not None
        await self._sleep.end(self.infos)

    async def _end_left(self) -> None:
        """End a rollout that its user walked away from."""
        session = self._session
        if session is not None and session.was_left:
            session.leave()
            await self.drain(session)

    async def _make_way(self, pause: Pause | None = None, or_else: str = "") -> None:
        await self._end_left()
        session = self._session
        if session is None or session.over.done():
            return
        if pause is None:
            raise session.refusal(f"iterate it to its end first{or_else}")
        if pause == "abort":
            session.abort()
            await self.drain(session)
        else:
            await asyncio.wait([session.over])

    def instance_up(self, info: InstanceInfo) -> None:
        """See `PoolOwner`."""
        self.weights.instance_up(info.instance_id)
        self.infos[info.instance_id] = self.limits = info
        self._loads[info.instance_id] = InstanceLoad()
        if self._sleep is not None:
            self._sleep.instance_up(info.instance_id)
        if self._session is not None:
            self._session.instance_up(info, InstanceLoad())

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        """See `PoolOwner`."""
        self._loads[instance_id] = report.load
        if self._session is not None and not self._session.over.done():
            self._session.instance_report(instance_id, report)

    def instance_down(self, instance_id: InstanceId, why: str) -> None:
        """See `PoolOwner`."""
        self.infos.pop(instance_id, None)
        self.weights.instance_down(instance_id, why)
        if self._session is not None:
            self._session.instance_down(instance_id, why)

    def instances_exhausted(self, why: str) -> None:
        """See `PoolOwner`."""
        self._exhausted = f"the engine has no instance left: {why}"
        if self._session is not None:
            self._session.exhausted(why)

    @property
    def log_paths(self) -> list[Path]:
        ids = [launch.instance_id for launch in self._launches]
        return [self.log_dir / f"instance-{i}.log" for i in ids]

    def _run(self) -> None:
        try:
            with (
                self._draft_server or nullcontext(),
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                runner.run(self._main())
        except BaseException as error:
            if not self.started.done():
                self.started.set_exception(root_of(error))
            elif self._exhausted is None:  # else it was told already
                _log.error("the engine did not close cleanly", exc_info=error)
        finally:
            self._leftovers.remove()
            self.ended.set()

    def _do(self, posted: Callable[[], object]) -> None:
        try:
            posted()
        except Exception as error:  # told, or whoever reads on would wait for ever
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if not self.started.done():
            self.started.set_exception(error)
            return
        _log.error("the engine failed", exc_info=error)
        self._exhausted = f"the engine failed: {describe(error)}"
        if self._session is not None and not self._session.over.done():
            with suppress(Exception):  # what failed may be its own decisions
                self._session.exhausted(self._exhausted)
            self._session.abandon(self._exhausted)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if self._is_stopping:
            self._stop.set()
        endpoint = f"ipc://{self.run_dir}/ctrl"
        async with bind_router(endpoint, FROM_INSTANCE) as router:
            pool = InstancePool(
                self._config,
                self._launches,
                router,
                endpoint,
                self._leftovers,
                self.log_dir,
                self,
                self._draft_server.spec if self._draft_server else None,
                self.kv_pool,
            )
            self._pool = pool
            self._sleep = Sleep(pool)
            try:
                async with asyncio.TaskGroup() as tasks:
                    talking = tasks.create_task(
                        router.run(pool.on_message, pool.on_lost)
                    )
                    working = tasks.create_task(self._work(pool))
                    await self._stop.wait()
                    await self._leave_session()
                    working.cancel()
                    await asyncio.wait([working])
                    await pool.stop(self._config.shutdown_timeout_s)
                    talking.cancel()
            except BaseException as error:
                self._failed(root_of(error))
                raise
            finally:
                self.weights.give_up("the engine was closed")
                await pool.stop(0)
                if self.kv_pool is not None:
                    await self.kv_pool.stop(_POOL_GRACE_S)
                if self._session is not None and not self._session.over.done():
                    # Nobody may be left waiting for what cannot go on.
                    self._session.exhausted("the engine was closed")

    async def _work(self, pool: InstancePool) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self.kv_pool is not None:
                await self.kv_pool.start()
                tasks.create_task(self.kv_pool.supervise())
            await pool.start()
            self.started.set_result(None)
            await pool.supervise()

    async def _leave_session(self) -> None:
        """Let the instances stop what a rollout still runs."""
        session = self._session
        if session is not None and not session.over.done():
            session.engine_closes()
            await wait_awake(session.over, self._config.shutdown_timeout_s)
