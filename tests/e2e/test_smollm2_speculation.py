"""Speculation with a real language model changes nothing of what is sampled (I2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.data import load_prompts
from aseer.models import smollm2
from tests.e2e.distributions import assert_alike
from tests.e2e.tiny import by_request

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# By the shape of the batch the last bits of a matrix product differ, and drafts change
# the shape. (Seen: 2.1e-5.)
ROUNDING = 5e-5


def config(**settings: Any) -> aseer.EngineConfig:
    return aseer.EngineConfig(
        model=smollm2.prepare(dtype="float32"),
        device="cpu",
        dtype="float32",
        max_model_len=512,
        kv_cache_bytes=512 << 20,
        start_timeout_s=400.0,
        kv_pool="off",
        **settings,
    )


@pytest.fixture(scope="module")
def plain() -> Iterator[aseer.Engine]:
    with aseer.Engine(config(num_instances=1, chunk_size=0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def drafting() -> Iterator[aseer.Engine]:
    every_draft = aseer.SpeculationConfig(budget="fixed", max_draft_tokens=4)
    settings = config(num_instances=2, chunk_size=32, speculation=every_draft)
    with aseer.Engine(settings) as engine:
        yield engine


def groups_of(num_prompts: int, n: int, **sampling: Any) -> list[aseer.Group]:
    return [
        aseer.Group(record.messages, n=n, group_id=record.id, sampling=sampling)
        for record in load_prompts()[:num_prompts]
    ]


@pytest.mark.usefixtures("always_migrate")
def test_greedy_responses_are_those_without_speculation(plain, drafting):
    groups = groups_of(6, 4, temperature=0.0, max_tokens=100)
    expected = by_request(list(plain.rollout_sync(groups)))
    rollout = drafting.rollout_sync(groups)
    found = by_request(list(rollout))
    assert found.keys() == expected.keys()
    for request_id, response in found.items():
        reference = expected[request_id]
        assert response.token_ids == reference.token_ids
        assert response.text == reference.text
        assert response.logprobs == pytest.approx(reference.logprobs, abs=ROUNDING)
    assert rollout.report.num_migrations >= 8
    assert rollout.report.speculation.acceptance_length > 1.1


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_responses_are_distributed_as_without(plain, drafting, temperature):
    groups = groups_of(32, 8, temperature=temperature, top_p=0.9, max_tokens=192)
    one = list(plain.rollout_sync(groups))
    other = list(drafting.rollout_sync(groups))
    assert len(other) == 256
    assert sum(len(r.token_ids) for r in other) > 20_000
    assert_alike(one, other)
