"""Speculation on real engines changes nothing of what is sampled (I2)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import aseer
from tests.e2e.distributions import assert_alike
from tests.e2e.tiny import by_request, tiny_config

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0.0, "max_tokens": 200}
# What else goes through the verified sampler.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"ignore_eos": True},
    {"min_tokens": 77},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"repetition_penalty": 1.2},
    {"allowed_token_ids": list(range(2, 60))},
    {"structured_outputs": {"regex": "[a-f]{70}[0-9]{40}"}},
]
GROUPS = [
    aseer.Group([5, 6, 7 + i], n=6, sampling=GREEDY | settings)
    for i, settings in enumerate(SETTINGS)
]
# Every draft there is, so that verification is tried hard.
ALL_DRAFTS = aseer.SpeculationConfig(budget="fixed", max_draft_tokens=6)
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 160}

SAMPLER = """
import json
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
current_platform.register_triton_kernel_overrides()
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from aseer.dgds.sampler import test_sampler
from aseer.dgds.verifier import DraftVerifier
from aseer.instance.vllm import patches
from types import SimpleNamespace

torch.set_num_threads(1)
device = torch.device("cpu")
plain = Sampler("processed_logprobs")
upstream = test_sampler(RejectionSampler(plain), device)
ours = test_sampler(DraftVerifier(plain), device)
runner = SimpleNamespace(device=device)
was_mended = bool(patches.apply("sampler", runner))
mended = test_sampler(RejectionSampler(plain), device)
sample_all = DraftVerifier.sample_all
def most_likely(*args):
    _, logprobs = sample_all(*args)
    return logprobs.argmax(dim=-1), logprobs
DraftVerifier.sample_all = most_likely
greedy = test_sampler(DraftVerifier(plain), device)
raw = test_sampler(RejectionSampler(Sampler("raw_logprobs")), device)
again = patches.apply("sampler", runner)
print(json.dumps([upstream, ours, was_mended, mended, again, greedy, raw]))
"""


@pytest.fixture(scope="module")
def plain() -> Iterator[aseer.Engine]:
    with aseer.Engine(tiny_config(num_instances=1, chunk_size=0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def drafting() -> Iterator[aseer.Engine]:
    # Few at once: most requests draft from what siblings have finished.
    config = tiny_config(
        num_instances=2, chunk_size=32, speculation=ALL_DRAFTS, max_num_seqs=8
    )
    with aseer.Engine(config) as engine:
        yield engine


def test_samplers_are_told_from_wrong_ones():
    done = subprocess.run(
        [sys.executable, "-c", SAMPLER], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    upstream, ours, was_mended, mended, again, greedy, raw = said
    assert not upstream[0]
    assert ours[0], ours
    assert was_mended
    assert mended[0], mended
    assert not again
    assert "p-value" in greedy[3]
    assert "logprobs" in raw[3]


def test_drafts_come_with_a_steps_answer(monkeypatch):
    from aseer.instance.vllm import EXECUTOR, executor, patches

    parallel = SimpleNamespace(distributed_executor_backend=EXECUTOR)
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=parallel),
        sample_tokens=lambda grammar: SimpleNamespace(grammar=grammar),
        take_draft_token_ids=lambda: "drafts",
    )
    base = executor.MultiprocExecutor
    monkeypatch.setattr(base, "take_draft_token_ids", lambda self: "asked for")
    monkeypatch.setattr(
        base, "sample_tokens", lambda self, grammar: runner.sample_tokens(grammar)
    )
    one = object.__new__(executor.DraftingExecutor)
    one.sample_tokens(None)
    assert one.take_draft_token_ids() == "asked for"
    assert patches.send_drafts_along(runner)
    assert one.sample_tokens("a grammar").grammar == "a grammar"
    assert one.take_draft_token_ids() == "drafts"
    assert one.take_draft_token_ids() == "asked for"  # that answer is used up


def test_greedy_responses_are_those_without_speculation(plain, drafting):
    expected = by_request(list(plain.rollout_sync(GROUPS)))
    rollout = drafting.rollout_sync(GROUPS)
    found = by_request(list(rollout))
    assert all(r.finish_reason != "error" for r in found.values())
    assert found.keys() == expected.keys()
    for request_id, response in found.items():
        assert response.token_ids == expected[request_id].token_ids
        assert response.text == expected[request_id].text
        # Several rows at once are multiplied in another order: the last bits differ.
        assert response.logprobs == pytest.approx(
            expected[request_id].logprobs, abs=1e-5
        )
    report = rollout.report
    assert report.num_chunks > 100
    assert report.speculation.num_drafts > 100
    assert report.speculation.acceptance_length > 1.5
    assert not any(report.speculation.drafted[ALL_DRAFTS.max_draft_tokens :])
    assert 0 < report.speculation.drafting_share < 1
    assert report.speculation.drafting_share <= report.speculation.drafting_share_worst


@pytest.mark.parametrize(("max_num_seqs", "max_draft_tokens"), [(1, 64), (5, 1)])
def test_drafts_of_any_length_in_odd_chunks(plain, max_num_seqs, max_draft_tokens):
    groups = [
        aseer.Group([5, 6, 7] * k, n=3, sampling=GREEDY | {"max_tokens": max_tokens})
        for k, max_tokens in [(1, 1), (2, 2), (40, 60), (30, 37), (9, 33)]
    ]
    expected = by_request(list(plain.rollout_sync(groups)))
    config = tiny_config(
        num_instances=1,
        max_num_seqs=max_num_seqs,
        chunk_size=17,
        speculation=aseer.SpeculationConfig(
            budget="fixed",
            max_draft_tokens=max_draft_tokens,
            tail_draft_tokens=max_draft_tokens,
        ),
    )
    with aseer.Engine(config) as engine:
        found = by_request(list(engine.rollout_sync(groups)))
    assert found.keys() == expected.keys()
    for request_id, response in found.items():
        assert response.token_ids == expected[request_id].token_ids
        assert response.finish_reason == expected[request_id].finish_reason


def test_sampled_responses_are_distributed_as_without_speculation(plain, drafting):
    """Some tens of thousands of tokens a side; statistics of whole responses."""

    def responses(engine: aseer.Engine, **other: float) -> list[aseer.Response]:
        sampling = SAMPLED | other
        groups = [aseer.Group([9, 8, 7], n=16, sampling=sampling) for _ in range(16)]
        return list(engine.rollout_sync(groups))

    one, other = responses(plain), responses(drafting)
    assert sum(len(r.token_ids) for r in other) > 20_000
    assert_alike(one, other)
    with pytest.raises(AssertionError):
        assert_alike(one, responses(drafting, temperature=1.1))


def test_engines_leave_their_cores_to_others_soon_after_a_rollout(drafting):
    list(drafting.rollout_sync(GROUPS[:1]))
    time.sleep(0.7)
    before = cpu_seconds(drafting)
    time.sleep(0.5)
    assert cpu_seconds(drafting) - before < 0.2


def cpu_seconds(engine: aseer.Engine) -> float:
    """CPU time that the engines' processes have used."""
    leaders = [psutil.Process(info.pid) for info in engine.instances]
    processes = [*leaders, *(c for p in leaders for c in p.children(recursive=True))]
    return sum(sum(p.cpu_times()[:2]) for p in processes)
