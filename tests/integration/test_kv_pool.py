"""The pool's server: started, asked, killed, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import sys
from array import array
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest
import uvloop

import aseer
from aseer.config import EngineConfig
from aseer.inputs.kv_pool import KvPoolConfig
from aseer.instance.vllm.stats import EngineStats
from aseer.kv.messages import Free
from aseer.kv.pool import KvPool
from aseer.kv.settings import CONNECTOR, SHM_PREFIX, Memory, plan_pool
from aseer.node.leftovers import Leftovers
from aseer.node.machine import GPU_VARIABLES
from aseer.node.process import InstanceProcess
from aseer.transport.zeromq import make_socket_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytest.importorskip("lmcache")
pytestmark = pytest.mark.timeout(240)

GIB = 1 << 30


def on_uvloop(test):
    """As in an engine: its transports differ from asyncio's where a pipe breaks."""

    @functools.wraps(test)
    def run(**arguments):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(**arguments))

    return run


@asynccontextmanager
async def running(tmp_path: Path, timeout_s: float = 2.0) -> AsyncIterator[KvPool]:
    """A pool with a disk tier, up and supervised."""
    settings = KvPoolConfig(
        dram_bytes=64 << 20,
        disk_dir=tmp_path / "kv",
        disk_bytes=GIB,
        timeout_s=timeout_s,
    )
    config = EngineConfig(model="m", kv_pool=settings)
    memory = Memory(free_bytes=GIB, shm_free_bytes=GIB)
    plan, _ = plan_pool(config, 2, 32, memory, obstacle=None)
    assert plan is not None
    leftovers = Leftovers(make_socket_dir())
    pool = KvPool(plan, 2, tmp_path, leftovers)
    try:
        async with asyncio.TaskGroup() as tasks:
            await pool.start()
            supervisor = tasks.create_task(pool.supervise())
            yield pool
            supervisor.cancel()
    finally:
        await pool.stop(3.0)
        leftovers.remove()
    assert not shared_memory()
    assert not list((tmp_path / "kv").glob("*"))


def shared_memory() -> list[str]:
    names = os.listdir("/dev/shm")
    return [
        name for name in names if name.startswith(f"{SHM_PREFIX}aseer-{os.getpid()}")
    ]


async def eventually(condition, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (it is another thread's or process's)
            await asyncio.sleep(0.1)


@on_uvloop
async def test_it_serves_and_leaves_nothing_behind(tmp_path):
    async with running(tmp_path) as pool:
        (pid,) = pool.pids
        assert len(shared_memory()) == 1
        assert pool.engine_args(0) == pool.engine_args(1) != {}
        pool.free(Free("m", 1, "s-v0", array("i", range(300)).tobytes(), 0))
        await pool.drop_older(1)
        assert pool.counts.capacity == 64 << 20
        assert pool.pids == [pid]
    assert not psutil.pid_exists(pid)


@on_uvloop
async def test_it_sees_no_device_whatever_the_trainer_sees(tmp_path, monkeypatch):
    for variable in GPU_VARIABLES:
        monkeypatch.setenv(variable, "0,1,2,3")
    async with running(tmp_path) as pool:
        (pid,) = pool.pids
        seen = psutil.Process(pid).environ()
    assert [seen[variable] for variable in GPU_VARIABLES] == ["", ""]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
@on_uvloop
async def test_a_lost_server_is_replaced_at_its_port(tmp_path, kind):
    async with running(tmp_path) as pool:
        (pid,) = pool.pids
        told = pool.engine_args(0)
        os.kill(pid, kind)
        await eventually(lambda: not pool.pids)
        await asyncio.wait_for(pool.drop_older(1), 1.0)
        assert pool.engine_args(0) == {}
        await eventually(lambda: pool.pids)
        assert pool.pids != [pid]
        assert pool.num_restarts == 1
        assert pool.engine_args(0) == told
        assert not psutil.pid_exists(pid)


SERVER = """
import sys, time
answers = sys.argv[1:]
for line in sys.stdin:  # the first says how to run, and each of the others asks
    answer = answers.pop(0) if answers else "silence"
    if answer == "silence":
        time.sleep(600)
    said = {"good": '{"type":"counts"}', "long": "x" * 200_000}
    print(said.get(answer, answer), flush=True)
"""


@pytest.mark.parametrize("answer", ["nonsense", "[1, 2]", "long", "silence"])
@on_uvloop
async def test_a_server_that_talks_nonsense_or_falls_silent_costs_only_itself(
    tmp_path, monkeypatch, answer
):
    """Who waits for it does not wait long, whatever else is told to it meanwhile."""
    command = (sys.executable, "-c", SERVER, "good", answer)
    monkeypatch.setattr(
        "aseer.node.interpreter.Interpreter.command", lambda self, *module: command
    )
    async with running(tmp_path, timeout_s=0.5) as pool:
        (pid,) = pool.pids
        async with asyncio.timeout(10.0), asyncio.TaskGroup() as tasks:
            for version in range(1, 4):
                tasks.create_task(pool.drop_older(version))
            tasks.create_task(pool.clear_dram())
        assert pool.pids != [pid]
        await eventually(lambda: pool.num_restarts)
        assert not psutil.pid_exists(pid)


@on_uvloop
async def test_it_ends_with_its_controller(tmp_path):
    async with running(tmp_path) as pool:
        (pid,) = pool.pids
        server = psutil.Process(pid)
        pool._servers[0]._process.stdin.close()
        await eventually(lambda: not server.is_running() or server.status() == "zombie")


def test_what_another_connector_tells_is_not_taken_for_ours():
    told = {"stored_tokens": 3}
    for name, expected in ((CONNECTOR, 3), ("Mooncake", None)):
        stats = EngineStats()
        transfer = SimpleNamespace(kv_connector=name)
        logger = stats.make_logger(SimpleNamespace(kv_transfer_config=transfer))
        step = SimpleNamespace(
            num_running_reqs=1,
            num_waiting_reqs=0,
            kv_cache_usage=0.5,
            kv_connector_stats=told if name == CONNECTOR else {"puts": [1.5, 2.5]},
            spec_decoding_stats=None,
        )
        logger.record(step, None)
        kv = stats.load().kv
        assert (kv and kv.stored_tokens) == expected
        assert stats.load().num_running == 1


def test_no_two_runs_find_each_others_kv(monkeypatch):
    namespaces = []
    start = InstanceProcess.start

    async def noting(name, line, *args):
        namespaces.append(json.loads(line)["kv_namespace"])
        return await start(name, line, *args)

    monkeypatch.setattr(InstanceProcess, "start", noting)
    for _ in range(2):
        with aseer.Engine(EngineConfig(model="m", device="sim", num_instances=2)):
            pass
    assert len(set(namespaces)) == 2
    assert all(namespaces)
    assert namespaces[0] == namespaces[1]
