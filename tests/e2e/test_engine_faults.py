"""Real engines that do not start, die, or lose their user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import aseer
from tests.e2e.tiny import tiny_config, tiny_model


def start(config: aseer.EngineConfig) -> str:
    """The error that starting gives."""
    with pytest.raises(aseer.InstanceStartError) as error, aseer.Engine(config):
        pass
    return str(error.value)


def test_a_model_that_does_not_exist_is_named(tmp_path):
    message = start(tiny_config(num_instances=1, model=tmp_path / "nowhere"))
    assert "cause: " in message
    assert "nowhere" in message


@pytest.mark.slow
def test_too_little_memory_for_the_kv_cache_is_the_cause_that_is_given():
    message = start(tiny_config(num_instances=1, kv_cache_bytes=1 << 16))
    cause = message.splitlines()[0]
    assert "cause: ValueError" in cause
    assert "No available memory for the cache blocks" in cause


SCRIPT = """
import os, sys, time
import aseer
from tests.e2e.tiny import tiny_config

if __name__ == "__main__":
    pool = aseer.KvPoolConfig(mode="lmcache", dram_bytes=64 << 20)
    config = tiny_config(
        num_instances=1, model=sys.argv[1], chunk_size=128, kv_pool=pool
    )
    sampling = {"max_tokens": 1000, "ignore_eos": True}
    groups = [aseer.Group([1, 2], n=4096, sampling=sampling)]
    with aseer.Engine(config) as engine:
        engine.update_weights_sync(sys.argv[1])
        fork = os.fork()
        if fork == 0:
            time.sleep(600)  # as a data loader's worker that waits for work
        print(engine.run_dir, fork, flush=True)
        for _ in engine.rollout_sync(groups):
            pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["killed with its children", "killed", "asked"])
def test_a_trainer_that_is_gone_leaves_no_engine_behind(ends, tmp_path):
    """Though a process lives on that it had forked."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(aseer.__file__).parents[1]
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, str(script), str(tiny_model())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as trainer:
        assert trainer.stdout is not None
        run_dir, number = trainer.stdout.readline().split()
        fork = psutil.Process(int(number))
        children = [c for c in psutil.Process(trainer.pid).children() if c != fork]
        below = [p for c in children for p in c.children(recursive=True)]
        names = " ".join(p.name() for p in below)
        assert len(children) == 2, "the instance and the pool's server"
        assert "EngineCore" in names
        assert "Worker" in names
        time.sleep(1.0)  # it is amid a rollout
        trainer.send_signal(signal.SIGTERM if ends == "asked" else signal.SIGKILL)
        if ends == "killed with its children":
            for child in children:
                child.kill()
        try:
            trainer.wait(timeout=60)
            _, alive = psutil.wait_procs([*children, *below], timeout=30)
            assert not alive
            assert fork.is_running()
        finally:
            fork.kill()
    assert not Path(run_dir).exists()
    assert set(os.listdir("/dev/shm")) <= before
