"""A rollout's life: read to its end or left before, in every state and either form."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING

import pytest

import aseer
from aseer.errors import (
    AseerError,
    ConfigError,
    EngineClosedError,
    InstanceLostError,
    RolloutClosedError,
    RolloutError,
    RolloutInProgressError,
)
from tests.unit.runtime.engines import ENDLESS, SOON_S, Sim, groups_of

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOW = {"step_s": 0.002}


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Sim:
    return Sim(monkeypatch)


@pytest.fixture
def engine(sim: Sim) -> Iterator[aseer.Engine]:
    with sim.engine() as engine:
        yield engine


def names(responses: list[aseer.Response]) -> list[str]:
    return sorted(r.request_id for r in responses)


ALL = ["g0/0", "g0/1", "g1/0", "g1/1"]


# Reading to the end


def test_each_request_yields_one_response(engine) -> None:
    rollout = engine.rollout_sync(groups_of(2))
    with pytest.raises(AseerError, match="not finished"):
        _ = rollout.report
    assert rollout.progress() is None
    responses = list(rollout)
    assert names(responses) == ALL
    assert {len(r.token_ids) for r in responses} == {40}
    assert rollout.report.num_responses == 4
    progress = rollout.progress()
    assert progress is not None
    assert progress.num_finished == 4
    assert list(rollout) == []  # one life


async def test_asyncio_code_reads_the_same(engine) -> None:
    async with engine.rollout(groups_of(2)) as rollout:
        responses = [r async for r in rollout]
    plain = list(engine.rollout_sync(groups_of(2)))
    key = {r.request_id: r.token_ids for r in responses}
    assert key == {r.request_id: r.token_ids for r in plain}


async def test_whole_groups_come_in_order_of_their_members(engine) -> None:
    groups = [g async for g in engine.rollout(groups_of(3, n=3)).by_group()]
    assert sorted(g[0].group_id for g in groups) == ["g0", "g1", "g2"]
    assert all([r.index for r in g] == [0, 1, 2] for g in groups)
    sync = list(engine.rollout_sync(groups_of(2)).by_group())
    assert [len(g) for g in sync] == [2, 2]


async def test_groups_may_come_from_any_iterator(engine) -> None:
    async def groups():
        for group in groups_of(2):
            await asyncio.sleep(0)
            yield group

    assert names([r async for r in engine.rollout(groups())]) == ALL
    assert names([r async for r in engine.rollout(iter(groups_of(2)))]) == ALL
    assert names(list(engine.rollout_sync(iter(groups_of(2))))) == ALL
    assert list(engine.rollout_sync([])) == []
    with pytest.raises(ConfigError, match="async for"):
        engine.rollout_sync(groups())


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_an_iterators_error_comes_after_all_responses(engine, kind) -> None:
    def plain():
        yield from groups_of(2)
        raise KeyError("x")

    async def awaited():
        for group in plain():
            yield group

    read = []
    with pytest.raises(KeyError):
        async for response in engine.rollout(plain() if kind == "plain" else awaited()):
            read.append(response)
    assert names(read) == ALL
    assert names(list(engine.rollout_sync(groups_of(2)))) == ALL


async def test_several_loops_share_the_responses(engine) -> None:
    async with engine.rollout(groups_of(4)) as rollout:

        async def read() -> list[aseer.Response]:
            return [r async for r in rollout]

        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(read()) for _ in range(3)]
    assert len(names(sum((list(t.result()) for t in reading), []))) == 8  # noqa: RUF017


# Leaving


def test_a_block_that_is_left_ends_the_work(sim) -> None:
    with sim.engine(engine_args=SLOW) as engine:
        for _ in range(2):
            with engine.rollout_sync(groups_of(2, **ENDLESS)) as rollout:
                pass
            with pytest.raises(RolloutClosedError):
                next(iter(rollout))
            rollout.close()
        assert names(list(engine.rollout_sync(groups_of(2)))) == ALL


async def test_a_loop_that_is_broken_off_ends_the_work(sim) -> None:
    async with sim.engine(engine_args=SLOW) as engine:
        short, long = groups_of(1, max_tokens=1), groups_of(2, **ENDLESS)[1:]
        async for _ in engine.rollout(short + long):
            break
        gc.collect()
        assert len([r async for r in engine.rollout(groups_of(1))]) == 2


async def test_a_rollout_that_was_never_begun_is_closed_at_once(engine) -> None:
    rollout = engine.rollout(groups_of(1))
    await rollout.aclose()
    await rollout.aclose()
    with pytest.raises(RolloutClosedError):
        async for _ in rollout:
            pass
    plain = engine.rollout_sync(groups_of(1))
    plain.close()
    with pytest.raises(RolloutClosedError), plain:
        pass


async def test_closing_after_the_end_changes_nothing(engine) -> None:
    async with engine.rollout(groups_of(2)) as rollout:
        assert names([r async for r in rollout]) == ALL
    await rollout.aclose()
    assert rollout.report.num_responses == 4


async def test_a_wait_that_is_given_up_loses_no_response(sim) -> None:
    async with sim.engine(engine_args=SLOW) as engine:
        read = []
        async with engine.rollout(groups_of(2)) as rollout:
            loop = aiter(rollout)
            while True:
                try:
                    async with asyncio.timeout(0.003):
                        read.append(await anext(loop))
                except TimeoutError:
                    continue
                except StopAsyncIteration:
                    break
        assert names(read) == ALL


async def test_who_gave_a_wait_up_may_begin_another_rollout(sim) -> None:
    async with sim.engine(engine_args=SLOW) as engine:
        first = aiter(engine.rollout(groups_of(2, **ENDLESS)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(first)
        assert names([r async for r in engine.rollout(groups_of(2))]) == ALL
        with pytest.raises(RolloutClosedError, match="gave up"):
            await anext(first)


async def test_a_block_whose_entering_is_given_up_leaves_the_engine_free(sim) -> None:
    async with sim.engine(engine_args=SLOW) as engine:
        other = engine.rollout(groups_of(2, **ENDLESS))
        sim.do(engine, lambda: sim.machine.hold("0.1", "sleep"))
        falling = asyncio.get_running_loop().create_task(engine.sleep())
        await asyncio.to_thread(sim.until_asked, engine, "0.1", "sleep")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), other:
                pass
        falling.cancel()
        await asyncio.wait([falling])
        sim.do(engine, lambda: sim.machine.scripts.clear())
        sim.kill(engine, "0.1")

        async def rolls_out() -> list[aseer.Response]:  # as another task
            return [r async for r in engine.rollout(groups_of(2))]

        rolling = asyncio.get_running_loop().create_task(rolls_out())
        assert names(await asyncio.wait_for(rolling, SOON_S)) == ALL
        with pytest.raises(RolloutClosedError):
            await anext(aiter(other))


async def test_a_close_at_the_moment_of_the_opening_does_not_wait_for_ever(sim) -> None:
    async with sim.engine() as engine:
        for _ in range(20):
            rollout = engine.rollout(groups_of(1))
            opening = asyncio.get_running_loop().create_task(rollout.__aenter__())
            await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait_for(rollout.aclose(), SOON_S)
            await asyncio.wait([opening])
        assert len([r async for r in engine.rollout(groups_of(1))]) == 2


def test_an_interrupt_in_a_plain_iterator_leaves_the_rollout(sim) -> None:
    def groups():
        yield groups_of(1, **ENDLESS)[0]
        raise KeyboardInterrupt

    with sim.engine(engine_args=SLOW) as engine:
        rollout = engine.rollout_sync(groups())
        with pytest.raises(KeyboardInterrupt):
            next(iter(rollout))
        with pytest.raises(RolloutClosedError):
            next(iter(rollout))
        assert names(list(engine.rollout_sync(groups_of(2)))) == ALL


# Cancelling groups


@pytest.mark.parametrize("when", ["before the beginning", "while it runs"])
def test_a_cancelled_group_comes_as_aborted_and_the_others_as_they_are(
    sim, when
) -> None:
    with sim.engine(engine_args=SLOW) as engine:
        endless = groups_of(2, **ENDLESS)[1]
        rollout = engine.rollout_sync([groups_of(1, max_tokens=2)[0], endless])
        with pytest.raises(ConfigError, match="no group 'nobody'"):
            rollout.cancel("nobody")
        if when == "before the beginning":
            rollout.cancel("g1")
        reading = iter(rollout)
        first = next(reading)
        if when == "while it runs":
            rollout.cancel("g1")
            rollout.cancel("g1")
        reasons = {r.request_id: r.finish_reason for r in (first, *reading)}
        assert reasons == {
            "g0/0": "length",
            "g0/1": "length",
            "g1/0": "aborted",
            "g1/1": "aborted",
        }
        rollout.cancel("g0")  # it is over


# One at a time


def test_another_rollout_meanwhile_is_refused_and_may_be_tried_again(sim) -> None:
    with sim.engine(engine_args=SLOW) as engine:
        second = engine.rollout_sync(groups_of(2))
        with engine.rollout_sync(groups_of(1, **ENDLESS)):
            for _ in range(2):
                with pytest.raises(RolloutInProgressError, match="unfinished"), second:
                    pass
        assert names(list(second)) == ALL


def test_an_abort_from_elsewhere_ends_the_rollout_for_its_reader(sim) -> None:
    with sim.engine(engine_args=SLOW) as engine:
        engine.abort_rollout_sync()  # there is none
        rollout = engine.rollout_sync(iter(groups_of(2, **ENDLESS)))
        read: list[aseer.Response] = []
        began = threading.Event()

        def read_all() -> None:
            with rollout:
                began.set()
                read.extend(rollout)

        reader = threading.Thread(target=read_all)
        reader.start()
        assert began.wait(SOON_S)
        while not (progress := rollout.progress()) or not progress.num_output_tokens:
            threading.Event().wait(0.002)
        engine.abort_rollout_sync()
        reader.join(SOON_S)
        assert names(read) == ALL
        assert {r.finish_reason for r in read} == {"aborted"}
        assert names(list(engine.rollout_sync(groups_of(2)))) == ALL


# What goes wrong


def test_what_a_dead_instance_ran_goes_on_elsewhere(sim) -> None:
    with sim.engine(engine_args={"step_s": 0.001}) as engine:
        expected = {
            r.request_id: r.token_ids for r in engine.rollout_sync(groups_of(4))
        }
        with engine.rollout_sync(groups_of(4)) as rollout:
            sim.kill(engine, "0.1")
            read = list(rollout)
        assert {r.request_id: r.token_ids for r in read} == expected


def test_when_no_instance_is_left_the_reader_gets_what_there_is_and_why(sim) -> None:
    with sim.engine(engine_args=SLOW, max_restarts=0) as engine:
        rollout = engine.rollout_sync(groups_of(2, **ENDLESS))
        read = []
        with rollout:
            # Deaths that the requests are blamed for may be forgiven: to no avail.
            broken = RuntimeError("the device is gone")
            sim.do(engine, lambda: sim.machine.fail("*", "start", broken))
            for identity in ("0.1", "1.1"):
                sim.kill(engine, identity)
            with pytest.raises(InstanceLostError, match="max_restarts=0"):
                for response in rollout:
                    read.append(response)
        assert names(read) == ALL
        assert {r.finish_reason for r in read} == {"error"}
        with pytest.raises(aseer.EngineError, match="no instance left"):
            next(iter(engine.rollout_sync(groups_of(1))))


def test_a_reader_is_told_that_the_engine_was_closed(sim) -> None:
    engine = sim.engine(engine_args=SLOW)
    with engine:
        rollout = engine.rollout_sync(groups_of(2, **ENDLESS))
        with rollout:
            engine.close()
            read = []
            with pytest.raises(EngineClosedError, match="in progress"):
                for response in rollout:
                    read.append(response)
        assert names(read) == ALL
    with pytest.raises(EngineClosedError):
        engine.rollout_sync([])


def test_an_error_in_the_decisions_ends_the_rollout_and_not_the_engine(
    sim, monkeypatch
) -> None:
    with sim.engine() as engine:

        def fail(*args: object) -> None:
            raise KeyError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr("aseer.controller.Controller.progress", fail)
            with pytest.raises(RolloutError, match="KeyError"):
                list(engine.rollout_sync(groups_of(2, **ENDLESS)))
        assert names(list(engine.rollout_sync(groups_of(2)))) == ALL


async def test_the_function_uses_the_engine_that_is_open_here(sim) -> None:
    with pytest.raises(EngineClosedError, match="no engine is open here"):
        async for _ in aseer.rollout(groups_of(1)):
            pass
    async with sim.engine() as engine:
        assert names([r async for r in aseer.rollout(groups_of(2))]) == ALL
        both = aseer.rollout(groups_of(1), engine=engine, config=engine.config)
        with pytest.raises(ConfigError, match="not both"):
            async for _ in both:
                pass
        config = engine.config
    own = [r async for r in aseer.rollout(groups_of(2), config=config)]
    assert names(own) == ALL
