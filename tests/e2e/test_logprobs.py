"""A logprob that is no number ends its request, and no other."""

from __future__ import annotations

import math

import pytest

import aseer
from aseer.errors import RolloutError
from tests.e2e.tiny import tiny_config

ONLY_STOP = 5


def test_a_token_without_a_logprob_is_an_error_and_not_a_sample():
    # At first the only token that is allowed may not be sampled yet.
    none_left = {
        "allowed_token_ids": [ONLY_STOP],
        "stop_token_ids": [ONLY_STOP],
        "min_tokens": 4,
        "max_tokens": 8,
    }
    groups = [
        aseer.Group([5, 6, 7], n=2, sampling=none_left, group_id="bad"),
        aseer.Group([5, 6, 7], n=2, sampling={"max_tokens": 8}, group_id="good"),
    ]
    responses = []
    with aseer.Engine(tiny_config(num_instances=1)) as engine:
        with pytest.raises(RolloutError, match=r"2 of 4 requests .*logprob"):
            for response in engine.rollout_sync(groups):
                responses.append(response)
        assert len(list(engine.rollout_sync(groups[1:]))) == 2, "the engine goes on"
    for response in responses:
        assert all(map(math.isfinite, response.logprobs))
        if response.group_id == "bad":
            assert response.finish_reason == "error"
            assert "leave no token that may be sampled" in str(response.error)
        else:
            assert response.finish_reason in ("stop", "length")
