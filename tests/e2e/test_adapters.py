"""Adapters sent alone: engines compute with them what merged weights compute."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.kv.pool import KvPool
from aseer.runtime.followers import KvUpkeep
from aseer.weights.adapters import merged_weights
from tests.e2e.tiny import by_request, same, tiny_config, tiny_model, undivided

if TYPE_CHECKING:
    from collections.abc import Iterator

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow
ROUNDING = 1e-4  # sums in another order
GREEDY = {"temperature": 0.0, "max_tokens": 150, "ignore_eos": True}
# Longer than a KV block, and the same in every rollout: old KV would be found.
GROUPS = [
    aseer.Group(
        [5 + i + k % 90 for k in range(70)], n=2, sampling=GREEDY, group_id=f"g{i}"
    )
    for i in range(3)
]


def policy(seed: int, **settings: Any) -> Any:
    """A PEFT model of the tiny model, whose adapters change what it generates."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    settings = {"r": 8, "target_modules": "all-linear"} | settings
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the factors A are drawn, too
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / 16)
    return model


def merged(model: Any) -> dict[str, Any]:
    return dict(merged_weights(model))


# A sibling's KV, which is the same here, would be on the other engine already.
ALONE = [
    aseer.Group(g.prompt, n=1, sampling=GREEDY, group_id=g.group_id) for g in GROUPS
]


def roll(
    engine: aseer.Engine, groups: list[aseer.Group] = GROUPS
) -> dict[str, aseer.Response]:
    return by_request(list(engine.rollout_sync(groups)))


def tokens(responses: dict[str, aseer.Response]) -> dict[str, list[int]]:
    return {name: response.token_ids for name, response in responses.items()}


@pytest.fixture(scope="module")
def engine() -> Iterator[aseer.Engine]:
    config = tiny_config(
        num_instances=1, chunk_size=64, max_lora_rank=8, speculation="dgds"
    )
    with aseer.Engine(config) as engine:
        yield engine


def test_adapters_compute_what_merged_weights_do(engine: aseer.Engine) -> None:
    before = roll(engine)
    found = []
    for model in (policy(1), policy(2, target_modules=["q_proj", "down_proj"])):
        report = engine.update_weights_sync(model)
        whole = sum(p.numel() * 4 for p in model.get_base_model().parameters())
        assert report.num_bytes < whole / 4
        expected = undivided(engine, GROUPS)
        rollout = engine.rollout_sync(GROUPS)
        found.append(by_request(list(rollout)))
        same(found[-1], expected, rounding=ROUNDING)
        assert rollout.report.num_recomputed_tokens == 0
        assert sum(rollout.report.speculation.accepted) > 0
        engine.update_weights_sync(merged(model))
        same(roll(engine), found[-1], rounding=ROUNDING)
        engine.update_weights_sync(tiny_model())
    assert tokens(before) != tokens(found[0]) != tokens(found[1])
    engine.update_weights_sync(policy(1))
    engine.update_weights_sync(tiny_model())
    same(roll(engine), before, rounding=ROUNDING)


def test_an_instance_that_starts_has_the_adapters_of_the_moment(
    engine: aseer.Engine,
) -> None:
    engine.update_weights_sync(merged(policy(3)))
    engine.update_weights_sync(policy(1))
    expected = roll(engine)
    (before,) = engine.instances
    os.kill(before.pid, signal.SIGKILL)
    deadline = time.monotonic() + 200
    while not engine.instances or engine.instances[0].pid == before.pid:
        assert time.monotonic() < deadline, "it did not come back"
        time.sleep(0.05)
    same(roll(engine), expected, rounding=ROUNDING)


def test_adapters_that_vllm_refuses_change_nothing(engine: aseer.Engine) -> None:
    expected, version = roll(engine), engine.weight_version
    with pytest.raises(aseer.WeightUpdateError, match=r"rank 16, .* started for 8"):
        engine.update_weights_sync(policy(1, r=16))
    assert engine.weight_version == version
    same(roll(engine), expected, rounding=ROUNDING)


@pytest.mark.usefixtures("always_migrate")
def test_kv_of_old_adapters_in_the_pool_is_never_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lmcache")
    monkeypatch.setattr(KvUpkeep, "finished", lambda *_: None)  # all of it stays hot
    monkeypatch.setattr(KvPool, "drop_older", _do_nothing)
    config = tiny_config(
        num_instances=2,
        chunk_size=64,
        max_lora_rank=8,
        kv_pool=aseer.KvPoolConfig(mode="lmcache", chunk_tokens=64),
    )
    with aseer.Engine(config) as engine:
        roll(engine, ALONE)
        responses = []
        for seed in (1, 2):
            engine.update_weights_sync(policy(seed))
            rollout = engine.rollout_sync(ALONE)
            responses.append(by_request(list(rollout)))
            assert rollout.report.kv.num_loads > 0, "of what these adapters made"
        for seed, found in zip((1, 2), responses, strict=True):
            engine.update_weights_sync(merged(policy(seed)))
            same(found, roll(engine, ALONE), rounding=ROUNDING)
        assert tokens(responses[0]) != tokens(responses[1])


async def _do_nothing(*_: object) -> None:
    pass
