"""Which node's KV pool is told what, and what an engine's pools are together."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.config import EngineConfig
from aseer.core.residency import NO_POOL
from aseer.errors import ConfigError
from aseer.kv import agent
from aseer.kv.agent import PoolAgent
from aseer.kv.links import PULL_TIMEOUT_S
from aseer.kv.messages import (
    Free,
    PoolCounts,
    PoolState,
    Prefetch,
    Pulled,
    ServerState,
)
from aseer.kv.pool import KvPool
from aseer.node.machine import Launch, Machine
from aseer.node.remote import RemoteNode
from aseer.runtime.kv_pools import KvPools
from aseer.types import InstanceId
from tests.unit.builders import info_of
from tests.unit.kv.test_pool_plan import plan_of
from tests.unit.node.test_fetching import JOIN

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGES = {"lmcache": "0.5.6", "torch": "2.10.0"}
MACHINE = Machine(
    gpus=(),
    cores=(0, 1),
    free_memory_bytes=8 << 30,
    free_shm_bytes=4 << 30,
    cpu_only=True,
    cpu_dtype="float32",
)


class FakePool:
    """Keeps what it is told; see `KvPool`."""

    granularity = 128
    prefetches = True

    def __init__(self, num_servers: int = 1, **counts: int) -> None:
        self.num_servers = num_servers
        self.counts = PoolCounts(**counts)
        self.num_restarts = 1
        self.told: list[Any] = []
        self.pulls: list[tuple[Any, asyncio.Future[Pulled]]] = []
        self.address = "tcp://10.0.0.1:1"
        self.free = self.prefetch = self.told.append
        self.is_closed = False

    def server_of(self, index: int) -> int:
        return index * self.num_servers // 2

    def engine_args(self, index: int) -> dict[str, Any]:
        return {"of": (self, index)}

    @property
    def state(self) -> PoolState:
        servers = [ServerState(1, "", True, self.address)] * self.num_servers
        return PoolState(self.counts, 0, servers)

    def close(self) -> None:
        self.is_closed = True

    def pull(self, order: Any) -> asyncio.Future[Pulled]:
        done: asyncio.Future[Pulled] = asyncio.get_running_loop().create_future()
        self.pulls.append((order, done))
        return done

    def cause(self, index: int) -> str:
        return f"; of {index}"

    async def drop_older(self, version: int) -> None:
        self.told.append(version)


class Place:
    """A node; here it only is one, unlike all others."""

    def __init__(self, name: str) -> None:
        self.name = name


def node(name: str) -> Any:
    return Place(name)


def pools_of(*pools: Any, kind: str | None = None) -> tuple[KvPools, list[Any]]:
    """Nodes with two instances each, numbered in their order."""
    made = KvPools(EngineConfig(model="m"))
    nodes = [node(f"n{i}") for i in range(len(pools))]
    for i, (each, pool) in enumerate(zip(nodes, pools, strict=True)):
        if pool is not None:
            made.add(each, pool, kind)
        for k in range(2):
            made.engine_args(each, InstanceId(2 * i + k))
    return made, nodes


def test_instances_share_the_pool_of_their_node():
    first, second = FakePool(2), FakePool()
    pools, nodes = pools_of(first, None, second)
    numbers = [pools.server_of(InstanceId(i)) for i in range(7)]
    assert numbers == [0, 1, NO_POOL, NO_POOL, 2, 2, NO_POOL]
    assert pools.engine_args(nodes[2], InstanceId(5)) == {"of": (second, 1)}
    assert pools.engine_args(nodes[1], InstanceId(2)) == {}
    assert pools.cause(InstanceId(1)) == "; of 1"
    assert pools.cause(InstanceId(2)) == ""


def test_a_pool_is_told_what_its_own_instances_have():
    """As pieces of a model's KV, as `InstanceInfo.kv_world_size` counts them."""
    first, second = FakePool(), FakePool()
    pools, _ = pools_of(first, second)
    info = replace(info_of(), kv_world_size=2)
    pools.free(info, 3, bytes(8), 1, [InstanceId(0), InstanceId(1)])
    pools.prefetch(info, 3, bytes(8), [InstanceId(3)])
    (freed,), (fetched,) = first.told, second.told
    assert isinstance(freed, Free)
    assert (freed.world_size, freed.start) == (2, 1)
    assert isinstance(fetched, Prefetch)
    assert (fetched.world_size, fetched.salt) == (2, freed.salt)
    assert freed.salt.startswith(pools.namespace)


async def test_figures_add_up_over_nodes_and_outlive_them():
    pools, nodes = pools_of(
        FakePool(stored=3, resident=2, per_chunk=7), FakePool(stored=4, resident=1)
    )
    total = PoolCounts(stored=7, resident=3, per_chunk=7)
    assert (pools.counts, pools.num_restarts) == (total, 2)
    pools.leave(nodes[1])
    left = PoolCounts(stored=7, resident=2, per_chunk=7)
    assert (pools.counts, pools.num_restarts) == (left, 2)
    assert pools.server_of(InstanceId(2)) == NO_POOL
    await pools.drop_older(5)
    pools.free(info_of(), 0, b"", 0, [InstanceId(2)])


@pytest.mark.parametrize("pool", [None, FakePool()])
def test_a_node_that_is_gone_is_forgotten_and_its_number_is_not_used_again(pool):
    pools, numbers = KvPools(EngineConfig(model="m")), []
    for i in range(3):
        node: Any = RemoteNode(JOIN, lambda data: None)
        if pool is not None:
            pools.add(node, pool)
        pools.engine_args(node, InstanceId(i))
        numbers.append(pools.server_of(InstanceId(i)))
        gone = weakref.ref(node)
        pools.leave(node)
        del node
        gc.collect()
        assert gone() is None
    assert numbers == ([NO_POOL] * 3 if pool is None else [0, 1, 2])


def test_a_pool_of_another_connector_is_one_over_all_nodes():
    pools, _ = pools_of(KvPool(plan_of(0), 2, Path(), None), None)
    assert {pools.server_of(InstanceId(i)) for i in range(4)} == {0}
    assert pools.granularity == 128
    assert pools.counts == PoolCounts()


def told(instance: int, why: str = "", block_size: int = 16) -> Any:
    """What an instance says of itself."""
    return replace(
        info_of(),
        instance_id=InstanceId(instance),
        why_no_pool=why,
        block_size=block_size,
    )


def test_a_pool_that_its_engines_cannot_use_is_ended_and_the_log_says_why(caplog):
    first, second = FakePool(stored=3), FakePool()
    pools, nodes = pools_of(first, second)
    pools.check(told(0))
    assert not first.is_closed
    for instance in (2, 3):  # both say so, and it is said once
        pools.check(told(instance, "its blocks have 96 tokens"))
    assert (first.is_closed, second.is_closed) == (False, True)
    numbers = [pools.server_of(InstanceId(i)) for i in range(4)]
    assert numbers == [0, 0, NO_POOL, NO_POOL]
    assert pools.engine_args(nodes[1], InstanceId(2)) == {}
    assert pools.granularity == 128
    warned = [r.getMessage() for r in caplog.records if r.name == "aseer"]
    assert warned == ["no KV pool on node n1: its blocks have 96 tokens"]
    pools.check(told(0, "its blocks have 96 tokens"))
    assert first.is_closed
    assert pools.granularity == 0, "chunks end where the engines' blocks do"
    assert pools.counts.stored == 3


def test_a_pool_that_was_asked_for_and_cannot_be_used_is_an_error():
    made = KvPools(EngineConfig(model="m", kv_pool="lmcache"))
    made.add(here := node(""), FakePool())
    made.engine_args(here, InstanceId(0))
    with pytest.raises(ConfigError, match="cannot be had: its blocks have 96 tokens"):
        made.check(told(0, "its blocks have 96 tokens"))


def test_chunks_end_at_the_blocks_of_engines_with_another_connector():
    pools, _ = pools_of(KvPool(plan_of(0), 2, Path(), None), None)
    pools.check(told(0, block_size=96))
    pools.check(told(1, block_size=96))
    assert pools.granularity == 384


class Far:
    """A node on another host, its agent's pool, and what they say to each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **machine: Any) -> None:
        monkeypatch.setattr(agent, "KvPool", self._make)
        self.made: list[Any] = []
        self.state = PoolState(
            PoolCounts(stored=5), 2, [ServerState(6555, "/log/kv-pool-0.log", True)]
        )
        fakes: Any = [None] * 4
        self.pool = PoolAgent(*fakes)
        join = replace_join(machine=replace(MACHINE, **machine), packages=PACKAGES)
        self.node = RemoteNode(join, lambda data: None)
        self.node.tell_pool = self.pool.take  # type: ignore[method-assign]

    async def run(self) -> None:
        await self.pool.run(
            lambda data: self.node.on_pool(data), lambda: "tcp://127.0.0.1:1"
        )

    def _make(self, plan: Any, num_instances: int, *_: Any) -> Any:
        async def forever() -> None:
            await asyncio.Event().wait()

        async def stop(grace_s: float) -> None:
            self.made.append("stopped")

        def close() -> None:
            self.made.append("closed")

        self.made.append((plan, num_instances))
        return SimpleNamespace(
            announce=lambda: None,
            run=forever,
            stop=stop,
            close=close,
            state=self.state,
            free=self.made.append,
            prefetch=self.made.append,
            drop_older_soon=self.made.append,
        )


def replace_join(**changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(JOIN, **changes)


def launches_of(num: int) -> list[Launch]:
    return [
        Launch(
            instance_id=i,
            backend="vllm",
            engine_args={"block_size": 32},
            env={"VLLM_CPU_OMP_THREADS_BIND": "0"},
            share="core 0",
        )
        for i in range(num)
    ]


async def test_a_node_that_joins_has_a_pool_of_its_own(monkeypatch):
    far = Far(monkeypatch)
    pools = KvPools(EngineConfig(model="m", kv_pool={"dram_bytes": 64 << 20}))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(far.run())
        await pools.join(far.node, launches_of(2), pulls=False)
        (plan, num), *_ = far.made
        assert (plan.dram_bytes, plan.chunk_tokens, num) == (64 << 20, 128, 2)
        args = pools.engine_args(far.node, InstanceId(8))["kv_transfer_config"]
        extra = args["kv_connector_extra_config"]
        assert extra["lmcache.mp.port"] == 6555
        assert (pools.counts.stored, pools.num_restarts) == (5, 2)
        pools.free(info_of(), 0, bytes(8), 1, [InstanceId(8)])
        await pools.drop_older(4)
        assert far.made[1].start == 1
        assert far.made[2] == 4
        pools.check(told(8, "its blocks have 96 tokens"))
        assert far.made[3] == "closed"
        assert pools.engine_args(far.node, InstanceId(8)) == {}
        running.cancel()
    assert far.made[-1] == "stopped"


async def test_engines_of_a_node_whose_pool_fails_start_without_it(monkeypatch):
    far = Far(monkeypatch)
    pools = KvPools(EngineConfig(model="m", kv_pool={"dram_bytes": 64 << 20}))
    make = far._make

    def failing(*args: Any) -> Any:
        async def fail() -> None:
            far.state = PoolState(PoolCounts(), 0, [ServerState(6555, "", False)])
            made.state = far.state
            raise RuntimeError("a fault of ours")

        made = make(*args)
        made.run = fail
        return made

    monkeypatch.setattr(agent, "KvPool", failing)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(far.run())
        await pools.join(far.node, launches_of(2), pulls=False)
        await asyncio.sleep(0.01)
    assert pools.engine_args(far.node, InstanceId(0)) == {}


@pytest.mark.parametrize(
    ("settings", "num", "machine"),
    [
        ({"kv_pool": "off"}, 2, {}),
        ({}, 1, {}),
        ({"chunk_size": 0}, 2, {}),
        ({}, 2, {"free_memory_bytes": 1 << 20}),
    ],
)
async def test_a_node_without_use_or_room_for_a_pool_has_none(
    monkeypatch, settings, num, machine
):
    far = Far(monkeypatch, **machine)
    pools = KvPools(EngineConfig(model="m", **settings))
    await pools.join(far.node, launches_of(num), pulls=False)
    assert far.made == []
    assert pools.granularity == 0
    assert pools.engine_args(far.node, InstanceId(0)) == {}


async def test_a_node_that_cannot_have_the_pool_asked_for_is_refused(monkeypatch):
    far = Far(monkeypatch, free_memory_bytes=1 << 20)
    pools = KvPools(EngineConfig(model="m", kv_pool="lmcache"))
    with pytest.raises(ConfigError, match="kv_pool"):
        await pools.join(far.node, launches_of(2), pulls=False)


async def test_a_node_that_keeps_other_pieces_together_has_no_pool(monkeypatch):
    far = Far(monkeypatch)
    pools = KvPools(EngineConfig(model="m", kv_pool={"dram_bytes": 64 << 20}))
    other: Any = FakePool()
    other.granularity = 96
    pools.add(node("here"), other)
    await pools.join(far.node, launches_of(2), pulls=False)
    assert far.made == []
    assert pools.granularity == 96


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_node_that_is_lost_is_not_waited_for(monkeypatch, when):
    far = Far(monkeypatch)
    pools = KvPools(EngineConfig(model="m", kv_pool={"dram_bytes": 64 << 20}))
    lose: Callable[[], None] = lambda: far.node.lose("its host died")  # noqa: E731
    if when == "before":
        lose()
    else:
        asyncio.get_running_loop().call_soon(lose)
    await pools.join(far.node, launches_of(2), pulls=False)
    assert pools.engine_args(far.node, InstanceId(0)) == {}


def pull(pools: KvPools, before: int, where: int) -> asyncio.Future[Pulled] | None:
    info = replace(info_of(), instance_id=InstanceId(where))
    return pools.pull(info, 3, bytes(8), InstanceId(before), None)


async def test_kv_is_pulled_from_the_node_that_a_request_comes_from_and_no_other():
    first, second, third = FakePool(2), FakePool(2), FakePool(2)
    pools, _ = pools_of(first, second, third, kind="cpu")
    second.address = "tcp://10.0.0.2:1"
    assert [pools.server_of(InstanceId(i)) for i in range(4)] == [0, 1, 0, 1]
    done = pull(pools, 3, 1)
    assert done is not None
    ((order, _),) = first.pulls
    assert (order.source, order.server) == ("tcp://10.0.0.2:1", 1)
    assert (order.tokens, order.timeout_s) == (bytes(8), PULL_TIMEOUT_S)
    assert order.salt.endswith("-v3")
    assert second.pulls == third.pulls == []
    assert pools.pull_token_s() is None
    done.set_result(Pulled(order.pull, num_tokens=100, seconds=0.5))
    await asyncio.sleep(0)
    assert pools.pull_token_s() == 0.005


async def test_nothing_is_pulled_within_a_node_or_where_it_cannot_be():
    first, second = FakePool(), FakePool()
    pools, nodes = pools_of(first, second, kind="cpu")
    assert pull(pools, 0, 1) is None
    first.address = ""
    assert pull(pools, 0, 2) is None, "the other listens nowhere"
    assert pull(pools, 2, 0) is not None
    pools.leave(nodes[1])
    assert pull(pools, 2, 0) is None, "it is gone"
    pools, _ = pools_of(FakePool(), FakePool())
    assert pull(pools, 2, 0) is None, "nodes do not meet, or differ in what KV is"
    pools, _ = pools_of(FakePool(2), FakePool(2), kind="cpu")
    assert pull(pools, 3, 0) is None, "the scheduler did not expect it"


async def test_a_way_that_brings_nothing_is_left_alone_and_the_others_are_not():
    first, second, third = FakePool(), FakePool(), FakePool()
    pools, _ = pools_of(first, second, third, kind="cpu")
    done = pull(pools, 2, 0)
    assert done is not None
    done.set_result(Pulled(0, error="it took too long"))
    await asyncio.sleep(0)
    assert pull(pools, 2, 0) is None
    assert pull(pools, 4, 0) is not None
    assert pull(pools, 0, 2) is not None


async def test_a_node_that_gives_no_word_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("aseer.runtime.kv_pools.PULL_TIMEOUT_S", 0.1)
    pools, _ = pools_of(FakePool(), FakePool(), kind="cpu")
    done = pull(pools, 2, 0)
    assert done is not None
    async with asyncio.timeout(5):
        assert "no word" in (await done).error
