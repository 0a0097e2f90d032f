"""Single requests become groups; every caller gets one response, or an error."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

import aseer
from tests.integration.sims import config_of, content, groups_of

SAMPLING = {"temperature": 0.0, "max_tokens": 100}
LONG = {"ignore_eos": True, "max_tokens": 3000}


async def test_requests_of_one_name_are_one_group_and_sample_as_groups_do(engine):
    expected = content([r async for r in engine.rollout(groups_of(5, max_tokens=100))])

    async def ask(desk, i):
        return i, await desk.submit([5, 6, 7 + i], SAMPLING, group=f"g{i}", n=4)

    async with engine.open_rollout() as desk, asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(desk, i)) for i in range(5) for _ in range(4)]
    answers = [task.result() for task in asked]
    ids = {i: {r.group_id for j, r in answers if j == i} for i in range(5)}
    assert [len(each) for each in ids.values()] == [1] * 5
    assert Counter(r.index for _, r in answers) == dict.fromkeys(range(4), 5)
    for i, response in answers:
        tokens, logprobs, text = expected[f"g{i}/{response.index}"]
        assert (response.token_ids, response.logprobs, response.text) == (
            tokens,
            logprobs,
            text,
        )
    assert desk.report.num_responses == 20
    assert len([r async for r in engine.rollout(groups_of(1))]) == 4


async def test_equal_prompts_are_joined_within_a_moment_and_others_are_not(engine):
    async with engine.open_rollout(join_s=0.2) as desk:
        async with asyncio.TaskGroup() as tasks:
            first = [tasks.create_task(desk.submit([5, 6], SAMPLING)) for _ in range(3)]
            other = tasks.create_task(desk.submit([5, 7], SAMPLING))
            hot = {"temperature": 0.0, "max_tokens": 99}
            unlike = tasks.create_task(desk.submit([5, 6], hot))
        late = await desk.submit([5, 6], SAMPLING)
    groups = {r.result().group_id for r in first}
    assert len(groups) == 1
    assert len(groups | {other.result().group_id, unlike.result().group_id}) == 3
    assert late.group_id not in groups


async def test_a_group_does_not_wait_for_siblings_that_never_come(engine):
    async with engine.open_rollout(join_s=0.05) as desk, asyncio.timeout(20):
        response = await desk.submit([5, 6], SAMPLING, group="few", n=8)
    assert response.finish_reason in ("stop", "length")


async def test_a_bad_request_fails_its_caller_alone(engine):
    async with engine.open_rollout(join_s=0.01) as desk:
        running = asyncio.get_running_loop().create_task(desk.submit([5, 6], SAMPLING))
        with pytest.raises(aseer.ConfigError, match="token id 99999"):
            await desk.submit([99999], SAMPLING)
        with pytest.raises(aseer.ConfigError, match="n=0"):
            await desk.submit([5], SAMPLING, n=0)
        with pytest.raises(aseer.ConfigError, match="give valid Unicode"):
            await desk.submit([5], SAMPLING, group="\ud800", n=1)
        response = await desk.submit([5], SAMPLING, group="7", n=1)
        assert response.finish_reason == "stop"
        with pytest.raises(aseer.ConfigError, match="unknown settings"):
            await desk.submit([5], {"warmth": 1})
        assert (await running).token_ids
        asked = asyncio.get_running_loop().create_task(
            desk.submit([5, 6], SAMPLING, group="a", n=2)
        )
        await asyncio.sleep(0)
        with pytest.raises(aseer.ConfigError, match="'a' was given with another"):
            await desk.submit([5, 7], SAMPLING, group="a", n=2)
        assert (await asked).token_ids


async def test_a_group_that_every_caller_left_is_cancelled(engine):
    async with engine.open_rollout(join_s=0.01) as desk:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.gather(*(desk.submit([5], LONG, n=2) for _ in range(2)))
        assert (await desk.submit([5, 6], SAMPLING)).token_ids
        progress = desk.progress()
        while progress.num_finished < 3:
            await asyncio.sleep(0.05)
            progress = desk.progress()
    assert desk.report.num_output_tokens < 2 * 3000


async def test_those_who_wait_when_the_desk_closes_are_told(engine):
    async with engine.open_rollout(join_s=0.01) as desk:
        waiting = [
            asyncio.get_running_loop().create_task(desk.submit([5], LONG)),
            asyncio.get_running_loop().create_task(desk.submit([6], LONG, n=5)),
        ]
        await asyncio.sleep(0.1)
    for task in waiting:
        with pytest.raises(aseer.RolloutClosedError, match="was closed before"):
            await task
    with pytest.raises(aseer.RolloutClosedError):
        await desk.submit([5], SAMPLING)
    assert len([r async for r in engine.rollout(groups_of(1))]) == 4


async def test_those_who_wait_when_the_engine_is_lost_are_told():
    config = config_of(max_restarts=0, engine_args={"die_after_tokens": 300})
    async with aseer.Engine(config) as engine:
        async with engine.open_rollout(join_s=0.01) as desk, asyncio.timeout(30):
            response = await desk.submit([5], LONG)
            assert response.finish_reason == "error"
            with pytest.raises(aseer.EngineError):
                while True:
                    await desk.submit([5], LONG)


async def test_a_time_to_join_that_makes_no_sense_is_refused(engine):
    for seconds in (-1, "0.1", None, float("inf")):
        with pytest.raises(aseer.ConfigError, match="join_s="):
            engine.open_rollout(join_s=seconds)


async def test_a_desk_that_nobody_entered_says_so_at_once(engine):
    desk = engine.open_rollout()
    with pytest.raises(aseer.RolloutClosedError, match="use it as a context manager"):
        await desk.submit([5], SAMPLING)
    async with desk:
        response = await desk.submit([5], SAMPLING, n=np.int64(1))
        assert response.finish_reason == "stop"
        with pytest.raises(aseer.ConfigError, match="n=0"):
            await desk.submit([5], SAMPLING, n=0)


async def test_a_request_that_failed_is_nothing_to_those_that_still_join():
    config = config_of(max_request_retries=0, engine_args={"fatal_prompt": [9, 9]})
    async with (
        aseer.Engine(config) as engine,
        engine.open_rollout(join_s=60) as desk,
    ):
        failed = await desk.submit([9, 9], SAMPLING, n=1)
        assert failed.finish_reason == "error"
        joining = asyncio.ensure_future(desk.submit([5], SAMPLING, n=2))  # noqa: TID251
        await asyncio.sleep(0)
        await engine.abort_rollout()
        with pytest.raises(aseer.RolloutClosedError, match="rollout has ended"):
            await joining
