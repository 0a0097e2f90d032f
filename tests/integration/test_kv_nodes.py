"""The KV pool of a node on another host: real servers, kept up by its agent."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from array import array
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from aseer.config import EngineConfig
from aseer.kv.agent import PoolAgent
from aseer.kv.messages import Free
from aseer.kv.remote import RemotePool
from aseer.node.interpreter import this_interpreter
from aseer.node.leftovers import Leftovers
from aseer.runtime.kv_pools import KvPools
from aseer.transport.keys import new_keys
from aseer.transport.zeromq import make_socket_dir
from aseer.types import InstanceId
from tests.integration.test_kv_pool import eventually, on_uvloop, shared_memory
from tests.unit.builders import info_of
from tests.unit.kv.test_pool_plan import plan_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aseer.transport.keys import Keys

pytest.importorskip("lmcache")
pytestmark = pytest.mark.timeout(240)


class Node:
    """An agent's pool, and the same as the controller has it."""

    def __init__(self, folder: Path, leftovers: Leftovers, keys: Keys | None) -> None:
        self.name = folder.name
        self.agent = PoolAgent(folder, leftovers, this_interpreter(), keys)
        plan = plan_of(1, dram_bytes=64 << 20, timeout_s=2.0)
        self.pool = RemotePool(plan, 2, self.agent.take)

    @property
    def pid(self) -> int | None:
        """Of its server."""
        pool = self.agent._pool
        assert pool is not None
        return next(iter(pool.pids), None)


@asynccontextmanager
async def node_in(folder: Path, keys: Keys | None = None) -> AsyncIterator[Node]:
    leftovers = Leftovers(make_socket_dir())
    node = Node(folder, leftovers, keys)
    try:
        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(
                node.agent.run(node.pool.take, lambda: "tcp://127.0.0.1:1")
            )
            await node.pool.is_known.wait()
            await eventually(lambda: node.pid)
            yield node
            running.cancel()
    finally:
        leftovers.remove()


@on_uvloop
async def test_a_node_keeps_its_servers_up_and_tells_of_them(tmp_path):
    async with node_in(tmp_path) as node:
        pid = node.pid
        told = node.pool.engine_args(0)
        assert told == node.pool.engine_args(1) != {}
        assert str(tmp_path) in node.pool.cause(0)
        await eventually(lambda: node.pool.counts.capacity == 64 << 20)
        tokens = array("i", range(300)).tobytes()
        node.pool.free(Free("m", 1, "s-v0", tokens, 0))
        await node.pool.drop_older(1)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not node.pool.engine_args(0))
        await eventually(lambda: node.pool.num_restarts == 1)
        assert node.pool.engine_args(0) == told
        last = node.pid
        assert last != pid
    assert not psutil.pid_exists(last)
    assert not shared_memory()


@on_uvloop
async def test_a_pull_goes_from_the_controller_to_a_nodes_server_and_its_end_back(
    tmp_path,
):
    """There are no engines, and so no KV: see `test_kv_peers` for what is given."""
    keys = new_keys()
    pools = KvPools(EngineConfig(model="m"))
    async with node_in(tmp_path / "a", keys) as a, node_in(tmp_path / "b", keys) as b:
        for number, node in enumerate((a, b)):
            place: Any = node
            pools.add(place, node.pool, "cpu")
            pools.engine_args(place, InstanceId(number))
        await eventually(lambda: b.pool.state.servers[0].address)
        info = info_of(0)
        tokens = array("i", range(300)).tobytes()
        began_s = time.monotonic()
        done = pools.pull(info, 0, tokens, InstanceId(1), None)
        assert done is not None
        pulled = await done
        assert pulled.error == "no engine here has such KV"
        assert time.monotonic() - began_s < 2.0
        assert pools.pull(info, 0, tokens, InstanceId(1), None) is None, "for a while"
        # One whose server dies meanwhile is told of at once.
        os.kill(b.pid, signal.SIGSTOP)
        done = pools.pull(info_of(1), 0, tokens, InstanceId(0), None)
        assert done is not None
        os.kill(b.pid, signal.SIGKILL)
        assert (await done).error
        assert time.monotonic() - began_s < 5.0
    assert not shared_memory()
