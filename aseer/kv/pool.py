"""The KV pool of a node: its servers, kept up, and what is to be freed in them.

A pool is never needed: whatever happens to a server costs recomputation. One that
exits, or gives no answer in time, is killed and started again, at the same port, after
a pause that doubles while servers are lost in quick succession; its engines find it
there by themselves. An engine that starts while its server is down runs without a pool
until it is started again.

Servers and engines are started at once, since a server takes all its memory when it
starts. An engine waits for its server before it loads anything
(`aseer.instance.vllm.joining`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aseer.compat.versions import installed_packages, lmcache_obstacle
from aseer.kv.guard import pool_cause
from aseer.kv.messages import PoolCounts, PoolState, ServerState
from aseer.kv.process import ServerProcess, sum_counts
from aseer.kv.room import node_memory
from aseer.kv.settings import plan_pool, transfer_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from aseer.config import EngineConfig
    from aseer.kv.messages import Free, PeerSpec, Prefetch, Pull, Pulled
    from aseer.kv.settings import Memory, PoolPlan
    from aseer.models.traits import ModelTraits
    from aseer.node.interpreter import Interpreter
    from aseer.node.leftovers import Leftovers
    from aseer.node.machine import Launch

_log = logging.getLogger("aseer")

# A server that is asked to end is given this long before it is killed: it only has to
# unmap its memory.
STOP_GRACE_S = 3.0


class KvPool:
    """The pool servers of a node."""

    def __init__(
        self,
        plan: PoolPlan,
        num_instances: int,
        log_dir: Path,
        leftovers: Leftovers,
        interpreter: Interpreter | None = None,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            num_instances: that have it, numbered from 0.
            interpreter: that servers run on; None = the one of this process.
        """
        self._plan = plan
        self._num_instances = num_instances
        self._servers = [
            ServerProcess(
                plan,
                i,
                log_dir / f"kv-pool-{i}.log",
                leftovers,
                interpreter,
            )
            for i in range(plan.num_servers)
        ]
        self._is_over = asyncio.Event()

    @property
    def granularity(self) -> int:
        """Where chunks are to end, in tokens; a multiple of the engines' block size."""
        return self._plan.chunk_tokens

    @property
    def num_servers(self) -> int:
        """0 = it is another connector's."""
        return len(self._servers)

    @property
    def pids(self) -> list[int]:
        """Of the servers that are up."""
        return [s.pid for s in self._servers if s.pid is not None]

    @property
    def num_restarts(self) -> int:
        """Times a server was started again."""
        return sum(s.num_restarts for s in self._servers)

    @property
    def counts(self) -> PoolCounts:
        """What the servers did, over all their lives, and hold, as last heard."""
        total = PoolCounts()
        for server in self._servers:
            total = sum_counts(total, sum_counts(server.past, server.counts))
        return total

    def announce(self) -> None:
        """Tell engines of the servers from here on, which are about to start."""
        for server in self._servers:
            server.is_expected = True

    async def start(self) -> None:
        """Start the servers and wait until each serves, or failed to.

        One that failed is tried again while the engines run.
        """
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.try_to_start())

    async def run(self) -> None:
        """Start the servers, and keep them up until cancelled, or until `close`."""
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(self._work())
            await self._is_over.wait()
            working.cancel()
        await self.stop(STOP_GRACE_S)

    async def _work(self) -> None:
        await self.start()
        await self.supervise()

    def close(self) -> None:
        """Have `run` end the servers, which no engine uses."""
        self._is_over.set()

    async def supervise(self) -> None:
        """Ask after the servers, and start dead ones again, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.keep_up())

    async def stop(self, grace_s: float) -> None:
        """End the servers: SIGTERM, after `grace_s` SIGKILL. May be called again."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.end(grace_s))

    @property
    def state(self) -> PoolState:
        """As a controller on another host is told."""
        servers = [
            ServerState(s.port, str(s.log_path), s.is_expected, s.address)
            for s in self._servers
        ]
        return PoolState(self.counts, self.num_restarts, servers)

    def server_of(self, index: int) -> int:
        """Number of an instance's server; instances of one find each other's KV."""
        return server_of(index, self._num_instances, len(self._servers))

    def engine_args(self, index: int) -> dict[str, Any]:
        """What an engine that starts now is told; nothing if its server is down."""
        return engine_args(self._plan, self.state.servers, self.server_of(index))

    def cause(self, index: int) -> str:
        """What an instance's server says of its last error, to be added to another."""
        if not self._servers:
            return ""
        return pool_cause(self._servers[self.server_of(index)].log_path)

    def free(self, what: Free) -> None:
        """Nobody will ask for some KV again."""
        for server in self._servers:
            server.free(what)

    def open(self, peers: PeerSpec) -> None:
        """Let servers that start from now on talk to those of other nodes."""
        for server in self._servers:
            server.peers = peers

    def pull(self, order: Pull) -> asyncio.Future[Pulled]:
        """Take KV from another node's server; never fails otherwise than in words."""
        return self._servers[order.server].pull(order)

    @property
    def prefetches(self) -> bool:
        """Whether there is anything to load before it is asked for."""
        return self._plan.disk_dir is not None

    def prefetch(self, what: Prefetch) -> None:
        """Some KV will be asked for soon, by whichever engine.

        What of it is on disk only is loaded to DRAM, as far as there is room.
        """
        for server in self._servers:
            server.prefetch(what)

    async def clear_dram(self) -> None:
        """Drop from DRAM whatever is not being read or written; the disk keeps it."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.clear_dram())

    async def drop_older(self, version: int) -> None:
        """Free all KV of weight versions below `version`, and wait until it is gone.

        It cannot be found any more in any case: the version is in every key. What a
        server is just reading or writing goes some polls later; a server that does not
        answer is killed, and what it holds goes with it.
        """
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.drop_below(version))

    def drop_older_soon(self, version: int) -> None:
        """The same, without waiting."""
        for server in self._servers:
            server.drop_below_soon(version)


def server_of(index: int, num_instances: int, num_servers: int) -> int:
    """Number of the server of a node's instance; without servers all have the same."""
    return index * num_servers // num_instances


def engine_args(
    plan: PoolPlan, servers: list[ServerState], number: int
) -> dict[str, Any]:
    """What an engine that starts now is told of its server; nothing if that is down."""
    if not servers:
        return {}  # the user's own connector
    server = servers[number]
    if not server.is_expected:
        _log.warning("an engine starts without the KV pool: its server is down")
        return {}
    config = transfer_config(plan.timeout_s, server.port, server.log, plan.chunk_tokens)
    return {"kv_transfer_config": config}


def model_obstacle(traits: ModelTraits | None) -> str | None:
    """Why a model's KV cannot be in a pool; None = it can, or the model is not known.

    LMCache refuses models with several groups of layers, and of a window's tokens it
    would load more than the engine has blocks for.
    """
    if traits is None or traits.kinds == ("full",):
        return None
    return f"LMCache serves models of full attention alone; this one is {traits.words}"


def plan_kv_pool(
    config: EngineConfig,
    launches: list[Launch],
    memory: Memory | None = None,
    packages: Mapping[str, str] | None = None,
    where: str = "",
) -> PoolPlan | None:
    """The pool that a node has; None, and a line in the log that says why, if none.

    Args:
        launches: of its instances.
        memory, packages: of the node; None = of this machine.
        where: the node in words, for the log.
    Raises:
        ConfigError: one was asked for that cannot be had.
    """
    if config.nodes_per_instance > 1:
        _log.info("no KV pool: instances that span nodes have none")
        return None
    if config.data_parallel_size > 1:
        _log.info("no KV pool: instances that compute their experts together have none")
        return None
    if not launches or launches[0].backend != "vllm":
        return None
    interpreter = launches[0].interpreter
    if packages is None:
        packages = interpreter.packages if interpreter else installed_packages()
    plan, why = plan_pool(
        config,
        len(launches),
        launches[0].engine_args.get("block_size"),
        memory or node_memory(config),
        obstacle=model_obstacle(launches[0].traits)
        or lmcache_obstacle(
            packages.get("lmcache"),
            packages.get("torch"),
            on_gpu="VLLM_CPU_OMP_THREADS_BIND" not in launches[0].env,
        ),
    )
    if plan is None:
        _log.info("no KV pool%s: %s", where, why)
        return None
    if not plan.num_servers:
        _log.info("KV pool%s: %s", where, why)
        return plan
    disk = f" and {plan.disk_bytes / 1e9:.2f} GB of disk" if plan.disk_dir else ""
    num = plan.num_servers
    _log.info("KV pool%s: %d server(s) with %s%s each", where, num, why, disk)
    return plan
