"""A program that uses the public names, as a trainer's author would write it. It is
checked, never run: each `assert_type` is what the author's editor should show.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import aseer
import aseer.display
import aseer.plot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


def score(response: aseer.Response) -> float:
    assert_type(response.token_ids, list[int])
    assert_type(response.logprobs, list[float])
    assert_type(response.text, str)
    assert_type(response.request_id, str)
    assert_type(response.weight_version, int)
    assert_type(response.metrics, aseer.RequestMetrics)
    assert_type(response.metrics.num_chunks, int)
    return float(response.finish_reason == "stop")


def make_config() -> aseer.EngineConfig:
    return aseer.EngineConfig(
        model="Qwen/Qwen3-8B",
        num_instances=2,
        sampling=aseer.SamplingParams(temperature=0.8, max_tokens=64),
        speculation=aseer.SpeculationConfig(method="dgds", max_draft_tokens=4),
        kv_pool=aseer.KvPoolConfig(mode="auto", dram_bytes=1 << 30),
        engine_args={"block_size": 32},
    )


def look_at(folder: Path) -> None:
    """Settings are read as what they are kept as, however they are given."""
    config = aseer.EngineConfig(
        model=folder,
        gpus=[0, "1"],
        speculation="dgds",
        kv_pool={"mode": "off"},
        log_dir="logs",
    )
    assert_type(config.gpus, tuple[str, ...] | None)
    assert_type(config.speculation, aseer.SpeculationConfig)
    assert_type(config.kv_pool, aseer.KvPoolConfig)
    assert_type(config.log_dir, Path | None)


async def refill() -> AsyncIterator[aseer.Group]:
    yield aseer.Group("a text", n=2, sampling={"temperature": 1.0})
    yield aseer.Group([1, 2, 3], metadata={"answer": 4})
    yield aseer.Group([{"role": "user", "content": "a chat"}])


async def train(policy: object) -> None:
    async with aseer.Engine(make_config()) as engine:
        async with engine.rollout(refill(), chunk_size=256) as rollout:
            assert_type(rollout, aseer.Rollout)
            async for response in rollout:
                assert_type(response, aseer.Response)
                assert_type(score(response), float)
        assert_type(rollout.report, aseer.RolloutReport)
        assert_type(rollout.report.tail_s, float)
        aseer.plot.timeline(rollout.report, "timeline.png")
        async with engine.rollout([aseer.Group("again")]) as rollout:
            with aseer.display.Live(rollout):
                async for members in rollout.by_group():
                    assert_type(members, list[aseer.Response])
        async with engine.open_rollout() as desk:
            assert_type(await desk.submit("one", group="g", n=2), aseer.Response)
        update = await engine.update_weights(policy, version=3)
        assert_type(update, aseer.WeightUpdateReport)
        await engine.abort_rollout()


def groups() -> Iterator[aseer.Group]:
    yield aseer.Group("a text")


def train_without_a_loop() -> None:
    with aseer.Engine(make_config()) as engine:
        with engine.rollout_sync(groups()) as rollout:
            assert_type(rollout, aseer.SyncRollout)
            for response in rollout:
                assert_type(response, aseer.Response)
        assert_type(engine.update_weights_sync("dir"), aseer.WeightUpdateReport)
        assert_type(rollout.progress(), aseer.Progress | None)
