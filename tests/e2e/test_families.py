"""Models that are not shaped like Llama keep the invariants, family by family.

References are undivided runs of the same engine under another weight version, with
which they find nothing of each other's KV.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

import aseer
from tests.e2e.families import family_model
from tests.e2e.tiny import by_request, same, tiny_config, undivided

if TYPE_CHECKING:
    from collections.abc import Iterator

GREEDY = {"temperature": 0.0, "ignore_eos": True}
slow = pytest.mark.slow

# Families whose layers do not all keep every token's KV, one engine each: sliding
# windows beside full attention, sliding windows alone, and recurrent states.
MIXED = [
    "gemma3_text",
    pytest.param("gemma2", marks=slow),
    pytest.param("gpt_oss", marks=slow),
    pytest.param("mistral", marks=slow),
    pytest.param("granitemoehybrid", marks=slow),
    pytest.param("qwen3_next", marks=slow),
]
# With two threads a CPU's sums round by how the batch is split between them.
ONE_CORE = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
# vLLM computes this family's linear attention on a CPU in bfloat16 only.
DTYPES = {"qwen3_next": "bfloat16"}


def groups_of(num: int, max_tokens: int, n: int = 1) -> list[aseer.Group]:
    """Groups with prompts of 20 to 80 tokens."""
    rng = random.Random(7)
    return [
        aseer.Group(
            [rng.randrange(3, 90) for _ in range(rng.randrange(20, 80))],
            n=n,
            group_id=f"g{i}",
            sampling=GREEDY | {"max_tokens": max_tokens},
        )
        for i in range(num)
    ]


@pytest.fixture(scope="module", params=MIXED)
def mixed(request: pytest.FixtureRequest) -> Iterator[aseer.Engine]:
    config = tiny_config(
        model=family_model(request.param),
        dtype=DTYPES.get(request.param, "float32"),
        num_instances=1,
        max_num_seqs=8,
        chunk_size=64,
        kv_cache_bytes=64 << 20,
        env=ONE_CORE,
    )
    with aseer.Engine(config) as engine:
        yield engine


def test_a_resume_computes_one_token_and_changes_nothing(mixed):
    groups = groups_of(3, 400)
    expected = undivided(mixed, groups)
    rollout = mixed.rollout_sync(groups)
    found = by_request(list(rollout))
    same(found, expected)
    report = rollout.report
    assert min(r.metrics.num_chunks for r in found.values()) >= 3
    assert report.num_recomputed_tokens == 0
    assert report.num_preemptions == 0
