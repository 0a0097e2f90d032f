"""Weight updates on simulated instances: all switch or none, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aseer
from tests.integration.sim_weights import SHAPES, roll, weights
from tests.integration.sims import config_of, groups_of
from tests.waiting import until

torch = pytest.importorskip("torch")


def sims(**settings: Any) -> aseer.EngineConfig:
    fault = settings.pop("fault", None)
    args = {"weights": SHAPES, "weights_fault": fault}
    return config_of(engine_args=args, **settings)


def tree(folder: Path) -> list[str]:
    """All that is below the folder, also while some of it is being removed."""
    found = os.walk(folder)
    return sorted(
        os.path.join(at, n) for at, dirs, files in found for n in dirs + files
    )


async def test_every_instance_gets_the_new_weights_and_back():
    async with aseer.Engine(sims()) as engine:
        assert engine.weight_version == 0
        report = await engine.update_weights(weights(1.0))
        assert (report.version, report.num_tensors) == (1, 2)
        assert report.num_bytes == 4 * (12 + 5)
        one = await roll(engine)
        await engine.update_weights(iter(weights(2.0).items()), version=7)
        assert engine.weight_version == 7
        two = await roll(engine)
        await engine.update_weights(weights(1.0))
        assert engine.weight_version == 8
        assert await roll(engine) == one != two


def test_the_form_for_plain_code_does_the_same():
    with aseer.Engine(sims()) as engine:
        assert engine.update_weights_sync(weights(1.0)).version == 1
        responses = list(engine.rollout_sync(groups_of(2)))
        assert {r.weight_version for r in responses} == {1}
        with pytest.raises(aseer.WeightUpdateError, match="'a' has values"):
            engine.update_weights_sync(weights(float("nan")))
        assert engine.weight_version == 1


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"a": torch.zeros(4, 3)}, "1 of the model's 2 tensors were not given: 'b'"),
        ({"c": torch.zeros(1)}, "no tensor 'c'"),
        ({"b": torch.zeros(6)}, r"shape \[6\]"),
        ({"b": torch.zeros(5).double()}, "dtype F64"),
        (weights(float("nan")), "NaN or infinite"),
    ],
)
async def test_weights_that_do_not_fit_change_nothing(bad, match):
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0))
        before = await roll(engine)
        with pytest.raises(aseer.WeightUpdateError, match=match):
            await engine.update_weights(bad)
        assert await roll(engine) == before
        await engine.update_weights(weights(2.0))
        assert await roll(engine) != before


async def test_an_iterator_that_fails_changes_nothing():
    def broken():
        yield "a", torch.zeros(4, 3)
        raise OSError("the trainer's shard is gone")

    async with aseer.Engine(sims()) as engine:
        with pytest.raises(OSError, match="shard is gone"):
            await engine.update_weights(broken())
        assert engine.weight_version == 0
        await engine.update_weights(weights(1.0))


async def test_an_async_iterable_is_taken_and_refused_where_nobody_awaits():
    async def pairs(value):
        for pair in weights(value).items():
            await asyncio.sleep(0)
            yield pair

    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0))
        one = await roll(engine)
        await engine.update_weights(pairs(2.0))
        assert await roll(engine) != one
        await engine.update_weights(pairs(1.0))
        assert await roll(engine) == one
        with pytest.raises(aseer.WeightUpdateError, match="async iterable needs"):
            engine.update_weights_sync(pairs(3.0))
        assert engine.weight_version == 3


@pytest.mark.parametrize("source", [None, 3, "no/such/directory"])
async def test_what_are_no_weights_aborts_no_rollout(source):
    groups = groups_of(3, ignore_eos=True, max_tokens=100)
    async with aseer.Engine(sims()) as engine:
        responses = aiter(engine.rollout(groups))
        first = await anext(responses)
        with pytest.raises(aseer.WeightUpdateError, match="weights are"):
            await engine.update_weights(source, pause="abort")
        rest = [first, *[r async for r in responses]]
        assert {r.finish_reason for r in rest} == {"length"}


@pytest.mark.parametrize("how", ["refused", "raises", "cancelled"])
async def test_an_update_that_fails_leaves_no_files(how, tmp_path):
    taken = asyncio.Event()

    async def pairs():
        yield "a", torch.zeros(SHAPES["a"])
        taken.set()
        if how == "raises":
            raise OSError("the trainer's shard is gone")
        if how == "cancelled":
            await asyncio.Event().wait()
        yield "c", torch.zeros(1)

    async with aseer.Engine(sims(weights_dir=str(tmp_path))) as engine:
        await engine.update_weights(weights(1.0))
        before = tree(tmp_path)
        assert any(path.endswith("/data") for path in before)
        kinds = (aseer.WeightUpdateError, OSError, asyncio.CancelledError)

        async def update():
            with pytest.raises(kinds):
                await engine.update_weights(pairs())

        async with asyncio.TaskGroup() as tasks:
            updating = tasks.create_task(update())
            await taken.wait()
            if how == "cancelled":
                assert tree(tmp_path) != before
                updating.cancel()
        await until(lambda: tree(tmp_path) == before)
        assert engine.weight_version == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [0, 3, 2, True, 3.5])
async def test_a_version_that_does_not_follow_is_refused(version):
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0), version=3)
        with pytest.raises(aseer.WeightUpdateError, match="version="):
            await engine.update_weights(weights(2.0), version=version)
        assert (await engine.update_weights(weights(2.0))).version == 4


@pytest.mark.parametrize("how", ["refuse", "die"])
@pytest.mark.parametrize("step", ["prepare", "commit"])
async def test_one_instance_that_fails_leaves_no_mixture(step, how):
    """Refused before the switch: none switches. Else it comes back with the new."""
    async with aseer.Engine(sims()) as engine:
        old = await roll(engine)
        await engine.update_weights(weights(1.0))
        new = await roll(engine)
    async with aseer.Engine(sims(fault=["1.1", step, how])) as engine:
        if (step, how) == ("prepare", "refuse"):
            with pytest.raises(aseer.WeightUpdateError, match="instance 1 refused"):
                await engine.update_weights(weights(1.0))
            assert engine.weight_version == 0
            assert await roll(engine) == old
        else:
            await engine.update_weights(weights(1.0))
            assert engine.weight_version == 1
            await until(lambda: len(engine.instances) == 2)
            assert await roll(engine) == new


async def test_if_no_instance_can_switch_all_come_back_with_the_old_weights():
    config = sims(fault=["0.1", "commit", "refuse"], num_instances=1)
    async with aseer.Engine(config) as engine:
        before = await roll(engine)
        with pytest.raises(
            aseer.WeightUpdateError, match=r"could not load.*stays at 0"
        ):
            await engine.update_weights(weights(1.0))
        await until(lambda: engine.instances)
        assert await roll(engine) == before
        await engine.update_weights(weights(1.0))
        assert await roll(engine) != before


async def test_an_instance_that_is_started_again_has_the_current_weights():
    async with aseer.Engine(sims(num_instances=1)) as engine:
        await engine.update_weights(weights(1.0))
        before = await roll(engine)
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        await until(lambda: not engine.instances)
        await until(lambda: engine.instances)
        assert await roll(engine) == before


async def test_a_rollout_in_progress_is_in_the_way_unless_told_otherwise():
    groups = groups_of(6, ignore_eos=True, max_tokens=300)
    groups += groups_of(7, n=1, max_tokens=2)[6:]
    async with aseer.Engine(sims()) as engine:
        rollout = engine.rollout(groups)
        responses = aiter(rollout)
        first = await anext(responses)
        with pytest.raises(aseer.RolloutInProgressError, match="pause="):
            await engine.update_weights(weights(1.0))
        with pytest.raises(aseer.ConfigError, match="pause"):
            await engine.update_weights(weights(1.0), pause="later")
        await engine.update_weights(weights(1.0), pause="wait")
        rest = [first, *[r async for r in responses]]
        assert len(rest) == 25
        assert {r.finish_reason for r in rest[1:]} == {"length"}
        assert {r.weight_version for r in rest} == {0}

        rollout = engine.rollout(groups)
        responses = aiter(rollout)
        first = await anext(responses)
        await engine.update_weights(weights(2.0), pause="abort")
        rest = [first, *[r async for r in responses]]
        assert len(rest) == 25
        assert "aborted" in {r.finish_reason for r in rest}
        assert {r.weight_version for r in rest} == {1}
        assert engine.weight_version == 2


async def test_a_rollout_that_begins_during_an_update_waits_for_it():
    async with aseer.Engine(sims()) as engine:
        rollout = engine.rollout(groups_of(2))
        async with asyncio.TaskGroup() as tasks:
            update = tasks.create_task(engine.update_weights(weights(1.0)))
            await asyncio.sleep(0)
            versions = {r.weight_version async for r in rollout}
            await update
        assert versions == {1}


async def test_a_caller_that_is_cancelled_while_it_waits_leaves_the_way_free():
    groups = groups_of(4, ignore_eos=True, max_tokens=300)
    quick = groups_of(5, n=1, max_tokens=2)[4:]
    async with aseer.Engine(sims()) as engine:
        responses = aiter(engine.rollout([*groups, *quick]))
        await anext(responses)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await engine.update_weights(weights(1.0), pause="wait")
        assert len([r async for r in responses]) == 16
        await engine.update_weights(weights(1.0))
        assert engine.weight_version == 1


async def test_an_engine_that_sleeps_does_nothing_until_it_is_woken():
    async with aseer.Engine(sims()) as engine:
        before = await roll(engine)
        await engine.sleep()
        with pytest.raises(aseer.EngineError, match="asleep"):
            await roll(engine)
        with pytest.raises(aseer.EngineError, match="asleep"):
            await engine.update_weights(weights(1.0))
        await engine.wake()
        assert await roll(engine) == before


async def test_weights_are_updated_before_kv_caches_wake():
    async with aseer.Engine(sims()) as engine:
        before = await roll(engine)
        await engine.sleep(level=2)
        with pytest.raises(aseer.EngineError, match="wake them first"):
            await engine.wake(["kv_cache"])
        with pytest.raises(aseer.EngineError, match="the engine is asleep"):
            await engine.update_weights(weights(1.0))
        await engine.wake(["weights"])
        with pytest.raises(aseer.EngineError, match="but for its KV cache"):
            await roll(engine)
        await engine.update_weights(weights(1.0))
        await engine.update_weights(weights(2.0))
        await engine.wake(["kv_cache"])
        assert engine.weight_version == 2
        assert await roll(engine) != before
        with pytest.raises(aseer.ConfigError, match="tags"):
            await engine.wake(["graphs"])


async def test_no_rollout_samples_from_weights_that_were_dropped():
    async with aseer.Engine(sims()) as engine:
        await engine.sleep(level=2)
        await engine.wake()
        for _ in range(2):
            with pytest.raises(aseer.EngineError, match="call update_weights first"):
                await roll(engine)
        with pytest.raises(aseer.WeightUpdateError):
            await engine.update_weights({})
        with pytest.raises(aseer.EngineError, match="call update_weights first"):
            await roll(engine)
        await engine.update_weights(weights(1.0))
        before = await roll(engine)
        await engine.sleep(level=1)
        await engine.wake()
        assert await roll(engine) == before


async def test_a_bad_version_aborts_no_rollout_and_a_good_one_may_be_numpys():
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0), version=np.int64(5))
        async with engine.rollout(groups_of(2)) as rollout:
            with pytest.raises(aseer.WeightUpdateError, match="does not follow"):
                await engine.update_weights(weights(2.0), version=5, pause="abort")
            with pytest.raises(aseer.WeightUpdateError, match="does not follow"):
                await engine.begin_update(version=5, pause="abort")
            reasons = {r.finish_reason async for r in rollout}
        assert "aborted" not in reasons
        for seconds in ("60", 0, float("nan"), None):
            with pytest.raises(aseer.ConfigError, match="timeout_s="):
                await engine.begin_update(timeout_s=seconds)


async def test_who_reads_a_rollout_is_told_that_it_would_wait_for_itself():
    async with aseer.Engine(sims(max_pending_requests=2)) as engine:
        groups = groups_of(6, n=1, max_tokens=5)
        async with engine.rollout(iter(groups)) as rollout, asyncio.timeout(20):
            responses = aiter(rollout)
            seen = [await anext(responses)]
            with pytest.raises(aseer.RolloutInProgressError, match="as it is read"):
                await engine.update_weights(weights(1.0), pause="wait")
            seen += [response async for response in responses]
            await engine.update_weights(weights(1.0), pause="wait")

        def plainly() -> int:
            with engine.rollout_sync(iter(groups)) as rollout:
                for num, _ in enumerate(rollout):
                    if not num:
                        with pytest.raises(aseer.RolloutInProgressError):
                            engine.begin_update_sync(pause="wait")
            return num + 1

        assert [len(seen), await asyncio.to_thread(plainly)] == [6, 6]


async def test_who_reads_a_rollout_of_an_async_iterator_is_told_so_once_it_is_full():
    """Groups come by themselves only while there is room, which reading makes."""

    async def groups():
        for number, group in enumerate(groups_of(9, n=1, max_tokens=5)):
            if number == 3:
                await asyncio.sleep(0.5)  # there is room yet when the update begins
            yield group

    async with aseer.Engine(sims(max_pending_requests=3)) as engine:
        async with engine.rollout(groups()) as rollout, asyncio.timeout(20):
            responses = aiter(rollout)
            seen = [await anext(responses)]
            with pytest.raises(aseer.RolloutInProgressError, match="as it is read"):
                await engine.update_weights(weights(1.0), pause="wait")
            seen += [response async for response in responses]
            await engine.update_weights(weights(1.0), pause="wait")
        assert len(seen) == 9


async def test_what_dies_while_the_engine_sleeps_is_started_again_at_its_waking():
    async with aseer.Engine(sims()) as engine:
        before = await roll(engine)
        await engine.sleep()
        for info in engine.instances:
            os.kill(info.pid, signal.SIGKILL)
        await until(lambda: not engine.instances)
        await asyncio.sleep(2.0)  # a simulated instance starts in less
        assert not engine.instances
        await engine.wake()
        assert await roll(engine) == before


async def test_waking_does_not_need_an_instance_that_dies_meanwhile():
    async with aseer.Engine(sims()) as engine:
        before = await roll(engine)
        await engine.sleep()
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        await engine.wake()  # before anybody has seen it die
        assert await roll(engine) == before


async def test_an_instance_that_starts_while_the_engine_falls_asleep_sleeps_too():
    args = {"weights": SHAPES, "start_s": 1.0}
    async with aseer.Engine(config_of(engine_args=args)) as engine:
        before = await roll(engine)
        num_instances = len(engine.instances)
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        await until(lambda: len(engine.instances) == num_instances - 1)
        await asyncio.sleep(0.3)  # it is starting
        await engine.sleep()
        await until(lambda: len(engine.instances) == num_instances)
        await engine.wake()  # which one that does not sleep refuses
        assert await roll(engine) == before


async def test_with_no_instance_up_nobody_can_be_asked_to_sleep():
    args = {"weights": SHAPES, "start_s": 1.0}
    config = config_of(num_instances=1, engine_args=args)
    async with aseer.Engine(config) as engine:
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        for _ in range(3000):
            if not engine.instances:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(aseer.EngineError, match="no instance is up"):
            await engine.sleep()


SCRIPT = """
import sys, time, torch
import aseer
from tests.integration.test_weights import sims, weights

with aseer.Engine(sims()) as engine:
    engine.update_weights_sync(weights(1.0))
    print(engine.run_dir.name, flush=True)
    time.sleep(600)
"""


def test_a_killed_trainer_leaves_no_shared_memory_behind(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(aseer.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        folder = Path("/dev/shm") / process.stdout.readline().strip()
        assert list(folder.iterdir())
        process.kill()
    for _ in range(200):
        if not folder.exists():
            break
        time.sleep(0.05)
    assert not folder.exists()
