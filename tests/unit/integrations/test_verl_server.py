"""The server's own decisions, on a stand-in for the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.errors import ConfigError, RolloutClosedError, RolloutError
from aseer.integrations import actor
from aseer.integrations.verl_server import AseerServer
from aseer.integrations.verl_settings import ServerSettings


class Desk:
    """Answers when the test says so."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.waiting: list[asyncio.Future[Any]] = []
        self.asked: list[Any] = []
        self.has_ended = False
        self.report = SimpleNamespace(
            num_responses=1,
            instances=[],
            num_groups=1,
            num_output_tokens=2,
            wall_s=1.0,
            throughput_tok_s=2.0,
            weight_version=0,
        )

    async def __aenter__(self) -> Desk:
        return self

    async def aclose(self) -> None:
        self._engine.did.append("closed a desk")
        for future in self.waiting:
            if not future.done():
                future.set_exception(RolloutClosedError("closed"))

    async def submit(
        self, prompt: Any, sampling: Any, *, n: int, images: Any = None
    ) -> Any:
        self._engine.did.append((tuple(prompt), n))
        self.asked.append((images, sampling.get("logit_bias")))
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        return await future

    def answer(self, reason: str = "stop") -> None:
        for future in self.waiting:
            if not future.done():
                future.set_result(
                    SimpleNamespace(
                        finish_reason=reason,
                        token_ids=[1, 2],
                        logprobs=[-1.0, -2.0],
                        error="it is bad",
                    )
                )


class Engine:
    """Keeps what it was asked for."""

    def __init__(self, config: Any) -> None:
        self.did: list[Any] = []
        self.desks: list[Desk] = []
        self.instances = [SimpleNamespace(image_token_id=7)]
        self.config = config
        self.run_dir = Path("/nowhere")

    async def __aenter__(self) -> Engine:
        return self

    async def aclose(self) -> None:
        self.did.append("closed")

    def open_rollout(self, *, join_s: float) -> Desk:
        self.desks.append(Desk(self))
        return self.desks[-1]

    async def abort_rollout(self) -> None:
        self.desks[-1].answer("aborted")

    async def sleep(self, level: int) -> None:
        self.did.append(f"sleep {level}")

    async def wake(self, tags: Any = None) -> None:
        self.did.append(f"wake {tags}")

    async def begin_update(self, *, timeout_s: float) -> str:
        self.did.append(f"update within {timeout_s}")
        return "target"

    async def finish_update(self, target: str) -> Any:
        return SimpleNamespace(
            version=1, num_tensors=1, num_bytes=4, send_s=0, prepare_s=0, switch_s=0
        )

    async def abandon_update(self, target: str) -> None:
        self.did.append("abandoned")


@pytest.fixture
async def server(monkeypatch):
    monkeypatch.setattr(actor, "Engine", Engine)
    monkeypatch.setattr(actor, "start_janitor", lambda run_dir: None)
    settings = ServerSettings(
        engine={"model": "m", "max_model_len": 100},
        group_size=3,
        prompt_length=10,
        response_length=20,
        sampling={},
        sleeps=True,
        update_timeout_s=9.0,
    )
    server = AseerServer(settings)
    with pytest.raises(ConfigError, match="not started"):
        await server.begin_update()
    await server.start()
    await server.start()
    yield server
    await server.stop()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def asked(server: AseerServer) -> asyncio.Task[Any]:
    asking = server.generate([5, 6], {"logprobs": True}, "id", image_data=None)
    return asyncio.get_running_loop().create_task(asking)


async def test_requests_of_a_rollout_share_a_desk_until_the_engine_sleeps(server):
    engine = server._get()
    first, second = asked(server), asked(server)
    await settled()
    assert engine.did == [((5, 6), 3), ((5, 6), 3)]
    sleeping = asyncio.get_running_loop().create_task(server.sleep())
    await settled()
    assert not sleeping.done(), "it waits for what runs"
    engine.desks[0].answer()
    await sleeping
    for task in (first, second):
        output = await task
        assert (output.token_ids, output.log_probs) == ([1, 2], [-1.0, -2.0])
        assert output.stop_reason == "completed"
    assert engine.did[2:] == ["closed a desk", "sleep 2"]
    await server.wake_up(["weights"])
    assert await server.begin_update() == "target"
    await server.abandon_update("target")
    await server.finish_update("target", 4)
    await server.resume_kv_cache()
    expected = ["wake ['weights']", "update within 9.0", "abandoned"]
    assert engine.did[4:] == [*expected, "wake ['kv_cache']"]
    third = asked(server)
    await settled()
    engine.desks[1].answer()
    assert (await third).extra_fields["global_steps"] == 4
    await server.set_global_steps(5)
    await server.release_kv_cache()
    await server.wait_for_requests_to_drain()
    assert engine.did[-2:] == ["sleep 1", "wake ['weights']"], "they are kept"


async def test_a_request_that_begins_as_the_last_one_ends_is_waited_for(server):
    engine = server._get()
    first = asked(server)
    await settled()
    sleeping = asyncio.get_running_loop().create_task(server.sleep())
    await settled()
    engine.desks[0].answer()
    second = asked(server)  # it begins between the first one's end and who waits for it
    await settled()
    assert not sleeping.done(), "something runs"
    engine.desks[0].answer()
    await sleeping
    assert [(await each).stop_reason for each in (first, second)] == ["completed"] * 2


async def test_aborted_requests_keep_their_tokens_and_later_ones_wait(server):
    running = asked(server)
    await settled()
    assert (await server.abort_all_requests())["aborted_count"] == 1
    assert ((await running).stop_reason, (await running).token_ids) == (
        "aborted",
        [1, 2],
    )
    later = asked(server)
    await settled()
    assert not later.done()
    await server.resume_generation()
    await settled()
    server._get().desks[-1].answer()
    assert (await later).stop_reason == "completed"


async def test_images_go_along_and_their_token_is_not_generated(server):
    for images in (["one", "two"], [], None):
        asking = server.generate([5, 7], {}, "id", image_data=images)
        task = asyncio.get_running_loop().create_task(asking)
        await settled()
        (desk,) = server._get().desks
        desk.answer()
        assert (await task).token_ids == [1, 2]
    assert desk.asked == [(["one", "two"], {7: -1e20}), (None, None), (None, None)]


async def test_what_the_engine_refuses_is_an_error_of_the_request(server):
    with pytest.raises(ConfigError, match="not video and audio"):
        await server.generate([5], {}, "id", video_data=["one"])
    with pytest.raises(ConfigError, match="'kv_transfer_params'"):
        await server.generate([5], {}, "id", kv_transfer_params={"a": 1})
    bad = asked(server)
    await settled()
    server._get().desks[-1].answer("error")
    with pytest.raises(RolloutError, match="it is bad"):
        await bad
