"""I2 with a real language model: chunks that move between engines change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import aseer
from aseer.data import load_prompts
from aseer.models import smollm2
from tests.e2e.tiny import by_request

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

# An engine's matrix products round by the shape of the batch, divided or not: a prefix
# that is computed again in one step has other last bits than one that grew token by
# token.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def engine() -> Iterator[aseer.Engine]:
    config = aseer.EngineConfig(
        model=smollm2.prepare(dtype="float32"),
        device="cpu",
        dtype="float32",
        num_instances=2,
        max_model_len=512,
        max_num_seqs=16,
        kv_cache_bytes=512 << 20,
        chunk_size=32,
        start_timeout_s=400.0,
        kv_pool="off",
    )
    with aseer.Engine(config) as engine:
        yield engine


@pytest.mark.usefixtures("always_migrate")
def test_divided_and_migrating_equals_undivided(engine):
    groups = [
        aseer.Group(
            record.messages,
            n=2,
            group_id=record.id,
            sampling={"temperature": 0.0, "max_tokens": 100},
        )
        for record in load_prompts()[:6]
    ]
    undivided = engine.rollout_sync(groups, chunk_size=0, policy="group-round-robin")
    expected = by_request(list(undivided))
    divided = engine.rollout_sync(groups)
    for response in divided:
        reference = expected.pop(response.request_id)
        assert response.token_ids == reference.token_ids
        assert response.logprobs == pytest.approx(reference.logprobs, abs=ROUNDING)
        assert response.text == reference.text
        assert response.stop_reason == reference.stop_reason
    assert not expected
    assert undivided.report.num_migrations == 0
    assert divided.report.num_migrations >= 8
    assert divided.report.num_recomputed_tokens > 0
