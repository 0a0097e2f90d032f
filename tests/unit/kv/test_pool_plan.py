"""Which engine belongs to which server, and what a closed engine leaves: nothing."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.inputs.kv_pool import KvPoolConfig
from aseer.kv.messages import PoolCounts
from aseer.kv.pool import KvPool, plan_kv_pool
from aseer.kv.process import ServerProcess
from aseer.kv.settings import PoolPlan
from aseer.node.machine import Launch
from aseer.runtime.causes import start_error


def plan_of(num_servers: int, **settings: Any) -> PoolPlan:
    defaults: dict[str, Any] = {
        "dram_bytes": 1 << 30,
        "disk_bytes": 0,
        "disk_dir": None,
        "chunk_tokens": 128,
        "timeout_s": 5.0,
        "why": "a test",
    }
    return PoolPlan(num_servers=num_servers, **defaults | settings)


def test_servers_share_out_the_engines_in_order():
    for num_servers, expected in (
        (1, [0, 0, 0, 0]),
        (2, [0, 0, 1, 1]),
        (4, [0, 1, 2, 3]),
    ):
        pool = KvPool(plan_of(num_servers), 4, Path(), None)
        assert [pool.server_of(i) for i in range(4)] == expected


def test_an_engine_that_starts_while_its_server_is_down_has_no_pool():
    pool = KvPool(plan_of(1), 2, Path(), None)
    assert pool.pids == []
    assert pool.engine_args(0) == {}


def test_an_engine_that_starts_together_with_its_server_is_told_of_it():
    pool = KvPool(plan_of(1), 2, Path(), None)
    pool.announce()
    assert pool.pids == []
    assert pool.engine_args(0) == pool.engine_args(1) != {}


def test_a_servers_last_error_is_told_with_an_engines(tmp_path):
    pool = KvPool(plan_of(1), 2, tmp_path, None)
    assert pool.cause(0) == ""
    log = tmp_path / "kv-pool-0.log"
    log.write_text("INFO up\nModuleNotFoundError: No module named 'cupy'\nINFO on\n")
    assert pool.cause(1).endswith("says: ModuleNotFoundError: No module named 'cupy'")
    assert KvPool(plan_of(0), 2, tmp_path, None).cause(0) == ""


@pytest.mark.parametrize(
    ("own", "is_told"),
    [("ConnectionError: Cannot reach the LMCache MP server", True), ("OSError", False)],
)
def test_a_start_that_fails_at_the_pool_gives_the_pools_own_cause(own, is_told):
    launch = SimpleNamespace(share="GPU 0")
    slot = SimpleNamespace(
        failure=own, killed_because=None, instance_id=0, launch=launch
    )
    process = SimpleNamespace(cause=lambda: None, log_tail=lambda: "")
    told = start_error(slot, process, "exited with status 1", "; the pool's word")
    assert (f"cause: {own}; the pool's word" in str(told)) == is_told


def test_a_pool_of_another_connector_is_one_for_all_engines_and_starts_nothing():
    pool = KvPool(plan_of(0), 4, Path(), None)
    assert {pool.server_of(i) for i in range(4)} == {0}
    assert pool.engine_args(0) == {}
    assert pool.counts == PoolCounts()


async def test_a_pool_that_is_closed_ends_its_servers(monkeypatch):
    pool = KvPool(plan_of(2), 2, Path(), None)
    ended = []
    started = asyncio.Event()

    async def keep_up() -> None:
        started.set()
        await asyncio.Event().wait()

    async def nothing(server: Any) -> None: ...

    monkeypatch.setattr(ServerProcess, "try_to_start", nothing)
    for server in pool._servers:
        monkeypatch.setattr(server, "keep_up", keep_up)
        monkeypatch.setattr(server, "end", partial(end, ended, server))
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(pool.run())
        await started.wait()
        assert not ended
        pool.close()
        await running
    assert ended == pool._servers


async def end(ended: list[Any], server: Any, grace_s: float) -> None:
    ended.append(server)


def test_simulated_engines_have_none():
    launch = Launch(instance_id=0, backend="sim", engine_args={}, env={}, share="")
    config = EngineConfig(model="m", kv_pool=KvPoolConfig(mode="lmcache"))
    assert plan_kv_pool(config, [launch]) is None


def test_modes_are_checked():
    assert EngineConfig(model="m", kv_pool="off").kv_pool == KvPoolConfig(mode="off")
    with pytest.raises(ConfigError, match="one of auto, off, lmcache"):
        EngineConfig(model="m", kv_pool="on")
