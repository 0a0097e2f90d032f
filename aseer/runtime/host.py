"""The inside of an open engine: all that lives on the engine's own thread.

`Host` makes the parts and joins them. It is no machine: machines that instances run on
are nodes. The public `Engine` owns the thread (`aseer.runtime.loop_thread`) and calls
in from outside: `submit` runs a coroutine on the thread's event loop and gives its
result, `post` runs a function there, soon. Everything here runs on that loop.

    user's thread                       engine's thread
    Engine   -- submit, post -->  Host -- Updates, Sleep --+
                                   |                       |
    Rollout  -- submit, post -->  Rollouts -- Session -- InstancePool -- Router
             <--- Mailbox ------              (pure Controller inside)

    Claims            which call has the engine; the others wait, or are refused
    Updates, Sleep    what is done to the instances between rollouts
    Rollouts          begins rollouts, and ends them; a Session is the one in progress
    InstancePool      the instances: their processes, what is said to them and by them
    Router            carries messages to and from instances
    KvPools, Cluster  KV that instances share on a node; nodes on other machines

What fails belongs to what it was done for: an error in a rollout's decisions ends that
rollout, an error in a call ends that call. The engine ends only with its last instance
or its own loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aseer.errors import EngineError, describe
from aseer.inputs.images import ImageStore
from aseer.kv.pool import STOP_GRACE_S
from aseer.node.local import LocalNode
from aseer.runtime.activity import Activity, Call
from aseer.runtime.claims import Claims
from aseer.runtime.instances import InstancePool
from aseer.runtime.kv_pools import KvPools, kind_here
from aseer.runtime.metrics import Figures
from aseer.runtime.rollouts import Rollouts
from aseer.runtime.sleep import Sleep
from aseer.runtime.updates import Updates
from aseer.runtime.weights import NO_INSTANCE, WeightKeeper
from aseer.types import InstanceId, InstanceInfo, InstanceLoad

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from aseer.config import EngineConfig
    from aseer.dgds.server import DraftServer
    from aseer.inputs.calls import WakeTags
    from aseer.instance.messages import FromInstance, Report
    from aseer.kv.pool import KvPool
    from aseer.node.interpreter import Interpreter
    from aseer.node.machine import Launch
    from aseer.runtime.cluster import Cluster
    from aseer.runtime.loop_thread import LoopThread
    from aseer.runtime.serving import Folders
    from aseer.transport.base import Router

_log = logging.getLogger("aseer")


class Host:
    """The inside of an engine, from its opening to its end; see the module.

    Attributes:
        infos: of the instances that are up, by id. `limits` is the latest of them: all
            start with the same settings.
        weights: the versions of the weights, and what instances must load.
        folders: for sockets, logs and weights, and what the end of the engine removes.
        kv_pool: this machine's; None = there is none. `kv_pools` has all nodes'.
        cluster: nodes on other machines; None = they cannot join.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        launches: list[Launch],
        folders: Folders,
        thread: LoopThread,
        router: Router[FromInstance],
        endpoint: str,
        interpreter: Interpreter | None,
        draft_server: DraftServer | None,
        kv_pool: KvPool | None,
        cluster: Cluster | None = None,
    ) -> None:
        self._config = config
        self._thread = thread
        self._router = router
        self._draft_server = draft_server
        self._claims = Claims()
        # What each instance said of itself last; of one that is down, too.
        self._loads: dict[InstanceId, InstanceLoad] = {}
        # Why no instance is left, and none will come up by itself; None = some may.
        self._exhausted: str | None = None
        self.metrics_url: str | None = None
        self.kv_pool = kv_pool
        self.cluster = cluster
        self.folders = folders
        self.weights = WeightKeeper(folders.weights)
        self._images = ImageStore(folders.weights / "images")
        self.infos: dict[InstanceId, InstanceInfo] = {}
        self.limits: InstanceInfo
        self._log_paths = [
            folders.logs / f"instance-{launch.instance_id}.log" for launch in launches
        ]
        node = LocalNode(router, endpoint, folders.leftovers, folders.logs, interpreter)
        self.kv_pools = KvPools(config)
        if kv_pool is not None:
            peers = cluster.kv_peers if cluster else None
            if peers is not None:
                kv_pool.open(peers)
            self.kv_pools.add(node, kv_pool, peers and kind_here(launches))
        self._pool = InstancePool(
            config,
            launches,
            node,
            self,
            draft_server.spec if draft_server else None,
            self.kv_pools,
        )
        self._sleep = Sleep(self._pool)
        transfer = config.engine_args.get("weight_transfer_config") or {}
        self.updates = Updates(
            self.weights,
            self._pool,
            self.infos,
            self._claims.take,
            self._check_alive,
            transfer_backend=transfer.get("backend"),
            draft_server=draft_server,
            kv_pools=self.kv_pools,
        )
        self.rollouts = Rollouts(
            config,
            self._pool,
            self.weights,
            self._claims,
            thread,
            folders.logs,
            infos=self.infos,
            loads=self._loads,
            limits=lambda: self.limits,
            check_alive=self._check_alive,
            draft_server=draft_server,
            kv_pools=self.kv_pools,
        )

    @property
    def log_paths(self) -> list[Path]:
        """Log files of the instances."""
        return list(self._log_paths)

    async def run(self, stop: asyncio.Event, started: Future[Host]) -> None:
        """Bring the instances up, and work until `stop` is set.

        Then, in this order: refuse calls, end the rollout, end the processes. Whatever
        happens, none of them is left at the end.

        Args:
            started: gets this host once the instances are up.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                talking = tasks.create_task(
                    self._router.run(
                        self._pool.on_message, self._pool.on_lost, self._pool.on_gone
                    )
                )
                cluster = self.cluster
                joining = cluster and tasks.create_task(
                    cluster.talk(self._pool, self._draft_server, self.kv_pools)
                )
                working = tasks.create_task(self._work(started))
                await stop.wait()
                self._claims.close(self._thread.closed_error)
                await self.rollouts.stop()
                working.cancel()
                await asyncio.wait([working])  # nothing is started any more
                await self._pool.stop(self._config.shutdown_timeout_s)
                if cluster and joining:
                    await cluster.dismiss("the engine was closed")
                    joining.cancel()
                talking.cancel()
        except BaseException as error:
            self._thread.failure = error
            raise
        finally:  # what was done in order is done already, and does nothing again
            self._claims.close(self._thread.closed_error)
            self.weights.give_up("the engine was closed")
            self.weights.close()
            if self.cluster is not None:
                self.cluster.lose_all("the engine was closed")
            await self._pool.stop(0)
            if self.kv_pool is not None:
                await self.kv_pool.stop(STOP_GRACE_S)
            self.rollouts.give_up()

    async def _work(self, started: Future[Host]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                if self.kv_pool is not None:
                    self.kv_pool.announce()
                    tasks.create_task(self.kv_pool.run())
                if self.cluster is not None:
                    tasks.create_task(self.cluster.work())
                await self._pool.start()
                tasks.create_task(self._pool.supervise())
                if self.cluster is not None:
                    await self.cluster.wait_for_nodes()
                started.set_result(self)
        except Exception as error:
            if self.cluster is not None:
                await self.cluster.dismiss(f"the engine failed: {describe(error)}")
            raise

    def figures(self) -> Figures:
        """What there is to watch, at this moment."""
        figures = Figures(
            weight_version=self.weights.version,
            loads={i: self._loads[i] for i in sorted(self.infos)},
            nodes=[info.node or "local" for info in self.infos.values()],
            restarts={i: self._pool.num_restarts(i) for i in self._pool.places},
        )
        self.rollouts.count_into(figures)
        return figures

    @property
    def image_store(self) -> ImageStore | None:
        """Keeps prompts' images; None while instances on other hosts take part."""
        infos = list(self.infos.values())  # at once: this is called on users' threads
        is_here = not any(info.node for info in infos)
        return self._images if is_here else None

    # Calls from users' threads

    async def sleep(self, level: int, asker: object) -> None:
        """See `Engine.sleep`."""
        claim = await self._claims.take(Call.SLEEP, asker)
        if claim is None:
            return
        try:
            self._check_alive()
            if not self.infos:
                raise EngineError(NO_INSTANCE)
            try:
                await self._sleep.begin(self.infos, level)
            finally:
                self.weights.lacks_whole |= self._sleep.drops_weights
            self._claims.check_open()
        except BaseException:
            claim.release()
            raise
        claim.become(Activity.ASLEEP)

    async def wake(self, tags: WakeTags) -> None:
        """See `Engine.wake`."""
        claim = await self._claims.take(Call.WAKE)
        if claim is None:
            return
        if tags == ("kv_cache",) and not self._sleep.has_weights:
            claim.become(Activity.ASLEEP)
            raise EngineError(
                "the weights are asleep: wake them first, with wake(['weights']), or "
                "all at once, with wake()"
            )
        try:
            await self._sleep.end(self.infos, tags)
            self._claims.check_open()
        except BaseException:
            claim.release()
            raise
        if self._sleep.has_weights:
            claim.become(Activity.HALF_AWAKE)
        else:
            claim.release()

    def _check_alive(self) -> None:
        if self._exhausted is not None:
            raise EngineError(self._exhausted)

    # From the pool (see `PoolOwner`)

    def instance_up(self, info: InstanceInfo) -> None:
        """See `PoolOwner`."""
        self.kv_pools.check(info)
        self.weights.instance_up(info.instance_id)
        self.infos[info.instance_id] = self.limits = info
        self._loads[info.instance_id] = InstanceLoad()
        self._exhausted = None  # of a node that came late
        self._sleep.instance_up(info.instance_id)
        self.rollouts.tell(lambda s: s.instance_up(info, InstanceLoad()))

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        """See `PoolOwner`."""
        self._loads[instance_id] = report.load
        self.rollouts.tell(lambda s: s.instance_report(instance_id, report))

    def instance_down(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId] = ()
    ) -> None:
        """See `PoolOwner`."""
        for each in (instance_id, *partners):
            self.infos.pop(each, None)
            self.weights.instance_down(each, why)
        self.rollouts.tell(lambda s: s.instance_down(instance_id, why, partners))

    def instance_left(self, instance_id: InstanceId, why: str) -> None:
        """See `PoolOwner`."""
        self.infos.pop(instance_id, None)
        self._loads.pop(instance_id, None)
        self.weights.instance_down(instance_id, why)
        self.rollouts.tell(lambda s: s.instance_left(instance_id, why))

    def instances_need_weights(self, why: str) -> None:
        """See `PoolOwner`."""
        self.rollouts.tell(lambda s: s.exhausted(why))

    def instances_exhausted(self, why: str) -> None:
        """See `PoolOwner`."""
        self._exhausted = f"the engine has no instance left: {why}"
        self.rollouts.tell(lambda s: s.exhausted(why))
