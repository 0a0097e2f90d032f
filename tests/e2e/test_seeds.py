"""Seeded samples stay the same whatever else the engines compute."""

from __future__ import annotations

import aseer
from tests.e2e.tiny import by_request, tiny_config

STEP_TOKENS = 48  # that an engine computes at a time


def test_a_prompt_computed_in_parts_changes_no_seeded_sample():
    """vLLM samples after each part, takes it back, and dies of that on a CPU."""
    groups = [
        aseer.Group(
            [5 + (i + j) % 90 for j in range(100 + 60 * i)],
            n=1,
            group_id=f"g{i}",
            sampling={"max_tokens": 40, "ignore_eos": True, "seed": i},
        )
        for i in range(4)
    ]
    config = tiny_config(
        num_instances=1,
        chunk_size=16,
        engine_args={"max_num_batched_tokens": STEP_TOKENS},
    )
    with aseer.Engine(config) as engine:
        in_parts = by_request(list(engine.rollout_sync(groups)))
        # One at a time, with the prompt's KV there but for less than a step's tokens.
        whole = [r for group in groups for r in engine.rollout_sync([group])]
    for response in whole:
        assert response.finish_reason == "length"
        assert in_parts[response.request_id].token_ids == response.token_ids
