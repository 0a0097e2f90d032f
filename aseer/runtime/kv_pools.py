"""The KV pools of an engine: one a node, which its instances share.

An instance loads what others of its node stored. The controller knows which node each
instance is on, and so which pool has what a request has computed there; so it tells
that pool alone what nobody will ask for again, or what is wanted soon. Before a request
goes on on another node, that node's pool pulls its KV from the one that has it, if that
takes less time than to compute it. The request waits for that a short time at most.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from aseer.compat.versions import installed_packages, vllm_distributions
from aseer.core.residency import NO_POOL
from aseer.errors import ConfigError
from aseer.kv.links import PULL_TIMEOUT_S, Link
from aseer.kv.messages import Free, PoolCounts, Prefetch, Pull, Pulled
from aseer.kv.pool import plan_kv_pool
from aseer.kv.process import ended_counts, sum_counts
from aseer.kv.remote import RemotePool
from aseer.kv.room import memory_for
from aseer.kv.settings import cache_salt

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Mapping

    from aseer.config import EngineConfig
    from aseer.kv.pool import KvPool
    from aseer.node.base import Node
    from aseer.node.machine import Launch
    from aseer.node.remote import RemoteNode
    from aseer.types import InstanceId, InstanceInfo

    Pool = KvPool | RemotePool

_log = logging.getLogger("aseer")

# For word of it to come, from a node that lives.
_WORD_S = 0.2


class KvPools:
    """See above."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.namespace = secrets.token_hex(4)
        """Of the keys: KV of other runs is never found, even in a shared tier."""
        self.granularity = 0
        """Where chunks are to end, in tokens; a multiple of the engines' block size.
        0 = there was no pool so far that engines could use.
        """
        self._is_external = False  # one pool of another connector, over all nodes
        self._pools: dict[Node, Pool] = {}
        self._kinds: dict[Node, Hashable] = {}
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self._num_numbers = itertools.count()  # none is used again
        self._links: dict[tuple[Node, Node], Link] = {}
        self._pulls = itertools.count()
        self._instances: dict[InstanceId, tuple[Node, int]] = {}
        self._num_seen: dict[Node, int] = {}  # instances of each node
        self._past = PoolCounts()  # of nodes that are gone
        self._past_restarts = 0

    def add(self, node: Node, pool: Pool, kind: Hashable | None = None) -> None:
        """A node has a pool.

        Args:
            kind: pools of one kind pull KV from each other; None = this one does not.
        """
        self.granularity = pool.granularity
        self._is_external |= not pool.num_servers
        self._pools[node] = pool
        self._kinds[node] = object() if kind is None else kind

    async def join(
        self, node: RemoteNode, launches: list[Launch], *, pulls: bool
    ) -> None:
        """Have a node that joins start its pool; it knows its servers' places then.

        Args:
            pulls: whether nodes pull KV from each other.
        Raises:
            ConfigError: one was asked for by name, and the node cannot have it.
        """
        machine = node.join.machine
        memory = memory_for(
            self._config, machine.free_memory_bytes, machine.free_shm_bytes
        )
        packages = node.join.packages
        where = f" on node {node.name}"
        plan = plan_kv_pool(self._config, launches, memory, packages, where)
        if plan is None or not self._fits(plan.chunk_tokens, where):
            return
        pool = RemotePool(plan, len(launches), node.tell_pool)
        self.add(node, pool, pool_kind(launches, packages) if pulls else None)
        node.on_pool = pool.take
        node.on_loss(pool.lose)
        await pool.is_known.wait()

    def _fits(self, granularity: int, where: str) -> bool:
        """Whether requests may go on there from what they computed on other nodes."""
        if self.granularity in (0, granularity):
            return True
        _log.warning(
            "no KV pool%s: it would keep %d tokens together, and others keep %d",
            where,
            granularity,
            self.granularity,
        )
        return False

    def check(self, info: InstanceInfo) -> None:
        """Take note of what an engine that came up has told of its KV.

        If it cannot be in the pool of its node, the others there cannot either, and the
        pool is ended.

        Raises:
            ConfigError: a pool was asked for by name.
        """
        if self._is_external:
            self.granularity = math.lcm(self.granularity, info.block_size)
        node = self._instances.get(info.instance_id, (None, 0))[0]
        pool = None if node is None else self._pools.get(node)
        if not info.why_no_pool or node is None or pool is None:
            return
        if self._config.kv_pool.mode == "lmcache":
            raise ConfigError(f"kv_pool='lmcache' cannot be had: {info.why_no_pool}")
        where = f" on node {node.name}" if node.name else ""
        _log.warning("no KV pool%s: %s", where, info.why_no_pool)
        pool.close()
        self.leave(node)
        if not self._pools:
            self.granularity = 0

    def leave(self, node: Node) -> None:
        """A node is gone, with all that its pool held, and is forgotten; or its pool is
        over.
        """
        kind = self._kinds.pop(node, None)
        self._num_seen.pop(node, None)
        self._instances = {i: p for i, p in self._instances.items() if p[0] is not node}
        if kind not in self._kinds.values():
            self._numbers = {s: n for s, n in self._numbers.items() if s[0] != kind}
        pool = self._pools.pop(node, None)
        if pool is not None:
            self._past = sum_counts(self._past, ended_counts(pool.counts))
            self._past_restarts += pool.num_restarts
            for link in [link for link in self._links if node in link]:
                del self._links[link]

    @property
    def counts(self) -> PoolCounts:
        """What all servers did, and hold, as last heard."""
        total = self._past
        for pool in self._pools.values():
            total = sum_counts(total, pool.counts)
        return total

    @property
    def num_restarts(self) -> int:
        """Times a server was started again."""
        return self._past_restarts + sum(p.num_restarts for p in self._pools.values())

    def engine_args(self, node: Node, instance_id: InstanceId) -> dict[str, Any]:
        """What an engine that starts now is told; nothing if its server is down."""
        if instance_id not in self._instances:
            index = self._num_seen.get(node, 0)
            self._num_seen[node] = index + 1
            self._instances[instance_id] = node, index
        pool = self._pools.get(node)
        if pool is None:
            return {}
        return pool.engine_args(self._instances[instance_id][1])

    def cause(self, instance_id: InstanceId) -> str:
        """What an instance's server says of its last error, to be added to another."""
        found = self._pool_of(instance_id)
        return "" if found is None else found[0].cause(found[1])

    def server_of(self, instance_id: InstanceId) -> int:
        """A number for an instance's server.

        Instances with the same one find each other's KV: at once on one node, and once
        it was pulled on another.
        """
        if self._is_external:
            return 0
        found = self._pool_of(instance_id)
        if found is None:
            return NO_POOL
        pool, index = found
        server = self._kinds[self._instances[instance_id][0]], pool.server_of(index)
        if server not in self._numbers:
            self._numbers[server] = next(self._num_numbers)
        return self._numbers[server]

    def _pool_of(self, instance_id: InstanceId) -> tuple[Pool, int] | None:
        """The pool of an instance, and the instance's number on its node."""
        node, index = self._instances.get(instance_id, (None, 0))
        pool = None if node is None else self._pools.get(node)
        return None if pool is None else (pool, index)

    def free(
        self,
        info: InstanceInfo,
        weight_version: int,
        tokens: bytes,
        start: int,
        instances: Iterable[InstanceId],
    ) -> None:
        """Nobody will ask for the KV of these tokens again, from `start` on.

        Args:
            info: of any engine.
            tokens: int32; a prompt, or a prompt and what was generated.
            instances: that may have stored some of it.
        """
        salt = cache_salt(self.namespace, info, weight_version)
        what = Free(info.model, info.kv_world_size, salt, tokens, start)
        for pool in self._pools_of(instances):
            pool.free(what)

    @property
    def prefetches(self) -> bool:
        """Whether there is anything to load before it is asked for."""
        return any(pool.prefetches for pool in self._pools.values())

    def prefetch(
        self,
        info: InstanceInfo,
        weight_version: int,
        tokens: bytes,
        instances: Iterable[InstanceId],
    ) -> None:
        """The KV of these tokens will be asked for soon.

        Args:
            info: of any engine.
            tokens: int32; a prompt and what was generated.
            instances: of which one stored all of it.
        """
        salt = cache_salt(self.namespace, info, weight_version)
        what = Prefetch(info.model, info.kv_world_size, salt, tokens)
        for pool in self._pools_of(instances):
            pool.prefetch(what)

    def pull(
        self,
        info: InstanceInfo,
        weight_version: int,
        tokens: bytes,
        before: InstanceId,
        compute_token_s: float | None,
    ) -> asyncio.Future[Pulled] | None:
        """Have KV pulled from another node to where a request goes on.

        Args:
            info: of the instance that it goes on on.
            tokens: int32; a prompt and what was generated.
            before: the instance that has its KV.
            compute_token_s: what computing a token takes; None = not known.
        Returns:
            When the request may go on; None = now.
        """
        here, there = self._pool_of(info.instance_id), self._pool_of(before)
        if self._is_external or here is None or there is None or here[0] is there[0]:
            return None
        if self.server_of(info.instance_id) != self.server_of(before):
            return None
        source = self._address_of(there)
        target, server = here[0], here[0].server_of(here[1])
        way = self._instances[before][0], self._instances[info.instance_id][0]
        link = self._links.setdefault(way, Link())
        now_s, num_tokens = time.monotonic(), len(tokens) // 4
        if not source or not link.pays(num_tokens, compute_token_s, now_s):
            return None
        link.begin(now_s)
        salt = cache_salt(self.namespace, info, weight_version)
        order = Pull(
            next(self._pulls),
            server,
            source,
            info.model,
            info.kv_world_size,
            salt,
            tokens,
            PULL_TIMEOUT_S,
        )
        done = target.pull(order)
        given_up = partial(_give_up, done, order.pull)
        late = asyncio.get_running_loop().call_later(PULL_TIMEOUT_S + _WORD_S, given_up)
        done.add_done_callback(lambda _: late.cancel())
        done.add_done_callback(partial(self._pulled, link, way))
        return done

    def _address_of(self, place: tuple[Pool, int]) -> str:
        """Where servers of other nodes find an instance's; "" = nowhere."""
        pool, index = place
        servers = pool.state.servers
        return servers[pool.server_of(index)].address if servers else ""

    def _pulled(
        self, link: Link, way: tuple[Node, Node], done: asyncio.Future[Pulled]
    ) -> None:
        pulled, now_s = done.result(), time.monotonic()
        if not link.over(pulled.num_tokens, pulled.seconds, pulled.error, now_s):
            return
        there, here = (node.name or "the trainer's host" for node in way)
        _log.warning(
            "KV does not go from %s to %s for a while, and is computed there: %s",
            there,
            here,
            pulled.error,
        )

    def pull_token_s(self) -> float | None:
        """What pulling a token takes, in the mean over the ways between nodes."""
        known = [s for link in self._links.values() if (s := link.token_s) is not None]
        return sum(known) / len(known) if known else None

    def _pools_of(self, instances: Iterable[InstanceId]) -> Collection[Pool]:
        found = (self._pool_of(instance_id) for instance_id in instances)
        return {each[0]: None for each in found if each is not None}

    async def drop_older(self, version: int) -> None:
        """Free all KV of weight versions below `version`.

        It cannot be found any more in any case: the version is in every key. This
        machine's is gone then; other nodes' goes when they hear of it.
        """
        for pool in list(self._pools.values()):
            await pool.drop_older(version)


def pool_kind(launches: list[Launch], packages: Mapping[str, str] | None) -> Hashable:
    """What KV in a node's pool depends on beside what its keys have.

    Args:
        packages: None = those of this process.
    """
    packages = installed_packages() if packages is None else packages
    others = packages.get("torch"), packages.get("lmcache")
    on_cpu = "VLLM_CPU_OMP_THREADS_BIND" in launches[0].env
    return tuple(vllm_distributions(packages)), others, on_cpu


def kind_here(launches: list[Launch]) -> Hashable:
    """Of this machine's pool."""
    interpreter = launches[0].interpreter
    return pool_kind(launches, interpreter.packages if interpreter else None)


def _give_up(done: asyncio.Future[Pulled], number: int) -> None:
    if not done.done():
        done.set_result(Pulled(number, error="its node gave no word in time"))
