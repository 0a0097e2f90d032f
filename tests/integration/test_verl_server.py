"""verl's server on simulated engines: siblings, order, aborts, weights, sleep."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest

import aseer
from aseer.integrations.verl_server import AseerServer
from aseer.integrations.verl_settings import ServerSettings
from tests.integration.test_weights import SHAPES, until, weights

pytest.importorskip("torch")
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}


@asynccontextmanager
async def serving(**changes: Any):
    settings: dict[str, Any] = {
        "engine": {
            "model": "sim",
            "device": "sim",
            "num_instances": 2,
            "chunk_size": 16,
            "max_model_len": 4096,
            "report_interval_s": 0.02,
            "engine_args": {
                "num_kv_blocks": 256,
                "step_s": 0.001,
                "weights": SHAPES,
            },
        },
        "group_size": 4,
        "prompt_length": 64,
        "response_length": 100,
        "sampling": {},
        "sleeps": False,
    }
    server = AseerServer(ServerSettings(**settings | changes))
    await asyncio.gather(server.start(), server.start())  # two replicas
    try:
        yield server
    finally:
        await server.stop()


async def ask(server, prompt, num=4, **sampling):
    asked = (server.generate(prompt, SAMPLING | sampling, "id") for _ in range(num))
    return await asyncio.gather(*asked)


async def test_siblings_become_groups_and_answers_are_their_own(caplog):
    caplog.set_level("INFO", "aseer.actor")
    async with serving() as server:
        prompts = [[5, 6, 7 + number] for number in range(3)]
        answers = await asyncio.gather(*[ask(server, p) for p in prompts])
        for outputs in answers:
            for output in outputs:
                assert output.stop_reason == "completed"
                assert 0 < len(output.token_ids) <= 100
                assert len(output.log_probs) == len(output.token_ids)
                assert all(type(each) is float for each in output.log_probs)
                assert output.extra_fields == {
                    "global_steps": 0,
                    "min_global_steps": 0,
                    "max_global_steps": 0,
                }
        (greedy,) = await ask(server, prompts[0], 1, temperature=0.0)
        assert (await ask(server, prompts[0], 1, temperature=0.0))[0] == greedy
        await server.sleep()
    assert "a rollout of 14 responses in 5 groups" in caplog.text


async def test_weights_come_between_rollouts_and_steps_are_verls():
    async with serving() as server:
        before = await ask(server, [5, 6], 1, temperature=0.0)
        for step in (0, 7):
            target = await server.begin_update()
            await target.send_async(iter(weights(1.0 + step).items()))
            assert await server.finish_update(target, step) == target.version
            after = await ask(server, [5, 6], 1, temperature=0.0)
            assert after[0].extra_fields["global_steps"] == step
            assert after[0].token_ids != before[0].token_ids
            before = after
        target = await server.begin_update()
        await server.abandon_update(target)
        assert await ask(server, [5, 6], 1, temperature=0.0) == before


async def test_an_update_waits_for_what_runs():
    async with serving() as server:
        asking = asyncio.get_running_loop().create_task(ask(server, [5, 6]))
        await until(lambda: server._num_running == 4)
        target = await server.begin_update()
        assert [each.stop_reason for each in await asking] == ["completed"] * 4
        await server.abandon_update(target)


async def test_an_update_begins_though_requests_never_cease():
    async with serving() as server, asyncio.timeout(20):
        wants_more = True

        async def loop():
            steps = []
            while wants_more:
                (output,) = await ask(server, [5, 6], 1, max_tokens=20)
                assert output.stop_reason == "completed"
                steps.append(output.extra_fields["global_steps"])
            return steps

        loops = [asyncio.get_running_loop().create_task(loop()) for _ in range(6)]
        await until(lambda: server._num_running == 6)
        for step in (1, 2):
            target = await server.begin_update()
            await target.send_async(iter(weights(float(step)).items()))
            await server.finish_update(target, step)
        await until(lambda: server._num_running == 6)
        wants_more = False
        for steps in await asyncio.gather(*loops):
            assert steps == sorted(steps)
            assert steps[-1] == 2


async def test_what_is_aborted_has_its_tokens_and_what_comes_waits():
    async with serving(response_length=4000) as server:
        long = {"ignore_eos": True, "max_tokens": 3900}
        asking = asyncio.get_running_loop().create_task(ask(server, [5, 6], 4, **long))
        await until(lambda: server._num_running == 4)
        await asyncio.sleep(0.5)
        said = await server.abort_all_requests()
        assert said["aborted_count"] == 4
        outputs = await asking
        assert {each.stop_reason for each in outputs} == {"aborted"}
        assert any(each.token_ids for each in outputs)
        assert all(len(o.token_ids) == len(o.log_probs) < 3900 for o in outputs)
        later = asyncio.get_running_loop().create_task(ask(server, [5, 6]))
        await asyncio.sleep(0.1)
        assert not later.done()
        await server.resume_generation()
        assert {each.stop_reason for each in await later} == {"completed"}
        await server.abort_all_requests(reject_request=True)
        (rejected,) = await ask(server, [5, 6], 1)
        assert (rejected.stop_reason, rejected.token_ids) == ("aborted", [])


async def test_an_engine_that_sleeps_wakes_for_weights_and_then_for_requests():
    async with serving(sleeps=True) as server:
        await ask(server, [5, 6])
        await asyncio.gather(server.sleep(), server.sleep())  # two replicas
        await server.wake_up(["weights"])
        target = await server.begin_update()
        await target.send_async(iter(weights(1.0).items()))
        await server.finish_update(target, 1)
        await server.wake_up(["kv_cache"])
        assert len(await ask(server, [5, 6])) == 4
        await server.release_kv_cache()
        await server.resume_kv_cache()
        assert len(await ask(server, [5, 6])) == 4


async def test_a_bad_request_costs_only_itself():
    async with serving() as server:
        with pytest.raises(aseer.ConfigError, match="this model takes none"):
            await server.generate([5], SAMPLING, "id", image_data=["an image"])
        with pytest.raises(aseer.ConfigError, match="not video and audio"):
            await server.generate([5], SAMPLING, "id", video_data=["a film"])
        for prompt in (None, "text", 5, [], [5, "6"], [-1]):
            with pytest.raises(aseer.ConfigError, match="prompt"):
                await server.generate(prompt, SAMPLING, "id")
        with pytest.raises(aseer.ConfigError, match="no_such_setting"):
            await ask(server, [5, 6], 1, no_such_setting=3)
        assert len(await ask(server, [5, 6])) == 4


async def test_a_rollout_that_failed_costs_no_later_one(monkeypatch):
    def add_groups(self, *_):
        raise ZeroDivisionError("not today")

    async with serving() as server:
        with monkeypatch.context() as patch:
            patch.setattr("aseer.controller.Controller.add_groups", add_groups)
            with pytest.raises(aseer.RolloutError, match="ZeroDivisionError"):
                await ask(server, [5, 6], 1)
        assert len(await ask(server, [5, 6])) == 4, "they are another rollout"


@pytest.mark.parametrize("then", ["sleep", "begin_update", "stop"])
async def test_after_a_rollout_that_failed_a_trainer_can_do_what_comes_next(
    monkeypatch, then
):
    def add_groups(self, *_):
        raise ZeroDivisionError("not today")

    monkeypatch.setattr("aseer.controller.Controller.add_groups", add_groups)
    async with serving() as server:
        with pytest.raises(aseer.RolloutError, match="ZeroDivisionError"):
            await ask(server, [5, 6], 1)
        await getattr(server, then)()


async def test_without_an_instance_each_request_is_told_and_the_server_stops():
    dying = {"num_kv_blocks": 256, "step_s": 0.001, "die_after_tokens": 1}
    engine = {"model": "sim", "device": "sim", "num_instances": 1, "max_restarts": 0}
    engine |= {"max_model_len": 4096, "engine_args": dying}
    async with serving(engine=engine) as server:
        for _ in range(2):
            with pytest.raises(aseer.AseerError):
                await ask(server, [5, 6], 1)
