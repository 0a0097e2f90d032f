"""Prompts with images: divided and moved, they are answered as undivided ones."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import aseer
from aseer.errors import ConfigError
from aseer.integrations.verl_server import AseerServer
from aseer.integrations.verl_settings import ServerSettings
from tests.e2e.tiny import by_request, same, tiny_config, undivided
from tests.e2e.vision import (
    END,
    IMAGE,
    START,
    needs_torchvision,
    seen_greedy,
    vision_env,
    vision_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_torchvision()

pytestmark = pytest.mark.slow

MODELS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
POOLED = "qwen2_vl"
ROUNDING = 5e-5  # of what is computed again in one step
# Policies do not sample signs of images, nor do trainers train them.
GREEDY = {
    "temperature": 0.0,
    "ignore_eos": True,
    "allowed_token_ids": list(range(3, START)),
}


def image(seed: int, height: int = 112, width: int = 168) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (height, width, 3), dtype=np.uint8)


def prompt(seed: int, num_images: int = 1) -> list[int]:
    rng = random.Random(seed)
    ids = [rng.randrange(3, 90) for _ in range(20)]
    for _ in range(num_images):
        ids += [START, IMAGE, END, *(rng.randrange(3, 90) for _ in range(10))]
    return ids


def group(name: str, ids: Any, images: list[Any], **settings: Any) -> aseer.Group:
    sampling = GREEDY | {"max_tokens": settings.pop("max_tokens", 200)}
    return aseer.Group(
        ids, images=images, group_id=name, sampling=sampling, **{"n": 2} | settings
    )


@pytest.fixture(scope="module", params=MODELS)
def seeing(request: pytest.FixtureRequest) -> Iterator[aseer.Engine]:
    config = tiny_config(
        model=vision_model(request.param),
        num_instances=2,
        max_num_seqs=8,
        chunk_size=64,
        kv_cache_bytes=64 << 20,
        engine_args={"limit_mm_per_prompt": {"image": 2, "video": 0}},
        env=vision_env(),
    )
    with aseer.Engine(config) as engine:
        yield engine


GROUPS = [
    group("one", prompt(1), [image(1)]),
    group("other", prompt(1), [image(2)]),
    group("two", prompt(2, 2), [image(1), image(3, 56, 224)]),
    group("text", prompt(3, 0), []),
]


def test_divided_prompts_with_images_are_answered_as_undivided_ones(
    seeing: aseer.Engine,
) -> None:
    expected = undivided(seeing, GROUPS)
    assert expected["one/0"].token_ids != expected["other/0"].token_ids
    rollout = seeing.rollout_sync(GROUPS)
    found = by_request(list(rollout))
    same(found, expected, rounding=ROUNDING)
    assert min(r.metrics.num_chunks for r in found.values()) >= 3
    stayed = {i: r for i, r in found.items() if not r.metrics.num_migrations}
    assert len(stayed) >= 4
    same(stayed, {i: expected[i] for i in stayed})
    assert not any(r.metrics.num_recomputed_tokens for r in stayed.values())
    for response in found.values():
        (given,) = (g for g in GROUPS if g.group_id == response.group_id)
        unexpanded = response.unexpanded_prompt_token_ids
        assert unexpanded == (list(given.prompt) if given.images else None)
        assert len(response.prompt_token_ids) > len(given.prompt) or not given.images


@pytest.mark.usefixtures("engines_in_turn")
def test_requests_with_images_hop_and_nothing_changes(seeing: aseer.Engine) -> None:
    expected = undivided(seeing, GROUPS)
    rollout = seeing.rollout_sync(GROUPS)
    same(by_request(list(rollout)), expected, rounding=ROUNDING)
    assert rollout.report.num_migrations > 8


def test_every_form_of_a_prompt_is_answered_alike(seeing: aseer.Engine) -> None:
    ids = [*range(5, 9), START, IMAGE, END, *range(9, 14)]
    (first,) = seeing.rollout_sync([group("a", ids, [image(4)], n=1, max_tokens=20)])
    tokenizer = seeing._tokenizer
    before, after = (tokenizer._tokenizer.decode(part) for part in (ids[:4], ids[7:]))
    text = f"{before}<|vision_start|><|image_pad|><|vision_end|>{after}"
    content = [
        {"type": "text", "text": before},
        {"type": "image", "image": image(4)},
        {"type": "text", "text": after},
    ]
    rollout = seeing.rollout_sync(
        [
            group("expanded", first.prompt_token_ids, [image(4)], n=1, max_tokens=20),
            group("text", text, [image(4)], n=1, max_tokens=20),
            group("chat", [{"role": "user", "content": content}], [], n=1),
        ]
    )
    found = {response.group_id: response for response in rollout}
    for name in ("expanded", "text"):
        assert found[name].prompt_token_ids == first.prompt_token_ids
        assert found[name].token_ids == first.token_ids
        assert found[name].logprobs == first.logprobs
    assert found["chat"].prompt_token_ids == first.prompt_token_ids


def test_bad_images_are_refused_with_the_groups_name(seeing: aseer.Engine) -> None:
    with pytest.raises(ConfigError, match=r"group 'bad': images\[0\]: .* no image"):
        seeing.rollout_sync([group("bad", prompt(1), [b"nothing"])])
    with pytest.raises(ConfigError, match=r"group 'many': it has 3 images, .* have 2"):
        seeing.rollout_sync([group("many", prompt(1, 3), [image(1)] * 3)])


def test_nothing_is_left_of_an_image_whose_group_is_over(seeing: aseer.Engine) -> None:
    responses = list(seeing.rollout_sync([group("a", prompt(1), [image(9)])]))
    assert {r.finish_reason for r in responses} == {"length"}
    assert seeing._host.image_store.keys == set()


def test_new_weights_reach_what_sees(seeing: aseer.Engine) -> None:
    """Those of another seed by a trainer's names, and the first ones, a checkpoint."""
    from transformers import AutoModelForImageTextToText

    kind = str(seeing.config.model).split("-")[-2]
    ids, picture = prompt(1), image(1)
    for seed in (0, 1, 0):
        model = vision_model(kind, seed)
        if seed:
            trained = AutoModelForImageTextToText.from_pretrained(
                model, dtype="float32"
            )
            seeing.update_weights_sync(trained.state_dict())
        elif seeing.weight_version:
            seeing.update_weights_sync(model)
        groups = [group("a", ids, [picture], n=1, max_tokens=24)]
        (response,) = seeing.rollout_sync(groups)
        assert response.token_ids == seen_greedy(model, ids, picture, 24), seed


@pytest.mark.usefixtures("engines_in_turn")
def test_requests_with_images_take_their_kv_along_and_draft() -> None:
    """Prompts of equal ids and other images find only their own, of both."""
    pytest.importorskip("lmcache")
    config = tiny_config(
        model=vision_model(POOLED),
        num_instances=2,
        max_num_seqs=8,
        chunk_size=64,
        kv_cache_bytes=64 << 20,
        kv_pool=aseer.KvPoolConfig(
            mode="lmcache", chunk_tokens=64, dram_bytes=256 << 20
        ),
        speculation="dgds",
        env=vision_env(),
    )
    groups = [
        group("one", prompt(1), [image(1)], n=3, max_tokens=260),
        group("other", prompt(1), [image(2)], n=3, max_tokens=260),
    ]
    with aseer.Engine(config) as engine:
        expected = undivided(engine, groups)
        rollout = engine.rollout_sync(groups)
        same(by_request(list(rollout)), expected, rounding=ROUNDING)
    assert expected["one/0"].token_ids != expected["other/0"].token_ids
    report = rollout.report
    assert report.num_migrations > 8
    assert report.kv.num_moves_found > 8, "of the pool's KV"
    assert sum(report.speculation.accepted) > 10


async def test_verls_server_samples_what_a_rollout_does() -> None:
    """Requests come one by one, their prompts expanded, as verl makes them."""
    config = tiny_config(model=vision_model(POOLED), kv_cache_bytes=64 << 20)
    names = ("model", "device", "dtype", "max_model_len", "kv_cache_bytes")
    engine: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings = ServerSettings(
        engine=engine
        | {"num_instances": 1, "kv_pool": "off", "chunk_size": 64, "env": vision_env()}
        | {"engine_args": {"limit_mm_per_prompt": {"image": 2, "video": 0}}},
        group_size=2,
        prompt_length=400,
        response_length=100,
        sampling={},
        sleeps=False,
    )
    server = AseerServer(settings)
    await server.start()
    try:
        groups = [group(f"{i}", prompt(1), [image(i)], max_tokens=100) for i in (1, 2)]
        expected = {r.request_id: r async for r in server._get().rollout(groups)}
        asked = [f"{i}/{k}" for i in (1, 2) for k in (0, 1)]
        outputs = await asyncio.gather(
            *(
                server.generate(
                    expected[name].prompt_token_ids,
                    GREEDY | {"logprobs": True, "max_tokens": 100},
                    image_data=[image(int(name[0]))],
                )
                for name in asked
            )
        )
    finally:
        await server.stop()
    assert expected["1/0"].token_ids != expected["2/0"].token_ids
    for name, output in zip(asked, outputs, strict=True):
        assert output.token_ids == expected[name].token_ids
        logprobs = expected[name].logprobs
        assert output.log_probs == pytest.approx(logprobs, abs=ROUNDING)
