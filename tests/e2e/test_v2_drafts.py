"""Drafts by group on the model runner of GPUs, V2, with a scheduler that is ahead."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from tests.e2e.distributions import exact, p_value
from tests.e2e.tiny import by_request, next_version, tiny_config, tiny_model
from tests.e2e.v2.runner import environment, v2_config

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.v2, pytest.mark.timeout(900)]

GREEDY = {"temperature": 0.0, "max_tokens": 70}
# What else goes through the sampler that verifies.
SETTINGS: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {"min_tokens": 50},
    {"repetition_penalty": 1.2},
    {"structured_outputs": {"regex": "[a-f]{20}[0-9]{20}"}},
]
GROUPS = [
    aseer.Group(
        [5, 6, 7 + i] * (1 + 5 * i),
        n=6,  # most wait until others have finished, and draft from those
        sampling=GREEDY | settings,
        group_id=f"g{i}",
    )
    for i, settings in enumerate(SETTINGS)
]
MAX_DRAFT_TOKENS = 4
# Two, so that every response that there can be is drawn often enough to be counted.
ALLOWED = [42, 103]
LENGTH = 6
NUM_DRAWN = 400
TEMPERATURE = 2.0

SAMPLERS = """
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
import vllm.v1.worker.cpu.shm
import torch
import vllm_on_cpu
vllm_on_cpu.prepare()
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.states import RequestState
from aseer.dgds import sampler, sampler_v2
from aseer.dgds.verifier_v2 import RowVerifier

sampler._MAX_TEST_S = 8.0  # interpreted, it could take minutes
device, drafts = torch.device("cpu"), 4
states = RequestState(24, 64, 64, drafts, 32, device)
plain = Sampler(VllmConfig(), 24, 32, device, states, "processed_logprobs", drafts + 1)
runner = SimpleNamespace(
    max_num_reqs=24, req_states=states, sampler=plain, device=device
)

class Keeps(RowVerifier):
    def __call__(self, logits, batch, *args):
        counts = torch.diff(batch.cu_num_logits)
        return replace(super().__call__(logits, batch), num_sampled=counts)

class Sharpens(RowVerifier):
    def __call__(self, logits, batch, *args):
        return super().__call__(3 * logits, batch)

spec = SimpleNamespace(
    num_speculative_tokens=drafts,
    enable_adaptive_verification=False,
    rejection_sample_method="standard",
)
said = {}
for name, verifier in (
    ("ours", RowVerifier(plain, drafts)),
    ("vllm", RejectionSampler(plain, spec, device)),
    ("keeps", Keeps(plain, drafts)),
    ("sharpens", Sharpens(plain, drafts)),
):
    runner.rejection_sampler = verifier
    said[name] = sampler_v2.test_sampler_v2(runner)

# A seeded row: verified in one step, and token by token without drafts.
torch.manual_seed(0)
logits = torch.randn(4, 32) * 2
verify = RowVerifier(plain, drafts)
agreed = 0
for seed in range(12):
    plain.add_request(0, SamplingParams(temperature=0.9, seed=seed, logprobs=0))
    plain.apply_staged_writes()
    states.prefill_len.np[0] = 1
    one_by_one = []
    for place in range(4):
        batch = sampler_v2._input_batch([], [0], device)
        batch.positions += place
        batch.seq_lens += place
        one_by_one += plain(logits[[place]], batch).sampled_token_ids.view(-1).tolist()
    right = seed % 4  # how many drafts are right
    guess = [t if i < right else (t + 1) % 32 for i, t in enumerate(one_by_one[:3])]
    output = verify(logits, sampler_v2._input_batch(guess, [3], device))
    num = int(output.num_sampled)
    assert num == right + 1, (num, right)
    assert int(output.num_rejected) == 3 - right
    agreed += output.sampled_token_ids[0, :num].tolist() == one_by_one[:num]
said["agreed"] = agreed
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def drafting() -> Iterator[aseer.Engine]:
    # Few at once: most requests draft from what siblings have finished.
    config = v2_config(
        num_instances=2,
        schedules_ahead=True,
        max_num_seqs=2,
        speculation=aseer.SpeculationConfig(
            budget="fixed",
            max_draft_tokens=MAX_DRAFT_TOKENS,
            tail_draft_tokens=MAX_DRAFT_TOKENS,
        ),
    )
    with aseer.Engine(config) as engine:
        yield engine


def test_samplers_of_v2_are_told_from_wrong_ones_and_ours_draws_what_is_drawn_without():
    done = subprocess.run(
        [sys.executable, "-c", SAMPLERS],
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ours"][0], said
    assert said["vllm"][0], said
    assert "were kept" in said["keeps"][3]
    assert "logprobs" in said["sharpens"][3]
    assert said["agreed"] == 12


def test_greedy_responses_are_those_without_speculation(drafting):
    with aseer.Engine(tiny_config(num_instances=1, chunk_size=0)) as plain:
        expected = by_request(list(plain.rollout_sync(GROUPS)))
    rollout = drafting.rollout_sync(GROUPS)
    found = by_request(list(rollout))
    assert found.keys() == expected.keys()
    for request_id, response in found.items():
        other = expected[request_id]
        assert response.finish_reason == other.finish_reason, response.error
        assert response.token_ids == other.token_ids, request_id
        assert response.text == other.text
        assert response.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    speculation = rollout.report.speculation
    assert rollout.report.num_preemptions == 0
    assert speculation.num_drafts > 30
    assert speculation.acceptance_length > 1.3
    assert len(speculation.drafted) <= MAX_DRAFT_TOKENS
    assert 0 < speculation.drafting_share < 1


def test_a_resume_computes_one_token_though_drafts_were_verified(drafting):
    next_version(drafting)
    sampling = GREEDY | {"ignore_eos": True, "max_tokens": 100}
    group = aseer.Group([5, 6, 7] * 8, n=1, sampling=sampling)
    rollout = drafting.rollout_sync([group])
    (response,) = rollout
    assert response.metrics.num_chunks >= 3
    assert response.metrics.num_migrations == 0
    assert response.metrics.num_recomputed_tokens == 0
    assert rollout.report.speculation.num_drafts > 0


@pytest.mark.parametrize(
    ("num_prompt_tokens", "chunk_size", "num_chunks"), [(5, 32, 1), (30, 3, 2)]
)
def test_drawn_responses_have_the_models_own_probabilities(
    drafting, num_prompt_tokens, chunk_size, num_chunks
):
    """Of the drafts that siblings wrote, about half is refused.

    After a prompt of 30 tokens chunks of three end where a KV block does. They are too
    short for drafts, since neither their first token nor their last is drafted.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype="float32")
    prompt = [5 + i for i in range(num_prompt_tokens)]
    sampling = {
        "temperature": TEMPERATURE,
        "max_tokens": LENGTH,
        "ignore_eos": True,
        "allowed_token_ids": ALLOWED,
    }
    group = aseer.Group(prompt, NUM_DRAWN, sampling=sampling)
    rollout = drafting.rollout_sync([group], chunk_size=chunk_size)
    responses = list(rollout)
    probabilities = exact(model, prompt, ALLOWED, LENGTH, TEMPERATURE)
    for response in responses:
        assert response.finish_reason == "length", response.error
        expected = probabilities[tuple(response.token_ids)]
        assert math.exp(sum(response.logprobs)) == pytest.approx(expected, rel=1e-3)
    drawn = [tuple(response.token_ids) for response in responses]
    assert len(drawn) == NUM_DRAWN
    assert p_value(drawn, probabilities) > 1e-4
    warmer = exact(model, prompt, ALLOWED, LENGTH, 3 * TEMPERATURE)
    assert p_value(drawn, warmer) < 1e-4
    assert rollout.report.num_chunks == num_chunks * NUM_DRAWN
    if num_chunks == 1:
        speculation = rollout.report.speculation
        drafted, accepted = sum(speculation.drafted), sum(speculation.accepted)
        assert drafted > NUM_DRAWN / 2
        assert 0.2 < accepted / drafted < 0.9
        assert speculation.drafted[1] > 50
        assert not any(speculation.drafted[MAX_DRAFT_TOKENS:])
