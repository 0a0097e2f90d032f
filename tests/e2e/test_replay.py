"""Replay on real engines: requests emit exactly what was recorded, however they run."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import aseer
from aseer.data import trace
from aseer.data.trace import Trace, TraceGroup
from aseer.node import process
from tests.e2e.tiny import tiny_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
END = 1
MAX_TOKENS = 150
ALL_DRAFTS = aseer.SpeculationConfig(budget="fixed", max_draft_tokens=6)


def make_trace() -> Trace:
    """Siblings that share phrases, of different lengths; some are cut off."""
    rng = random.Random(0)
    groups = []
    for g in range(4):
        phrases = [[rng.randrange(3, 128) for _ in range(9)] for _ in range(4)]
        responses = []
        for _ in range(4):
            text = [t for _ in range(20) for t in rng.choice(phrases)]
            responses.append(np.array(text[: rng.choice((1, 30, 70, 150))], np.int32))
        groups.append(TraceGroup(np.arange(5, 9 + 7 * g, dtype=np.int32), responses))
    return Trace(groups=groups, settings={"max_tokens": MAX_TOKENS}).as_is(END)


RECORDED = make_trace()


@pytest.fixture(scope="module")
def replaying(tmp_path_factory) -> Iterator[None]:
    """Instances that are started now replay the trace."""
    path = tmp_path_factory.mktemp("replay") / "trace.json.gz"
    trace.save(RECORDED, path)
    with pytest.MonkeyPatch.context() as patch:
        command = ("aseer.instance.vllm.replay", str(path))
        patch.setattr(process, "MODULE", command)
        yield


@pytest.fixture(scope="module")
def plain(replaying) -> Iterator[aseer.Engine]:
    with aseer.Engine(tiny_config(num_instances=2, chunk_size=32)) as engine:
        yield engine


@pytest.fixture(scope="module")
def drafting(replaying) -> Iterator[aseer.Engine]:
    config = tiny_config(num_instances=2, chunk_size=32, speculation=ALL_DRAFTS)
    with aseer.Engine(config) as engine:
        yield engine


def roll_out(engine: aseer.Engine, **how) -> aseer.RolloutReport:
    """Roll the trace out, and hold every token against it."""
    sampling = {
        "temperature": 1.0,
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "stop_token_ids": [END],
    }
    groups = [
        aseer.Group(g.prompt.tolist(), len(g.responses), sampling, str(i))
        for i, g in enumerate(RECORDED.groups)
    ]
    rollout = engine.rollout_sync(groups, **how)
    num_found = 0
    for response in rollout:
        expected = RECORDED.groups[int(response.group_id)].responses[response.index]
        assert response.token_ids == expected.tolist(), response.request_id
        is_cut = expected[-1] != END
        assert response.finish_reason == ("length" if is_cut else "stop")
        assert len(response.logprobs) == len(expected)
        num_found += 1
    assert num_found == RECORDED.num_requests
    return rollout.report


@pytest.mark.parametrize("engine", ["plain", "drafting"])
def test_chunks_on_changing_engines_emit_the_recorded_tokens(
    engine, request, always_migrate
):
    engine = request.getfixturevalue(engine)
    report = roll_out(engine)
    assert report.num_migrations > 10
    assert report.num_output_tokens == RECORDED.num_tokens


@pytest.mark.parametrize("policy", ["least-loaded", "longest-first"])
def test_every_policy_emits_the_recorded_tokens(plain, policy):
    roll_out(plain, policy=policy)


def test_a_draft_is_accepted_as_far_as_it_is_what_was_recorded(drafting):
    drafts = roll_out(drafting).speculation
    assert drafts.num_drafts > 50
    # Siblings share phrases, so what follows within one is known, and no further.
    assert 1.5 < drafts.acceptance_length < 1 + 6
    assert sum(drafts.accepted) < sum(drafts.drafted)


def test_requests_that_are_not_in_the_trace_are_sampled(plain):
    sampling = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    prompt = RECORDED.groups[0].prompt.tolist()
    (response,) = plain.rollout_sync([aseer.Group(prompt, 1, sampling, "other")])
    assert len(response.token_ids) == 40
    texts = [r.tolist()[:40] for r in RECORDED.groups[0].responses]
    assert response.token_ids not in texts


def test_an_instance_refuses_a_changed_trace(tmp_path: Path, monkeypatch):
    path = tmp_path / "trace.json"
    content = RECORDED.to_dict()
    content["groups"][0]["responses"][0][0] += 1
    path.write_text(json.dumps(content))
    command = ("aseer.instance.vllm.replay", str(path))
    monkeypatch.setattr(process, "MODULE", command)
    config = tiny_config(num_instances=1, max_restarts=0)
    with pytest.raises(aseer.InstanceStartError, match="was changed"):
        with aseer.Engine(config):
            pass


def test_what_a_batch_emits_next_is_read_off_its_rows():
    from aseer.instance.vllm.replay import Recorded

    prompt = np.array([9, 9], np.int32)
    responses = [np.array(r, np.int32) for r in ([10, 11, 12, 13], [20, 21], [30])]
    recorded = Recorded(Trace(groups=[TraceGroup(prompt, responses)]), "cpu")
    batch = SimpleNamespace(
        req_ids=["0/0#5-ab", "other#6-cd", "0/1#7-ef", "0/2#8-01", "0/0#9-23"],
        num_tokens_no_spec=np.array([2, 2, 3, 2, 5]),
    )
    sampled = torch.tensor([1, 2, 3, 4, 5])
    found = recorded.instead_of_sampled(sampled, batch, 5)
    assert found.tolist() == [10, 2, 21, 30, 13]
    # Drafts: right then wrong; any; wrong; none; past the end.
    output = torch.full((5, 4), 7, dtype=torch.int32)
    drafts = torch.tensor([10, 11, 99, 10, 99, 13, 99], dtype=torch.int32)
    found = recorded.instead_of_verified(output, drafts, [3, 1, 1, 0, 2], batch)
    assert found.dtype == output.dtype
    assert found.tolist() == [
        [10, 11, 12, -1],
        [7, 7, 7, 7],
        [21, -1, -1, -1],
        [30, -1, -1, -1],
        [13, 13, -1, -1],
    ]
