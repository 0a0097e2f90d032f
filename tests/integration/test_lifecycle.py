"""Calls that meet each other, and callers that go away: nothing hangs, nothing is lost,
and the engine serves on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from typing import Any

import pytest

import aseer
from tests.integration.sims import config_of, content, groups_of
from tests.waiting import until

LONG = {"ignore_eos": True, "max_tokens": 2000}
SHAPES = {"w": [2]}


def sims(**settings: Any) -> aseer.EngineConfig:
    args = {"weights": SHAPES, **settings.pop("engine_args", {})}
    return config_of(engine_args=args, **settings)


def weights(value: float = 1.0) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {"w": torch.full((2,), value)}


async def serves(engine: aseer.Engine) -> bool:
    async with asyncio.timeout(30):
        return len([r async for r in engine.rollout(groups_of(1, n=2))]) == 2


# -- leaving ---------------------------------------------------------------------------


async def test_a_loop_ended_by_a_timeout_is_left_while_the_exception_lives(engine):
    kept = []
    try:
        async with asyncio.timeout(0.2):
            async for _ in engine.rollout(groups_of(8, **LONG)):
                pass
    except TimeoutError as error:
        kept.append(error)  # and its traceback, and the frames of the iteration
        assert await serves(engine)
    assert kept


async def test_a_reader_that_gave_up_and_goes_on_to_another_rollout_is_known(engine):
    first = aiter(engine.rollout(groups_of(8, **LONG)))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await anext(first)
    assert await serves(engine)
    with pytest.raises(aseer.RolloutClosedError):
        await anext(first)


async def test_a_reader_that_polls_keeps_its_rollout_from_others(engine):
    quick = groups_of(9, n=1, max_tokens=300)[8:]
    iterator = aiter(engine.rollout(groups_of(4, **LONG) + quick))

    async def intrude():
        with pytest.raises(aseer.RolloutInProgressError):
            await anext(aiter(engine.rollout(groups_of(1))))

    first = None
    while first is None:
        try:
            async with asyncio.timeout(0.05):
                first = await anext(iterator)
        except TimeoutError:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(intrude())
    assert len([r async for r in iterator]) == 16


async def test_the_block_of_a_rollout_ends_its_work_whatever_holds_it(engine):
    kept = []
    async with engine.rollout(groups_of(8, **LONG)) as rollout:
        kept.append(aiter(rollout))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(kept[0])
    assert engine.rollout(groups_of(1)) is not None
    assert await serves(engine)


def test_the_block_of_the_synchronous_form_does_the_same():
    with aseer.Engine(config_of()) as engine:
        kept = []
        with engine.rollout_sync(groups_of(8, **LONG) + groups_of(9)[8:]) as rollout:
            kept.append(iter(rollout))
            next(kept[0])
        assert len(list(engine.rollout_sync(groups_of(1)))) == 4


async def test_a_rollout_out_of_reach_is_ended_through_the_engine(engine):
    kept = aiter(engine.rollout(groups_of(8, **LONG) + groups_of(9)[8:]))
    responses = [await anext(kept)]
    await engine.abort_rollout()
    responses += [r async for r in kept]
    assert len(responses) == 36
    assert Counter(r.finish_reason for r in responses)["aborted"] >= 32
    await engine.abort_rollout()
    assert await serves(engine)


async def test_a_rollout_that_was_left_yields_nothing_more(engine):
    rollout = engine.rollout(groups_of(3, n=5, max_tokens=5))
    async for _ in rollout:
        break
    with pytest.raises(aseer.RolloutClosedError, match="left before its end"):
        async for _ in rollout:
            pass
    await rollout.aclose()
    assert await serves(engine)


async def test_a_rollout_read_to_its_end_stays_at_its_end(engine):
    rollout = engine.rollout(groups_of(2))
    assert len([r async for r in rollout]) == 8
    assert [r async for r in rollout] == []
    await rollout.aclose()
    assert rollout.report.num_responses == 8


# -- groups from iterators -------------------------------------------------------------


@pytest.mark.parametrize("pause", ["abort_rollout", "update_weights"])
async def test_an_abort_ends_the_taking_of_groups_and_loses_none(pause):
    taken: list[str] = []

    async def source():
        for group in groups_of(1000, n=2, **LONG):
            taken.append(group.group_id)
            yield group
            await asyncio.sleep(0.002)

    async with aseer.Engine(sims()) as engine:
        responses = []

        async def read():
            async for response in engine.rollout(source()):
                responses.append(response)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            await until(lambda: len(taken) > 20)
            if pause == "abort_rollout":
                await engine.abort_rollout()
            else:
                await engine.update_weights(weights(), pause="abort")
        num_taken = len(taken)
        await asyncio.sleep(0.05)
        assert len(taken) == num_taken, "nothing is taken after the rollout"
        assert Counter(r.group_id for r in responses) == dict.fromkeys(taken, 2)


async def test_a_source_that_is_cancelled_by_others_is_an_error(engine):
    async def source():
        for group in groups_of(1):
            yield group
        fetching = asyncio.get_running_loop().create_future()
        fetching.cancel()
        await fetching

    responses = []
    with pytest.raises(aseer.RolloutError, match="CancelledError of its own"):
        async for response in engine.rollout(source()):
            responses.append(response)
    assert len(responses) == 4


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_an_endless_source_that_never_waits_does_not_delay_responses(kind):
    num_taken = 0

    def make():
        nonlocal num_taken
        num_taken += 1
        return aseer.Group([num_taken % 500], n=4, sampling={"max_tokens": 2})

    async def endless_async():
        while True:
            yield make()

    def endless():
        while True:
            yield make()

    async with aseer.Engine(config_of()) as engine:
        source = endless_async() if kind == "async" else endless()
        async for _ in engine.rollout(source):
            break
    assert num_taken < 8000, "of the 16,384 that may be pending"


async def test_a_source_interrupted_in_the_middle_loses_no_group():
    taken = []

    def source():
        for group in groups_of(6, max_tokens=4):
            if len(taken) == 3:
                taken.append(None)
                raise KeyboardInterrupt
            taken.append(group.group_id)
            yield group

    async with aseer.Engine(config_of()) as engine:
        iterator = aiter(engine.rollout(source()))
        with pytest.raises(KeyboardInterrupt):
            # Not in a task: asyncio would end its loop.
            await anext(iterator)
        groups = {r.group_id async for r in iterator}
    assert groups == {"g0", "g1", "g2"}


async def test_a_cancel_is_not_lost_however_early_it_comes(engine):
    for _ in range(5):
        rollout = engine.rollout(groups_of(1, **LONG))
        started = threading.Event()

        def cancel(rollout=rollout, started=started):
            started.wait()
            rollout.cancel("g0")

        thread = threading.Thread(target=cancel)
        thread.start()
        started.set()
        async with asyncio.timeout(20):
            reasons = {r.finish_reason async for r in rollout}
        thread.join()
        assert reasons == {"aborted"}


# -- calls at once ---------------------------------------------------------------------


async def test_sleep_and_rollout_at_once_harm_nobody():
    async with aseer.Engine(sims()) as engine:
        pids = {i.pid for i in engine.instances}
        for _ in range(5):
            outcomes = []

            async def sleep(outcomes=outcomes):
                try:
                    await engine.sleep()
                    outcomes.append("slept")
                except aseer.RolloutInProgressError:
                    outcomes.append("in the way")

            async def roll(outcomes=outcomes):
                try:
                    responses = [r async for r in engine.rollout(groups_of(4))]
                    outcomes.append(len(responses))
                except aseer.EngineError as error:
                    outcomes.append(str(error))

            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                tasks.create_task(sleep())
                tasks.create_task(roll())
            assert set(outcomes) in (
                {"slept", "the engine is asleep; wake() it first"},
                {"in the way", 16},
            )
            await engine.wake()
            assert await serves(engine)
        assert {i.pid for i in engine.instances} == pids, "no instance died of it"


async def test_a_rollout_queued_behind_an_update_comes_before_a_later_sleep():
    async with aseer.Engine(sims()) as engine:
        pids = {i.pid for i in engine.instances}

        async def roll():
            return [r async for r in engine.rollout(groups_of(4, max_tokens=300))]

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            update = tasks.create_task(engine.update_weights(weights()))
            await asyncio.sleep(0)
            rolling = tasks.create_task(roll())
            await asyncio.sleep(0.01)
            with pytest.raises(aseer.RolloutInProgressError):
                while not rolling.done():
                    await engine.sleep()
                    await engine.wake()
            await update
        assert len(rolling.result()) == 16
        assert {i.pid for i in engine.instances} == pids


async def test_a_second_sleep_and_a_second_wake_change_nothing():
    async with aseer.Engine(sims()) as engine:
        await engine.wake()
        await engine.sleep()
        await engine.sleep()
        await engine.wake()
        await engine.wake()
        assert await serves(engine)


def test_an_interrupted_update_gives_the_engine_back():
    groups = groups_of(8, **LONG) + groups_of(9)[8:]
    with aseer.Engine(sims()) as engine:
        iterator = iter(engine.rollout_sync(groups))
        next(iterator)
        old = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                engine.update_weights_sync(weights(), pause="wait")
        finally:
            signal.signal(signal.SIGALRM, old)
        assert len(list(iterator)) == 35
        assert len(list(engine.rollout_sync(groups_of(1)))) == 4
        assert engine.weight_version == 0
        assert engine.update_weights_sync(weights()).version == 1


async def test_a_call_that_waits_when_the_engine_closes_is_told_so():
    async with aseer.Engine(sims()) as engine:
        iterator = aiter(engine.rollout(groups_of(4, **LONG) + groups_of(9)[8:]))
        await anext(iterator)
        outcomes: list[BaseException] = []

        def update():
            try:
                engine.update_weights_sync(weights(), pause="wait")
            except BaseException as error:
                outcomes.append(error)

        thread = threading.Thread(target=update)
        thread.start()
        await asyncio.sleep(0.2)
    await asyncio.to_thread(thread.join, 20)
    assert [type(e) for e in outcomes] == [aseer.EngineClosedError]


async def test_a_rollout_that_waits_to_open_when_the_engine_closes_is_told_so():
    """In a thread of its own, behind an update that sends for ever."""
    sending, closing = threading.Event(), threading.Event()

    def endless():
        sending.set()
        closing.wait(20)
        yield from weights().items()

    outcomes: list[BaseException] = []

    def record(call):
        try:
            call()
        except BaseException as error:
            outcomes.append(error)

    async with aseer.Engine(sims()) as engine:
        threads = [
            threading.Thread(
                target=record, args=(lambda: engine.update_weights_sync(endless()),)
            ),
            threading.Thread(
                target=record, args=(lambda: list(engine.rollout_sync(groups_of(1))),)
            ),
        ]
        threads[0].start()
        await asyncio.to_thread(sending.wait, 20)
        threads[1].start()
        await asyncio.sleep(0.2)
    closing.set()
    for thread in threads:
        await asyncio.to_thread(thread.join, 20)
    assert [type(e) for e in outcomes] == [aseer.EngineClosedError] * 2


# -- instances that die ----------------------------------------------------------------


async def test_what_dies_asleep_is_paid_for_like_any_other_death():
    async with aseer.Engine(sims(num_instances=3, max_restarts=1)) as engine:
        await engine.sleep()
        for info in engine.instances:
            os.kill(info.pid, signal.SIGKILL)
        await until(lambda: not engine.instances)
        await engine.wake()
        await until(lambda: engine.instances)
        assert await serves(engine)
        await asyncio.sleep(1.0)  # a second one would have started
        assert len(engine.instances) == 1
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        await until(lambda: not engine.instances)
        with pytest.raises(aseer.EngineError, match="max_restarts=1"):
            async with asyncio.timeout(20):
                while True:
                    await serves(engine)


async def test_an_instance_that_dies_while_it_falls_asleep_is_not_waited_for():
    async with aseer.Engine(sims()) as engine:
        os.kill(engine.instances[0].pid, signal.SIGSTOP)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            asleep = tasks.create_task(engine.sleep())
            await asyncio.sleep(0.2)
            assert not asleep.done()
            os.kill(engine.instances[0].pid, signal.SIGKILL)
        await engine.wake()
        assert await serves(engine)


async def test_an_update_that_an_instance_cannot_commit_spends_no_restart():
    config = sims(
        max_restarts=0, engine_args={"weights_fault": ["0.1", "commit", "refuse"]}
    )
    async with aseer.Engine(config) as engine:
        victim = engine.instances[0].pid
        await engine.update_weights(weights())
        await until(lambda: victim not in {i.pid for i in engine.instances})
        await until(lambda: len(engine.instances) == 2)
        assert await serves(engine)


async def test_one_request_that_kills_its_engines_does_not_take_the_engine_with_it():
    """By the default limits: four deaths end the request, three restarts are there."""
    fatal = aseer.Group([500, 500], n=1, group_id="fatal", sampling={"max_tokens": 50})
    config = sims(engine_args={"fatal_prompt": [500, 500]})
    async with aseer.Engine(config) as engine:
        assert await serves(engine)
        for _ in range(2):
            responses = []
            with pytest.raises(aseer.RolloutError, match="1 of 17 requests"):
                async for response in engine.rollout([*groups_of(4), fatal]):
                    responses.append(response)
            reasons = Counter(
                r.group_id for r in responses if r.finish_reason == "error"
            )
            assert reasons == {"fatal": 1}
            assert await serves(engine)


async def test_an_error_in_an_updates_decisions_fails_the_update_alone(monkeypatch):
    def committed(self, instance_id, error):
        raise ZeroDivisionError("not today")

    async with aseer.Engine(sims()) as engine:
        before = content([r async for r in engine.rollout(groups_of(3))])
        with monkeypatch.context() as patch:
            patch.setattr("aseer.weights.update.WeightUpdate.committed", committed)
            with pytest.raises(aseer.WeightUpdateError, match="ZeroDivisionError: not"):
                async with asyncio.timeout(20):
                    await engine.update_weights(weights())
        assert engine.weight_version == 0
        again = content([r async for r in engine.rollout(groups_of(3))])
        assert again == before, "on instances with the old weights"
        await engine.update_weights(weights())


async def test_an_engine_that_failed_says_why(monkeypatch):
    async def supervise(self):
        await asyncio.sleep(0.2)
        raise ZeroDivisionError("not today")

    monkeypatch.setattr("aseer.runtime.instances.InstancePool.supervise", supervise)
    async with aseer.Engine(sims()) as engine:
        iterator = aiter(engine.rollout(groups_of(4, **LONG)))
        with pytest.raises(aseer.EngineError, match="failed: ZeroDivisionError: not"):
            await anext(iterator)
        for call in (engine.sleep, engine.wake, lambda: engine.update_weights({})):
            with pytest.raises(aseer.EngineError, match="failed: ZeroDivisionError"):
                await call()
        with pytest.raises(aseer.EngineError, match="failed: ZeroDivisionError"):
            engine.rollout(groups_of(1))
