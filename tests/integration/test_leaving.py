"""Leaving a rollout or an engine, however it happens, leaves nothing behind.

Processes, threads, tasks, files and sockets are checked by the leak check around every
test of this folder; here it is the ways of leaving that matter.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import aseer
from aseer.runtime.loop_thread import LoopThread
from tests.integration.sims import config_of, groups_of

LONG = {"ignore_eos": True, "max_tokens": 2000}


async def idle(engine: aseer.Engine) -> bool:
    """Whether the engines stopped all work, within a moment."""
    rollout = engine.rollout(groups_of(1, n=1, max_tokens=1))
    return len([r async for r in rollout]) == 1


async def test_break_frees_the_engines(engine):
    async for _ in engine.rollout(groups_of(8)):
        break
    assert await idle(engine)


async def test_break_frees_the_engines_though_the_rollout_is_still_referenced(engine):
    rollout = engine.rollout(groups_of(8, **LONG) + groups_of(9)[8:])
    async for _ in rollout:
        break
    assert await idle(engine)
    with pytest.raises(aseer.RolloutClosedError, match="left before its end"):
        await anext(aiter(rollout))


async def test_break_out_of_groups_frees_the_engines(engine):
    async for _ in engine.rollout(groups_of(8)).by_group():
        break
    assert await idle(engine)


async def test_an_exception_in_user_code_frees_the_engines(engine):
    with pytest.raises(ZeroDivisionError):
        async for _ in engine.rollout(groups_of(8)):
            _ = 1 / 0
    assert await idle(engine)


async def test_cancellation_frees_the_engines(engine):
    async def consume():
        async for _ in engine.rollout(groups_of(8, **LONG)):
            pass

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await consume()
    assert await idle(engine)


async def test_an_engine_that_was_closed_asks_nothing_of_the_exit(monkeypatch):
    asked = []
    recorder = SimpleNamespace(register=asked.append, unregister=asked.remove)
    monkeypatch.setattr("aseer.runtime.opening.atexit", recorder)
    async with aseer.Engine(config_of()), aseer.Engine(config_of()) as inner:
        assert len(asked) == 2
        await inner.aclose()
        assert len(asked) == 1
    assert not asked


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


async def test_a_stop_asked_for_before_the_thread_runs_ends_it():
    thread = LoopThread("test")
    thread.request_stop()
    thread.start(_until)
    assert await asyncio.to_thread(thread.join, 10.0)


async def test_a_log_dir_that_cannot_be_made_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(aseer.ConfigError, match="log_dir cannot be used"):
        async with aseer.Engine(config_of(log_dir=tmp_path / "file" / "logs")):
            pass


async def test_cancellation_while_it_opens_frees_the_engines(engine):
    for groups in (groups_of(2), iter(groups_of(2))):
        rollout = engine.rollout(groups)
        first = asyncio.get_running_loop().create_task(anext(aiter(rollout)))
        await asyncio.sleep(0)  # it runs, up to where it lets the loop turn
        await asyncio.sleep(0)  # it asks for a session
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        del first
        assert await idle(engine)
        with pytest.raises(aseer.RolloutClosedError):
            await anext(aiter(rollout))


async def test_a_wait_for_the_first_response_may_be_given_up_and_repeated(engine):
    iterator = aiter(engine.rollout(groups_of(1)))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(iterator), 0.0001)
    assert len([r async for r in iterator]) == 4


async def test_aclose_waits_until_the_engines_have_stopped(engine):
    async def endless():
        for group in groups_of(1000, **LONG):
            yield group
            await asyncio.sleep(0.001)

    rollout = engine.rollout(endless())
    iterator = aiter(rollout)
    consumer = asyncio.get_running_loop().create_task(anext(iterator))
    await asyncio.sleep(0.1)
    await rollout.aclose()
    with pytest.raises(aseer.RolloutClosedError):
        await consumer
    await rollout.aclose()
    assert await idle(engine)


async def test_closing_the_engine_ends_a_rollout_in_progress():
    async with aseer.Engine(config_of()) as engine:
        iterator = aiter(engine.rollout(groups_of(8) + groups_of(9, **LONG)[8:]))
        responses = [await anext(iterator)]
    with pytest.raises(aseer.EngineClosedError, match="while this rollout was in"):
        while True:
            responses.append(await anext(iterator))
    assert len(responses) == 9 * 4
    assert {r.finish_reason for r in responses[-4:]} == {"aborted"}


async def test_an_engine_can_be_opened_again():
    engine = aseer.Engine(config_of())
    for _ in range(2):
        async with engine:
            assert len([r async for r in engine.rollout(groups_of(1))]) == 4


async def test_cancelling_the_start_ends_what_was_started():
    slow = config_of(engine_args={"start_s": 60.0})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            async with aseer.Engine(slow):
                pass


SCRIPT = """
import asyncio, signal, sys
import aseer
from tests.integration.sims import config_of, groups_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # if these tests ignore it

async def main():
    async with aseer.Engine(config_of()) as engine:
        print(engine.run_dir, *[i.pid for i in engine.instances], flush=True)
        async for _ in engine.rollout(groups_of(50, ignore_eos=True, max_tokens=3000)):
            pass

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_users_process_leaves_nothing(kind, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(aseer.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        run_dir, *pids = process.stdout.readline().split()
        assert Path(run_dir).exists()
        time.sleep(0.3)
        process.send_signal(kind)
        process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        alive = [p for p in pids if psutil.pid_exists(int(p))]
        if not alive and not Path(run_dir).exists():
            break
        time.sleep(0.05)
    assert not alive
    assert not Path(run_dir).exists()


NEVER_CLOSED = """
import aseer
from tests.integration.sims import config_of, groups_of

engine = aseer.Engine(config_of())
engine.__enter__()
print(engine.run_dir, *[i.pid for i in engine.instances], flush=True)
if {is_amid}:
    long = groups_of(9, ignore_eos=True, max_tokens=2000)[1:]
    rollout = engine.rollout_sync(groups_of(1, n=1, max_tokens=1) + long)
    next(iter(rollout))
"""


@pytest.mark.parametrize("is_amid", [False, True])
def test_an_engine_that_is_never_closed_ends_at_exit_without_a_word(is_amid):
    root = Path(aseer.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", NEVER_CLOSED.format(is_amid=is_amid)],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=40,
    )
    run_dir, *pids = done.stdout.split()
    assert (done.returncode, done.stderr) == (0, "")
    assert not [p for p in pids if psutil.pid_exists(int(p))]
    assert not Path(run_dir).exists()
