"""Children that cannot be started leave nothing, and cost a start, not the engine."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import uvloop

import aseer
from aseer.node.children import Child, in_thread
from aseer.node.leftovers import Leftovers
from aseer.transport.zeromq import make_socket_dir
from tests.integration.sims import config_of, groups_of
from tests.waiting import until

SLEEPS = (sys.executable, "-c", "import time; time.sleep(600)")
LONG = {"ignore_eos": True, "max_tokens": 400}


@pytest.fixture
def leftovers():
    found = Leftovers(make_socket_dir())
    yield found
    found.remove()


def no_room(*args, **kwargs):
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def no_thread(*args, **kwargs):
    raise RuntimeError("can't start new thread")


async def replaced(engine: aseer.Engine, victim: int) -> None:
    """Wait until another process has the instance's place."""
    for _ in range(1000):
        pids = [info.pid for info in engine.instances]
        if len(pids) == 2 and victim not in pids:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the instance did not come back")


LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("step", ["process", "thread", "stdin", "stdout"])
def test_a_start_that_fails_half_way_leaves_nothing(
    step, loop_factory, leftovers, tmp_path, monkeypatch
):
    """Processes, threads and files are what the leak check looks for."""
    started = []
    start = subprocess.Popen

    def noting(*args, **kwargs):
        process = start(*args, **kwargs)
        started.append(process)
        return process

    async def attempt():
        monkeypatch.setattr("aseer.node.children.subprocess.Popen", noting)
        if step == "process":
            monkeypatch.setattr("aseer.node.children.subprocess.Popen", no_room)
        elif step == "thread":
            monkeypatch.setattr("aseer.node.children.threading.Thread.start", no_thread)
        else:
            loop = asyncio.get_running_loop()
            failing = {"stdin": "connect_write_pipe", "stdout": "connect_read_pipe"}

            class Failing:
                def __getattr__(self, name):
                    return no_room if name == failing[step] else getattr(loop, name)

            monkeypatch.setattr(
                "aseer.node.children.asyncio.get_running_loop", lambda: Failing()
            )
        with pytest.raises(OSError, match=r"unavailable|new thread"):
            await Child.start(SLEEPS, {}, tmp_path / "log", leftovers, answers=True)
        monkeypatch.undo()
        assert all(process.poll() == -signal.SIGKILL for process in started)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(attempt())


async def test_a_childs_id_is_its_own_until_it_is_ended(leftovers, tmp_path):
    """Whoever signals its group by that id can reach nobody else."""
    child = await Child.start(SLEEPS, {}, tmp_path / "log", leftovers)
    os.kill(child.pid, signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL
    assert os.getpgid(child.pid) == child.pid
    await child.end()
    with pytest.raises(ProcessLookupError):
        os.getpgid(child.pid)
    child.kill()
    child.terminate()
    await child.end()


def as_if_it_could_not_be_killed(monkeypatch):
    """Processes live on, as one does that a driver or a file system holds up."""
    for name in ("kill_group", "signal_group"):
        monkeypatch.setattr(f"aseer.node.children.{name}", lambda pid: None)
    monkeypatch.setattr("aseer.node.children.LONGEST_DEATH_S", 0.3)


async def test_a_process_that_cannot_be_killed_is_waited_for_only_so_long(
    leftovers, tmp_path, monkeypatch, caplog
):
    child = await Child.start(SLEEPS, {}, tmp_path / "log", leftovers)
    as_if_it_could_not_be_killed(monkeypatch)
    async with asyncio.timeout(20):
        waiting = asyncio.ensure_future(child.wait())  # noqa: TID251
        await child.end()
        assert await waiting == -signal.SIGKILL
    assert f"process {child.pid} was killed and lives on (state S" in caplog.text
    await child.end()
    os.kill(child.pid, signal.SIGKILL)  # once it can be, nothing of it remains
    await until(lambda: not os.path.exists(f"/proc/{child.pid}"))


async def test_an_engine_closes_though_an_instance_cannot_be_killed(
    monkeypatch, caplog
):
    config = config_of(shutdown_timeout_s=0.5)
    async with aseer.Engine(config) as engine:
        victim = engine.instances[0].pid
        os.kill(victim, signal.SIGSTOP)
        as_if_it_could_not_be_killed(monkeypatch)
        async with asyncio.timeout(20):
            await engine.aclose()
    assert f"process {victim} was killed and lives on (state T" in caplog.text
    os.killpg(victim, signal.SIGKILL)  # once it can be, nothing of it remains
    await until(lambda: not os.path.exists(f"/proc/{victim}"))


async def test_a_function_runs_though_there_are_no_threads(monkeypatch):
    monkeypatch.setattr("aseer.node.children.threading.Thread.start", no_thread)
    assert await in_thread(threading.get_ident) == threading.get_ident()
    monkeypatch.undo()
    assert await in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)


async def test_a_moment_without_room_for_processes_costs_one_restart(monkeypatch):
    starts = []
    start = subprocess.Popen

    def refused_at_first(*args, **kwargs):
        starts.append(time.monotonic())
        is_soon = starts[-1] - starts[0] < 0.5
        return no_room() if is_soon else start(*args, **kwargs)

    async with aseer.Engine(config_of(max_restarts=2)) as engine:
        monkeypatch.setattr("aseer.node.children.subprocess.Popen", refused_at_first)
        victim = engine.instances[0].pid
        responses = []
        async for response in engine.rollout(groups_of(8, **LONG)):
            if not responses:
                os.kill(victim, signal.SIGKILL)
            responses.append(response)
        assert len(responses) == 32
        await replaced(engine, victim)
        assert len(starts) == 2


async def test_a_start_that_the_system_has_no_room_for_is_a_start_error(monkeypatch):
    monkeypatch.setattr("aseer.node.children.subprocess.Popen", no_room)
    with pytest.raises(aseer.InstanceStartError, match="temporarily unavailable"):
        async with aseer.Engine(config_of()):
            pass


async def test_an_instance_is_started_again_though_its_log_dir_is_gone(tmp_path):
    async with aseer.Engine(config_of(log_dir=tmp_path / "logs")) as engine:
        shutil.rmtree(tmp_path / "logs")
        victim = engine.instances[0].pid
        os.kill(victim, signal.SIGKILL)
        responses = [r async for r in engine.rollout(groups_of(8, **LONG))]
        assert len(responses) == 32
        await replaced(engine, victim)
        assert list((tmp_path / "logs").iterdir())
