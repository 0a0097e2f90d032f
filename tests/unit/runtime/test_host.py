"""An engine between calls: each one gives the engine back, however it ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import aseer
from aseer.controller import Controller
from aseer.errors import (
    EngineClosedError,
    EngineError,
    InstanceStartError,
    RolloutError,
    WeightUpdateError,
)
from aseer.runtime.activity import Activity
from tests.unit.runtime.engines import ENDLESS, SOON_S, Sim, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.instance.messages import Run
    from aseer.types import InstanceId
    from tests.unit.runtime.machine import Machine

SLOW = {"step_s": 0.002}


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Sim:
    sim = Sim(monkeypatch)

    async def send(source: object, *_: object) -> object:
        if isinstance(source, Exception):
            raise source
        return _Index()

    monkeypatch.setattr("aseer.runtime.weight_update.send_async", send)
    monkeypatch.setattr(
        "aseer.runtime.takes_weights.check_source", lambda *args, **kwargs: None
    )
    return sim


class _Index:
    tensors = ()
    num_bytes = 0
    lora_rank = 0


def activity(engine: aseer.Engine) -> Activity:
    return engine._host._claims.activity


def holding(identity: str, what: str) -> Callable[[Machine], None]:
    return lambda machine: machine.scripts.update({(identity, what): forever})


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def can_roll_out(engine: aseer.Engine) -> bool:
    return len([r async for r in engine.rollout(groups_of(2))]) == 4


def has_begun(rollout: aseer.Rollout) -> bool:
    progress = rollout.progress()
    return progress is not None and progress.num_output_tokens > 0


@pytest.mark.parametrize(
    ("value", "is_checked"), [("1", True), ("yes", True), ("0", False), ("", False)]
)
async def test_a_rollout_compares_its_books_where_the_environment_asks_for_it(
    sim, monkeypatch, value, is_checked
) -> None:
    def find_fault(controller: Controller) -> None:
        assert not controller.buffer.num_unfinished, "two books differ"

    monkeypatch.setenv("ASEER_CHECK", value)
    async with sim.engine() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Controller, "check_integrity", find_fault)
            if is_checked:
                with pytest.raises(RolloutError, match="two books differ"):
                    await can_roll_out(engine)
            else:
                assert await can_roll_out(engine)
        assert await can_roll_out(engine)


# Opening and closing


def test_why_no_instance_starts_is_the_engines_error_and_nothing_is_left(sim) -> None:
    def break_all(machine: Machine) -> None:
        machine.fail("1.1", "start", RuntimeError("no such model"))

    sim.prepare = break_all
    engine = sim.engine()
    with pytest.raises(InstanceStartError, match="no such model"), engine:
        pass
    assert all(p.has_ended for p in sim.machine.processes.values())
    sim.prepare = lambda machine: None
    with engine:  # it can be opened again
        assert len(engine.instances) == 2
        assert not any(p.has_ended for p in sim.machine.processes.values())
        run_dir = engine.run_dir
        assert run_dir.exists()
        with pytest.raises(EngineError, match="open already"):
            engine.__enter__()
    assert not run_dir.exists()
    with pytest.raises(EngineClosedError):
        _ = engine.instances
    engine.close()


async def test_a_start_that_is_given_up_leaves_nothing(sim) -> None:
    sim.prepare = holding("0.1", "start")
    engine = sim.engine()
    opening = asyncio.get_running_loop().create_task(engine.__aenter__())
    await asyncio.to_thread(sim.is_up.wait, SOON_S)
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert all(p.has_ended for p in sim.machine.processes.values())


async def test_closing_ends_every_call_that_waits(sim) -> None:
    async with sim.engine(shutdown_timeout_s=0.1) as engine:
        loop = asyncio.get_running_loop()
        sim.do(engine, lambda: sim.machine.hold("0.1", "sleep"))
        falling = loop.create_task(engine.sleep())
        await asyncio.to_thread(sim.until_asked, engine, "0.1", "sleep")
        waiting = [
            loop.create_task(engine.sleep()),
            loop.create_task(engine.wake()),
            loop.create_task(engine.update_weights("x")),
            loop.create_task(can_roll_out(engine)),
        ]
        await asyncio.sleep(0.01)
        await engine.aclose()
        await asyncio.wait([falling, *waiting])
        for call in (falling, *waiting):
            assert isinstance(call.exception(), EngineError)


async def test_the_end_of_its_own_loop_is_told_to_all(sim) -> None:
    async with sim.engine(engine_args=SLOW) as engine:
        rollout = engine.rollout(groups_of(2, **ENDLESS))
        reading = asyncio.get_running_loop().create_task(anext(aiter(rollout)))

        def fail(*args: object) -> None:
            raise MemoryError("no more")

        while rollout.progress() is None:  # noqa: ASYNC110 - another thread's doing
            await asyncio.sleep(0.002)
        sim.do(
            engine, lambda: setattr(engine._host._pool._supervisor, "_restart", fail)
        )
        sim.kill(engine, "0.1")
        await asyncio.wait([reading])
        assert "no more" in str(reading.exception())
        with pytest.raises(EngineError, match="MemoryError: no more"):
            await engine.sleep()


# Sleeping


async def test_it_sleeps_until_it_is_woken(sim) -> None:
    async with sim.engine() as engine:
        await engine.wake()
        await engine.sleep()
        await engine.sleep()
        assert activity(engine) is Activity.ASLEEP
        for call in (engine.update_weights("x"), can_roll_out(engine)):
            with pytest.raises(EngineError, match="asleep"):
                await call
        await engine.wake()
        assert activity(engine) is Activity.IDLE
        assert await can_roll_out(engine)


async def test_a_sleep_that_fails_gives_the_engine_back(sim) -> None:
    async with sim.engine() as engine:
        sim.machine.fail("*", "sleep", RuntimeError("it cannot"))
        with pytest.raises(EngineError, match="it cannot"):
            await engine.sleep()
        assert activity(engine) is Activity.IDLE
        assert await can_roll_out(engine)


async def test_a_sleep_or_wake_that_is_given_up_gives_the_engine_back(sim) -> None:
    async with sim.engine() as engine:
        for what, call in (("sleep", engine.sleep), ("wake", engine.wake)):
            if what == "wake":
                await engine.sleep()
            go_on = sim.do(engine, lambda what=what: sim.machine.hold("1.1", what))
            calling = asyncio.get_running_loop().create_task(call())
            await asyncio.to_thread(sim.until_asked, engine, "1.1", what)
            calling.cancel()
            await asyncio.wait([calling])
            assert calling.cancelled()
            sim.do(engine, go_on.set)
            assert await can_roll_out(engine)
            sim.machine.asked.clear()


async def test_with_no_instance_up_it_cannot_sleep(sim) -> None:
    async with sim.engine(max_restarts=0) as engine:
        for identity in ("0.1", "1.1"):
            sim.kill(engine, identity)
        gone = sim.machine.processes.values()
        sim.do(engine, lambda: sim.machine.until(lambda: not engine._host.infos))
        assert all(p.has_ended for p in gone)
        for call in (engine.sleep(), engine.update_weights("x"), can_roll_out(engine)):
            with pytest.raises(EngineError, match="no instance"):
                await call
        assert activity(engine) is Activity.IDLE


# Weights


async def test_an_update_changes_the_version_and_gives_the_engine_back(sim) -> None:
    async with sim.engine() as engine:
        assert engine.weight_version == 0
        report = await engine.update_weights("x", version=4)
        assert (report.version, engine.weight_version) == (4, 4)
        responses = [r async for r in engine.rollout(groups_of(1))]
        assert {r.weight_version for r in responses} == {4}


@pytest.mark.parametrize("step", ["begin", "send", "prepare"])
async def test_an_update_that_fails_gives_the_engine_back(sim, step) -> None:
    async with sim.engine() as engine:
        if step == "prepare":
            sim.machine.fail("*", "prepare_weights", WeightUpdateError("refused"))
        source = WeightUpdateError("the sender failed") if step == "send" else "x"
        version = 0 if step == "begin" else None
        with pytest.raises(WeightUpdateError):
            await engine.update_weights(source, version=version)
        await asyncio.to_thread(sim.do, engine, lambda: None)
        assert activity(engine) is Activity.IDLE
        assert engine.weight_version == 0
        assert await can_roll_out(engine)


async def test_a_rollout_waits_for_an_update_and_an_update_for_a_rollout(sim) -> None:
    async with sim.engine(engine_args=SLOW) as engine:
        go_on = sim.do(engine, lambda: sim.machine.hold("0.1", "prepare_weights"))
        loop = asyncio.get_running_loop()
        updating = loop.create_task(engine.update_weights("x"))
        await asyncio.to_thread(sim.until_asked, engine, "0.1", "prepare_weights")
        rolling = loop.create_task(can_roll_out(engine))
        await asyncio.sleep(0.01)
        assert not rolling.done()
        sim.do(engine, go_on.set)
        await updating
        while activity(engine) is not Activity.ROLLING_OUT:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        with pytest.raises(aseer.RolloutInProgressError):
            await engine.update_weights("x")
        await engine.update_weights("x", pause="wait")
        assert await rolling
        assert engine.weight_version == 2


async def test_an_update_may_abort_a_rollout_and_its_reader_gets_the_rest(sim) -> None:
    async with sim.engine(engine_args=SLOW) as engine:
        async with engine.rollout(groups_of(2, **ENDLESS)) as rollout:
            await engine.update_weights("x", pause="abort")
            reasons = [r.finish_reason async for r in rollout]
        assert reasons == ["aborted"] * 4
        assert await can_roll_out(engine)


async def test_no_two_rollouts_of_an_engine_have_chunks_of_one_id(
    sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine may still report of the last rollout's chunks when the next begins."""
    async with sim.engine() as engine:
        pool, ids = engine._host._pool, []
        run_chunk = pool.run_chunk

        def note(instance_id: InstanceId, run: Run, after: object) -> None:
            ids.append(run.chunk.chunk_id)
            run_chunk(instance_id, run, after)

        monkeypatch.setattr(pool, "run_chunk", note)
        for _ in range(3):
            assert await can_roll_out(engine)
        assert len(ids) >= 12
        assert len(set(ids)) == len(ids)


async def test_engines_that_do_not_stop_a_rollout_are_killed(sim) -> None:
    async with sim.engine(engine_args=SLOW, shutdown_timeout_s=0.1) as engine:

        async def never(chunk_id: object) -> None:
            return None

        def deafen() -> None:
            for process in sim.machine.processes.values():
                process.backend.abort = never

        sim.do(engine, deafen)
        async with engine.rollout(groups_of(2, **ENDLESS)) as rollout:
            while not has_begun(rollout):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert activity(engine) is Activity.IDLE
        assert await can_roll_out(engine)
