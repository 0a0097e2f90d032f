"""Recorded tokens on model runner V2, which knows requests by slots; on a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from aseer.data import trace
from aseer.data.trace import Trace, TraceGroup
from aseer.instance.vllm.replay import ReplayExtension

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = [5, 6, 7]
RESPONSES = [[11, 12, 13, 14], [21, 22]]
SAMPLED = 99


class Runner:
    """A model runner V2 that samples 99 everywhere."""

    def __init__(self, rejection_sampler: Any = None) -> None:
        self.max_num_reqs = 4
        self.req_states = SimpleNamespace(req_id_to_index={})
        self.rejection_sampler = rejection_sampler
        self.sampler = SimpleNamespace(sample=self.sample)

    def add_requests(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            free = set(range(4)) - set(self.req_states.req_id_to_index.values())
            self.req_states.req_id_to_index[new.req_id] = min(free)

    def sample(self, logits: Any, *args: Any, return_logprobs: bool = False) -> Any:
        return torch.full((len(logits),), SAMPLED), logits

    def add(self, *names: str) -> None:
        new = [SimpleNamespace(req_id=name) for name in names]
        self.add_requests(SimpleNamespace(scheduled_new_reqs=new))

    def emits(self, slots: list[int], positions: list[int]) -> list[int]:
        logits = torch.zeros(len(slots), 8)
        rows = torch.tensor(slots)
        sampled, processed = self.sampler.sample(
            logits, rows, rows, None, torch.tensor(positions), return_logprobs=True
        )
        assert processed is logits
        return sampled.tolist()


def replaying(tmp_path: Path, runner: Runner) -> Runner:
    path = tmp_path / "trace.json.gz"
    texts = [np.array(tokens, np.int32) for tokens in RESPONSES]
    recorded = Trace(
        groups=[TraceGroup(np.array(PROMPT, np.int32), texts)], settings={}
    )
    trace.save(recorded, path)
    worker = ReplayExtension()
    worker.model_runner, worker.device = runner, torch.device("cpu")
    worker.aseer_start_replay(str(path))
    return runner


def test_each_slot_emits_its_response_wherever_the_request_is(tmp_path):
    runner = replaying(tmp_path, Runner())
    runner.add("0/0#1", "stranger#2", "0/1#3")
    assert runner.emits([0, 1, 2], [2, 9, 2]) == [11, SAMPLED, 21]
    # Several tokens of one request, as where drafts are verified; and past its end.
    assert runner.emits([0, 0, 0, 2, 2], [3, 4, 5, 3, 4]) == [12, 13, 14, 22, 22]


def test_a_slot_that_is_taken_again_emits_what_its_new_request_has(tmp_path):
    runner = replaying(tmp_path, Runner())
    runner.add("0/0#1")
    del runner.req_states.req_id_to_index["0/0#1"]
    runner.add("0/1#2")
    assert runner.emits([0], [3]) == [22]
    del runner.req_states.req_id_to_index["0/1#2"]
    runner.add("other#3")
    assert runner.emits([0], [3]) == [SAMPLED]


def test_vllms_own_drafts_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        replaying(tmp_path, Runner(rejection_sampler=object()))
