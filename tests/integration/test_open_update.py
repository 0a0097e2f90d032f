"""Weights from another process: they arrive, or nothing changes and nothing waits."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import aseer
from tests.integration.sims import groups_of
from tests.integration.test_weights import roll, sims, until, weights

torch = pytest.importorskip("torch")


def send(target: bytes, value: float, told=None) -> None:
    """What the trainer's process does; its exit status is 0 if nothing fails."""

    def pairs():
        for name, tensor in weights(value).items():
            yield name, tensor
            if told is not None:
                told.send("sending")
                time.sleep(600)

    pickle.loads(target).send(pairs())


@pytest.fixture
def trainer():
    """Starts a trainer's process; it is gone at the end."""
    started = []
    spawn = multiprocessing.get_context("spawn")

    def start(target, value, told=None):
        given = (pickle.dumps(target), value, told)
        started.append(spawn.Process(target=send, args=given))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join(10)
        process.close()


def folders(target) -> list[str]:
    """Of its engine's updates; one file beside them is kept to be written again."""
    parent = Path(target.directory).parent
    paths = parent.iterdir() if parent.exists() else ()
    return sorted(path.name for path in paths if path.name != "spare")


async def ended(process) -> int:
    await until(lambda: process.exitcode is not None)
    return process.exitcode


async def test_another_process_sends_the_weights_and_all_instances_have_them(trainer):
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0))
        one = await roll(engine)
        target = await engine.begin_update(version=5)
        assert target.version == 5
        assert await ended(trainer(target, 2.0)) == 0
        assert engine.weight_version == 1, "until it is finished"
        report = await engine.finish_update(target)
        assert (report.version, report.num_tensors) == (5, 2)
        assert report.num_bytes == 4 * (12 + 5)
        assert report.send_s > 0
        assert engine.weight_version == 5
        assert await roll(engine) != one
        await engine.update_weights(weights(1.0))
        assert await roll(engine) == one
        assert len(folders(target)) == 1, "of the current weights"


def test_the_forms_for_plain_code_do_the_same():
    with aseer.Engine(sims()) as engine:
        target = engine.begin_update_sync()
        target.send(weights(1.0))
        assert engine.finish_update_sync(target).version == 1
        target = engine.begin_update_sync()
        engine.abandon_update_sync(target)
        assert engine.weight_version == 1
        with pytest.raises(aseer.ConfigError, match="not with a str"):
            engine.finish_update_sync("target")
        with pytest.raises(aseer.ConfigError, match="timeout_s"):
            engine.begin_update_sync(timeout_s=0)


async def test_a_sender_that_is_killed_changes_nothing_and_the_engine_goes_on(trainer):
    async with aseer.Engine(sims()) as engine:
        before = await roll(engine)
        told, tells = multiprocessing.get_context("spawn").Pipe(duplex=False)
        with told, tells:
            target = await engine.begin_update()
            process = trainer(target, 1.0, tells)
            await until(told.poll)
            os.kill(process.pid, signal.SIGKILL)
            await ended(process)
        with pytest.raises(aseer.WeightUpdateError, match="ended while it was sending"):
            await engine.finish_update(target)
        assert folders(target) == []
        assert await roll(engine) == before
        await engine.update_weights(weights(1.0))
        assert engine.weight_version == 1


async def test_an_update_that_nobody_finishes_is_abandoned_in_time():
    async with aseer.Engine(sims()) as engine:
        before = await roll(engine)
        target = await engine.begin_update(timeout_s=0.5)
        started = time.monotonic()
        assert await roll(engine) == before, "it waited for the update's end"
        assert time.monotonic() - started < 30
        with pytest.raises(aseer.WeightUpdateError, match=r"abandoned 0\.5 s after"):
            await engine.finish_update(target)
        with pytest.raises(aseer.WeightUpdateError, match="no update to version 1"):
            target.send(weights(1.0))
        await engine.abandon_update(target)  # over already


async def test_an_update_is_ended_once_by_the_engine_that_began_it():
    async with aseer.Engine(sims()) as engine:
        target = await engine.begin_update()
        with pytest.raises(aseer.WeightUpdateError, match="no weights were sent"):
            await engine.finish_update(target)
        target = await engine.begin_update()
        await target.send_async(weights(1.0))
        await engine.finish_update(target)
        with pytest.raises(aseer.WeightUpdateError, match="finished already"):
            await engine.finish_update(target)
        async with aseer.Engine(sims()) as other:
            with pytest.raises(aseer.WeightUpdateError, match="not one of this engine"):
                await other.finish_update(target)


async def test_it_makes_way_for_itself_as_an_update_in_one_call_does():
    groups = groups_of(4, ignore_eos=True, max_tokens=2000)
    groups += groups_of(5, n=1, max_tokens=1)[4:]
    config = sims()
    slow = config.engine_args | {"step_s": 0.01, "num_kv_blocks": 4096}
    async with aseer.Engine(replace(config, engine_args=slow)) as engine:
        responses = aiter(engine.rollout(groups))
        await anext(responses)
        with pytest.raises(aseer.RolloutInProgressError, match="pause="):
            await engine.begin_update()
        target = await engine.begin_update(pause="abort")
        await target.send_async(weights(1.0))
        await engine.finish_update(target)
        rest = [r async for r in responses]
        assert {(r.weight_version, r.finish_reason) for r in rest} == {(0, "aborted")}


async def test_a_caller_that_is_cancelled_leaves_no_update_open():
    groups = [aseer.Group([5, 6], 2, {"ignore_eos": True, "max_tokens": 300})]
    groups += [aseer.Group([5, 7], 1, {"max_tokens": 1})]
    async with aseer.Engine(sims()) as engine:
        responses = aiter(engine.rollout(groups))
        await anext(responses)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await engine.begin_update(pause="wait")
        assert len([r async for r in responses]) == 2
        assert len([r async for r in engine.rollout(groups)]) == 3


async def test_an_engine_that_closes_ends_its_open_update():
    async with aseer.Engine(sims()) as engine:
        target = await engine.begin_update()
    assert folders(target) == []
    with pytest.raises(aseer.WeightUpdateError, match="the engine was closed"):
        target.send(weights(1.0))
