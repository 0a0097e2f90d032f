"""Models that are not shaped like Llama keep the invariants, family by family.

References are undivided runs of the same engine under another weight version, with
which they find nothing of each other's KV, and what transformers generates.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aseer
from tests.e2e.families import family_model, greedy
from tests.e2e.tiny import by_request, next_version, same, tiny_config, undivided

if TYPE_CHECKING:
    from collections.abc import Iterator

GREEDY = {"temperature": 0.0, "ignore_eos": True}
slow = pytest.mark.slow

# Families whose layers do not all keep every token's KV, one engine each.
MIXED = [
    pytest.param("gemma3_text", marks=slow),
    pytest.param("gemma2", marks=slow),
    pytest.param("gpt_oss", marks=slow),
    pytest.param("mistral", marks=slow),
    pytest.param("granitemoehybrid", marks=slow),
    pytest.param("qwen3_next", marks=slow),
]
# Room for some ten requests of 400 tokens, counted group by group, and for about twice
# as many if one group were all there is.
KV_CACHE_BYTES = {
    "gemma3_text": 12 << 20,
    "gemma2": 10 << 20,
    "gpt_oss": 10 << 20,
    "mistral": 8 << 20,
    "granitemoehybrid": 10 << 20,
    "qwen3_next": 5 << 20,
}
STEP_TOKENS = 128  # that an engine computes at a time
# Of these, what was compared with transformers, after new weights.
TRIED = {"gemma3_text", "gemma2", "mistral", "granitemoehybrid"}
# Of these, what moves and is drafted for, by computing prefixes again, on engines.
MOVED = ["gemma2", "gpt_oss"]
# With two threads a CPU's sums round by how the batch is split between them.
ONE_CORE = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
# vLLM computes this family's linear attention on a CPU in bfloat16 only.
DTYPES = {"qwen3_next": "bfloat16"}
# Mixtures of experts, with latent attention and without.
EXPERTS = ["deepseek_v3", pytest.param("qwen3_moe", marks=slow)]
# The last bits differ by a batch's other rows, and where KV was computed again.
ROUNDING = 5e-5


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


def equals_transformers(engine: aseer.Engine, seed: int) -> None:
    """Greedy responses are those of transformers, beside others as alone."""
    groups = groups_of(4, 24)
    responses = by_request(list(engine.rollout_sync(groups)))
    model = family_model(family_of(engine), seed)
    expected = greedy(model, [list(group.prompt) for group in groups], 24)
    for group, (tokens, logprobs) in zip(groups, expected, strict=True):
        response = responses[f"{group.group_id}/0"]
        assert response.token_ids == tokens
        assert response.logprobs == pytest.approx(logprobs, abs=1e-4)


def new_weights_reach_every_layer(engine: aseer.Engine) -> None:
    """Those of another seed by a trainer's names, and the first ones, a checkpoint."""
    from transformers import AutoModelForCausalLM

    directories = {seed: family_model(family_of(engine), seed) for seed in (1, 0)}
    trained = AutoModelForCausalLM.from_pretrained(directories[1], dtype="float32")
    engine.update_weights_sync(trained.state_dict())
    equals_transformers(engine, 1)
    engine.update_weights_sync(directories[0])
    equals_transformers(engine, 0)


def family_of(engine: aseer.Engine) -> str:
    return str(engine.config.model).split("-")[-2]


@pytest.fixture(scope="module", params=MIXED)
def mixed(request: pytest.FixtureRequest) -> Iterator[aseer.Engine]:
    config = tiny_config(
        model=family_model(request.param),
        dtype=DTYPES.get(request.param, "float32"),
        num_instances=1,
        chunk_size=64,
        kv_cache_bytes=KV_CACHE_BYTES[request.param],
        engine_args={"max_num_batched_tokens": STEP_TOKENS},
        env=ONE_CORE,
    )
    with aseer.Engine(config) as engine:
        yield engine


def test_a_resume_computes_one_token_and_changes_nothing(mixed):
    groups = groups_of(2, 300)
    expected = undivided(mixed, groups)
    rollout = mixed.rollout_sync(groups)
    found = by_request(list(rollout))
    same(found, expected)
    assert min(r.metrics.num_chunks for r in found.values()) >= 2
    assert rollout.report.num_recomputed_tokens == 0


def test_no_admitted_chunk_is_preempted_when_kv_is_short(mixed):
    next_version(mixed)
    rollout = mixed.rollout_sync(groups_of(32, 400), chunk_size=0)
    assert {r.finish_reason for r in rollout} == {"length"}
    report = rollout.report
    assert report.num_preemptions == 0
    most_used = max(sample.kv_used for sample in report.timeline)
    assert most_used > 0.5, "and the room there is is used"


def test_new_weights_reach_every_layer_of_a_mixed_model(mixed):
    if family_of(mixed) not in TRIED:
        pytest.skip("not tried with this family")
    new_weights_reach_every_layer(mixed)


def test_a_prompt_computed_in_parts_changes_no_seeded_sample(mixed):
    """vLLM samples after each part, takes it back, and dies of that on a CPU."""
    groups = [
        aseer.Group(
            [5 + (i + j) % 80 for j in range(100 + 60 * i)],
            n=1,
            group_id=f"g{i}",
            sampling={"max_tokens": 40, "ignore_eos": True, "seed": i},
        )
        for i in range(4)
    ]
    assert sum(len(g.prompt) for g in groups) > 4 * STEP_TOKENS
    in_parts = by_request(list(mixed.rollout_sync(groups, chunk_size=16)))
    # One at a time, with the prompt's KV there but for less than a step's tokens.
    whole = [r for g in groups for r in mixed.rollout_sync([g], chunk_size=16)]
    for response in whole:
        assert response.finish_reason == "length"
        assert in_parts[response.request_id].token_ids == response.token_ids


@slow
@pytest.mark.parametrize("family", MOVED)
@pytest.mark.usefixtures("engines_in_turn")
def test_requests_of_mixed_models_hop_and_draft_and_nothing_changes(family):
    config = tiny_config(
        model=family_model(family),
        num_instances=2,
        max_num_seqs=8,
        chunk_size=64,
        kv_cache_bytes=64 << 20,
        speculation="dgds",
    )
    with aseer.Engine(config) as engine:
        groups = groups_of(3, 400, n=3)
        expected = undivided(engine, groups)
        rollout = engine.rollout_sync(groups)
        same(by_request(list(rollout)), expected, rounding=ROUNDING)
    report = rollout.report
    assert report.num_migrations > 9
    assert sum(report.speculation.accepted) > 10
    assert report.num_preemptions == 0


def has_latent_attention_on_a_cpu() -> bool:
    """Whether vLLM does; 0.27 and older do not."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    backends = Path(spec.origin).parent / "v1" / "attention" / "backends"
    return (backends / "mla" / "cpu_mla.py").is_file()


@pytest.fixture(scope="module", params=EXPERTS)
def experts(request: pytest.FixtureRequest) -> Iterator[aseer.Engine]:
    pytest.importorskip("lmcache")
    if request.param == "deepseek_v3" and not has_latent_attention_on_a_cpu():
        pytest.skip("this vLLM has no latent attention on a CPU")
    config = tiny_config(
        model=family_model(request.param),
        num_instances=2,
        max_num_seqs=8,
        chunk_size=64,
        kv_cache_bytes=64 << 20,
        kv_pool=aseer.KvPoolConfig(
            mode="lmcache", chunk_tokens=64, dram_bytes=256 << 20
        ),
        speculation="dgds",
    )
    with aseer.Engine(config) as engine:
        yield engine


def test_experts_compute_what_transformers_does(experts):
    equals_transformers(experts, seed=0)


@pytest.mark.usefixtures("engines_in_turn")
def test_experts_requests_hop_and_draft_and_nothing_changes(experts):
    groups = groups_of(3, 260, n=3)
    expected = undivided(experts, groups)
    rollout = experts.rollout_sync(groups)
    same(by_request(list(rollout)), expected, rounding=ROUNDING)
    report = rollout.report
    assert report.num_migrations > 12
    assert report.kv.num_moves_found > 12, "of the pool's KV"
    assert sum(report.speculation.accepted) > 10
    assert report.num_preemptions == 0


@pytest.mark.slow
def test_new_weights_reach_every_layer_of_experts(experts):
    new_weights_reach_every_layer(experts)
