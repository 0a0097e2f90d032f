"""A job that was stopped and goes on loses nothing, however long it was stopped.

Ctrl-Z stops the user's process alone; a frozen container stops the instances, too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import aseer
from aseer.watch import waking_timeout

ROOT = Path(aseer.__file__).parents[1]
TIMEOUT_S = 1.5
PAUSE_S = 2.0

# It says when chunks run, and when the rollout is over: how, and what it cost.
SCRIPT = f"""
import asyncio
import aseer
from tests.integration.sims import config_of, groups_of

async def main():
    config = config_of(
        heartbeat_timeout_s={TIMEOUT_S},
        stall_timeout_s={TIMEOUT_S},
        max_restarts=0,
        engine_args={{"step_s": 0.01}},
    )
    async with aseer.Engine(config) as engine:
        pids = [i.pid for i in engine.instances]
        first = groups_of(1, n=1, max_tokens=5)
        rest = groups_of(4, ignore_eos=True, max_tokens=150)[1:]
        rollout = engine.rollout(first + rest)
        async for response in rollout:
            if pids:
                print(*pids, flush=True)
                pids = []
        again = [r async for r in engine.rollout(groups_of(4))]
        reasons = {{r.finish_reason for r in again}}
        print(rollout.report.num_retries, len(again), *reasons, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("stops", ["the controller", "the instances, too"])
def test_a_pause_longer_than_the_time_outs_kills_no_instance(stops, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        stopped = [process.pid, *(pids if stops == "the instances, too" else [])]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        num_retries, num_again, *reasons = process.stdout.readline().split()
        assert process.wait(timeout=20) == 0
    assert (num_retries, num_again) == ("0", "16")
    assert "error" not in reasons


async def test_a_waking_timeout_ends_a_block_that_takes_too_long():
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with waking_timeout(0.3):
            await asyncio.sleep(30)
    assert 0.2 < time.monotonic() - started < 5


async def test_time_in_which_the_loop_did_not_run_is_no_time_out():
    loop = asyncio.get_running_loop()
    answer = loop.create_future()
    async with waking_timeout(1.0):
        time.sleep(1.2)  # noqa: ASYNC251 - as if it were stopped
        loop.call_later(0.1, answer.set_result, "there")
        assert await answer == "there"
