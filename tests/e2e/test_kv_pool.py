"""The KV pool under real engines: requests hop, servers die, and nothing changes.

References are undivided runs of the same engines under another weight version, with
which they find nothing of each other's KV.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import aseer
from aseer.data import load_prompts
from aseer.kv import pool as pools
from aseer.models import smollm2
from tests.e2e.tiny import (
    by_request,
    next_version,
    same,
    tiny_config,
    undivided,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aseer.kv.pool import KvPool

pytest.importorskip("lmcache")
pytestmark = pytest.mark.timeout(900)

CHUNK = 64
ROUNDING = 2e-5
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def pool_config(**settings: Any) -> aseer.KvPoolConfig:
    defaults: dict[str, Any] = {
        "mode": "lmcache",
        "chunk_tokens": CHUNK,
        "dram_bytes": 256 << 20,
        "timeout_s": 2.0,
    }
    return aseer.KvPoolConfig(**defaults | settings)


def groups_of(num: int, max_tokens: int, seed: int) -> list[aseer.Group]:
    """Groups of one request each, with prompts of 50 to 200 tokens."""
    rng = random.Random(seed)
    return [
        aseer.Group(
            [rng.randrange(5, 120) for _ in range(rng.randrange(50, 200))],
            n=1,
            group_id=f"g{i}",
            sampling=GREEDY | {"max_tokens": max_tokens},
        )
        for i in range(num)
    ]


def pool_of(engine: aseer.Engine) -> KvPool:
    assert engine._host is not None
    assert engine._host.kv_pool is not None
    return engine._host.kv_pool


@pytest.fixture(scope="module")
def engine() -> Iterator[aseer.Engine]:
    config = tiny_config(
        num_instances=2,
        chunk_size=CHUNK,
        kv_pool=pool_config(),
        max_model_len=2048,
    )
    with aseer.Engine(config) as engine:
        yield engine


@pytest.mark.usefixtures("always_migrate")
def test_requests_that_hop_at_once_compute_one_token_a_hop(engine):
    groups = groups_of(8, 800, seed=1)
    expected = undivided(engine, groups)
    rollout = engine.rollout_sync(groups)
    same(by_request(list(rollout)), expected)
    report = rollout.report
    assert report.num_migrations > 60
    assert report.num_recomputed_tokens == 0
    assert report.num_preemptions == 0
    kv = report.kv
    assert kv.num_moves_found > 60
    assert kv.num_moves_recomputed == 0
    assert kv.num_loads > 60
    assert kv.loaded_bytes > 0
    assert 0 < kv.load_p50_s <= kv.load_p99_s
    assert 0 < kv.time_share < 1
    assert any(s.num_loaded_tokens for s in report.timeline)


def test_what_is_finished_is_freed_and_other_versions_find_nothing(engine):
    pool = pool_of(engine)
    groups = groups_of(4, 400, seed=2)
    before = pool.counts
    list(engine.rollout_sync(groups))
    eventually(lambda: pool.counts.stored > before.stored)
    eventually(lambda: pool.counts.resident == 0)
    assert pool.counts.freed > before.freed
    assert pool.counts.evicted == before.evicted
    again = engine.rollout_sync(groups)
    assert all(r.metrics.num_cached_tokens > 0 for r in again), "of the engines' own"
    next_version(engine)
    other = engine.rollout_sync(groups, chunk_size=0)
    assert all(r.metrics.num_cached_tokens == 0 for r in other)
    assert other.report.kv.num_loads == 0


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


class Attacker:
    """Sends the pool's server a signal, at random moments, until it is stopped."""

    def __init__(self, pool: KvPool, kind: signal.Signals, times: int) -> None:
        self.num_sent = 0
        self._pool, self._kind, self._times = pool, kind, times
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Attacker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        rng = random.Random(self._kind)
        while self.num_sent < self._times and not self._stop.wait(rng.uniform(0.2, 2)):
            for pid in self._pool.pids:
                os.kill(pid, self._kind)
                self.num_sent += 1
                while pid in self._pool.pids and not self._stop.wait(0.1):
                    pass


def mapped_pools(pids: list[int]) -> set[str]:
    """Inodes of servers' memory that the engines' processes have mapped."""
    found = set()
    for pid in pids:
        engine = psutil.Process(pid)
        for process in (engine, *engine.children(recursive=True)):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if "/lmcache_l1_pool_" in line:
                    found.add(line.split()[4])
    return found


NUM_ATTACKS = int(os.environ.get("ASEER_NUM_ATTACKS", "3"))


@pytest.mark.slow
@pytest.mark.usefixtures("always_migrate")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_server_costs_recomputation_only(engine, kind):
    pool = pool_of(engine)
    groups = groups_of(16, 800, seed=3)
    expected = undivided(engine, groups)
    pids = [info.pid for info in engine.instances]
    restarts = pool.num_restarts
    with Attacker(pool, kind, NUM_ATTACKS) as attacker:
        slowest = 0.0
        while attacker.num_sent < NUM_ATTACKS:
            started = time.monotonic()
            rollout = engine.rollout_sync(groups)
            same(by_request(list(rollout)), expected, rounding=ROUNDING)
            assert rollout.report.num_retries == 0
            slowest = max(slowest, time.monotonic() - started)
            next_version(engine)  # or all of it were in the engines' own caches
    assert [info.pid for info in engine.instances] == pids, "no engine died"
    assert slowest < 90, "no stall"
    eventually(lambda: pool.num_restarts >= restarts + NUM_ATTACKS)
    eventually(lambda: bool(pool.pids))
    time.sleep(3.0)  # until the engines have noticed
    rollout = engine.rollout_sync(groups)
    same(by_request(list(rollout)), expected, rounding=ROUNDING)
    assert rollout.report.kv.num_loads > 50, "the new server is used"
    assert [info.pid for info in engine.instances] == pids
    assert len(mapped_pools(pids)) == 1, "memory of dead servers is let go"


@pytest.mark.slow
@pytest.mark.usefixtures("always_migrate")
def test_a_small_pool_with_a_disk_behind_and_a_disk_that_fails(tmp_path):
    groups = groups_of(16, 1000, seed=4)
    disk = tmp_path / "disk"
    pool = pool_config(
        dram_bytes=16 << 20, disk_dir=disk, disk_bytes=1 << 30, timeout_s=5.0
    )
    config = tiny_config(
        num_instances=2,
        max_num_seqs=6,
        chunk_size=128,
        kv_pool=pool,
        max_model_len=2048,
    )
    with aseer.Engine(config) as engine:
        pids = [info.pid for info in engine.instances]
        expected = undivided(engine, groups)
        rollout = engine.rollout_sync(groups)
        same(by_request(list(rollout)), expected, rounding=ROUNDING)
        kv = rollout.report.kv
        assert kv.evicted_bytes > 0
        assert kv.disk_written_bytes > 16 << 20
        assert kv.disk_read_bytes > 0
        assert 0 < kv.prefetched_bytes <= kv.disk_read_bytes
        report = rollout.report
        assert report.num_cached_tokens > 2 * report.num_recomputed_tokens

        for harm in (corrupt, take_away):
            next_version(engine)
            timer = threading.Timer(2.0, harm, [disk])
            timer.start()
            found = by_request(list(engine.rollout_sync(groups)))
            timer.join()
            same(found, expected, rounding=ROUNDING)
        assert [info.pid for info in engine.instances] == pids


@pytest.fixture
def disk_of_3_mb(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("always_migrate")
def test_a_disk_that_is_full_and_then_read_only(disk_of_3_mb):
    groups = groups_of(16, 800, seed=6)
    pool = pool_config(
        dram_bytes=16 << 20, disk_dir=disk_of_3_mb, disk_bytes=1 << 30, timeout_s=5.0
    )
    config = tiny_config(num_instances=2, chunk_size=128, kv_pool=pool)
    with aseer.Engine(config) as engine:
        pids = [info.pid for info in engine.instances]
        expected = undivided(engine, groups)
        rollout = engine.rollout_sync(groups)
        same(by_request(list(rollout)), expected, rounding=ROUNDING)
        assert rollout.report.kv.evicted_bytes > 0
        assert shutil.disk_usage(disk_of_3_mb).free < 1 << 20

        next_version(engine)
        remount = ["mount", "-o", "remount,ro", str(disk_of_3_mb)]
        timer = threading.Timer(2.0, subprocess.run, [remount], {"check": True})
        timer.start()
        found = by_request(list(engine.rollout_sync(groups)))
        timer.join()
        same(found, expected, rounding=ROUNDING)
        assert [info.pid for info in engine.instances] == pids


def corrupt(disk: Path) -> None:
    """Change every other file of the disk tier, and cut the others short."""
    for i, path in enumerate(p for p in disk.rglob("*") if p.is_file()):
        try:
            size = path.stat().st_size
            with path.open("r+b") as file:
                if i % 2:
                    file.truncate(size // 2)
                else:
                    file.seek(size // 3)
                    file.write(b"\x55" * 4096)
        except OSError:
            continue  # evicted meanwhile


def take_away(disk: Path) -> None:
    """Nothing can be read or written there any more."""
    for folder in disk.iterdir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_text("not a directory")


@pytest.mark.slow
@pytest.mark.usefixtures("always_migrate")
def test_one_request_at_a_time_hops_bit_for_bit_in_bfloat16():
    config = tiny_config(
        num_instances=2,
        chunk_size=CHUNK,
        dtype="bfloat16",
        kv_pool=pool_config(),
        max_model_len=2048,
    )
    with aseer.Engine(config) as engine:
        for i in range(2):
            group = groups_of(1, 1400, seed=10 + i)
            expected = undivided(engine, group)
            rollout = engine.rollout_sync(group)
            same(by_request(list(rollout)), expected)
            assert rollout.report.num_migrations >= 20
            assert rollout.report.num_recomputed_tokens == 0
            assert rollout.report.kv.num_loads >= 20


@pytest.mark.slow
@pytest.mark.usefixtures("always_migrate")
def test_a_language_models_requests_hop():
    config = aseer.EngineConfig(
        model=smollm2.prepare(dtype="float32"),
        device="cpu",
        dtype="float32",
        num_instances=2,
        max_model_len=1024,
        max_num_seqs=16,
        kv_cache_bytes=1 << 30,
        chunk_size=128,
        kv_pool=pool_config(dram_bytes=1 << 30, chunk_tokens=128),
        start_timeout_s=400.0,
    )
    groups = [
        aseer.Group(
            record.messages,
            n=1,
            group_id=record.id,
            sampling=GREEDY | {"max_tokens": 500},
        )
        for record in load_prompts()[:16]
    ]
    with aseer.Engine(config) as engine:
        expected = undivided(engine, groups)
        in_other_batches = undivided(engine, groups[:4]) | undivided(engine, groups[4:])
        rollout = engine.rollout_sync(groups)
        found = by_request(list(rollout))
    assert {k: r.token_ids for k, r in found.items()} == {
        k: r.token_ids for k, r in expected.items()
    }
    # A CPU's matrix products round by the number of rows, hops or not.
    by_batch = largest_difference(in_other_batches, expected)
    by_hops = largest_difference(found, expected)
    assert by_hops <= 2 * by_batch, (by_hops, by_batch)
    assert by_batch < 1e-4
    assert rollout.report.num_migrations > 40
    assert rollout.report.num_recomputed_tokens == 0


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Of two logprobs of the same token."""
    return max(
        abs(a - b)
        for request_id, response in found.items()
        for a, b in zip(response.logprobs, expected[request_id].logprobs, strict=True)
    )


@pytest.fixture
def chosen_late(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Engine arguments with a block size that is known once the model is loaded, as on
    GPUs.
    """
    plan: Any = pools.plan_pool

    def plan_unknowing(config: Any, num: int, block_size: int, *args: Any, **kw: Any):
        assert block_size == 96
        return plan(config, num, None, *args, **kw)

    monkeypatch.setattr(pools, "plan_pool", plan_unknowing)
    return {"block_size": 96}


def test_engines_whose_blocks_do_not_fit_end_the_pool(chosen_late, caplog):
    config = tiny_config(
        num_instances=2,
        chunk_size=CHUNK,
        kv_pool=pool_config(mode="auto"),
        engine_args=chosen_late,
    )
    with aseer.Engine(config) as engine:
        rollout = engine.rollout_sync(groups_of(4, 300, seed=9))
        responses = list(rollout)
        assert {r.finish_reason for r in responses} == {"length"}
        assert rollout.report.kv is None
        assert pool_of(engine).pids == []
    assert "no KV pool: the engine keeps KV in blocks of 96 tokens" in caplog.text
    assert "set kv_pool={'chunk_tokens': 192}" in caplog.text


def test_a_pool_that_was_asked_for_and_does_not_fit_is_refused(chosen_late):
    config = tiny_config(
        num_instances=1,
        chunk_size=CHUNK,
        kv_pool=pool_config(),
        engine_args=chosen_late,
    )
    with (
        pytest.raises(aseer.ConfigError, match=r"blocks of 96 tokens"),
        aseer.Engine(config),
    ):
        pass
