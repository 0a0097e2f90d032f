"""How our drafts are joined to model runner V2, on a stand-in for it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.worker.gpu import spec_decode

from aseer.dgds import speculator
from aseer.dgds.messages import ADDITIONAL_CONFIG_KEY
from aseer.dgds.speculator import GroupSpeculator, Joined, upload


@dataclass
class Output:
    """vLLM's SchedulerOutput, as far as it is looked at."""

    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: dict[str, list[int]]


@dataclass
class Grammar:
    """vLLM's GrammarOutput."""

    structured_output_request_ids: list[str]
    grammar_bitmask: Any
    num_acceptable_drafts: list[int] | None = None


class Runner:
    """Notes what it is told to launch and to sample."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.req_states = SimpleNamespace(
            req_id_to_index={"a": 2, "b": 0},
            draft_tokens=torch.zeros(4, 3, dtype=torch.int64),
        )
        self.launched: list[Any] = []
        self.grammars: list[Any] = []

    def execute_model(self, output: Any, *args: Any, **kwargs: Any) -> None:
        self.launched.append(output)

    def sample_tokens(self, grammar: Any) -> str:
        self.grammars.append(grammar)
        return f"tokens of step {len(self.grammars)}"


class Ahead:
    """Drafts one token for "a"."""

    def __init__(self) -> None:
        self.took_: list[Any] = []
        self.num_launched = 0

    def prepare(self, output: Any) -> Any:
        return Output({"a": 2, "b": 1}, 3, {"a": [-1]})

    def launched(self) -> None:
        self.num_launched += 1

    def took(self, sampled: Any) -> None:
        self.took_.append(sampled)


class Broken(Ahead):
    """Fails from its second step on."""

    def prepare(self, output: Any) -> Any:
        if self.num_launched:
            raise KeyError("it is broken")
        return super().prepare(output)


def output() -> Output:
    return Output({"a": 4, "b": 4}, 8, {"a": [-1] * 3, "b": [-1] * 3})


def test_what_is_drafted_is_launched_and_its_tokens_are_taken():
    runner, ahead = Runner(), Ahead()
    Joined(runner, ahead)
    runner.execute_model(output(), None)
    assert runner.sample_tokens(None) == "tokens of step 1"
    (launched,) = runner.launched
    assert launched.num_scheduled_tokens == {"a": 2, "b": 1}
    assert ahead.num_launched == 1
    assert ahead.took_ == ["tokens of step 1"]


def test_runs_that_only_warm_up_are_left_alone():
    runner, ahead = Runner(), Ahead()
    Joined(runner, ahead)
    warming = output()
    runner.execute_model(warming, dummy_run=True)
    assert runner.launched == [warming]
    assert ahead.num_launched == 0


def test_a_failure_costs_the_drafts_and_nothing_else(caplog):
    runner, ahead = Runner(), Broken()
    Joined(runner, ahead)
    for _ in range(3):
        runner.execute_model(output())
        runner.sample_tokens(None)
    assert "no drafts from now on" in caplog.text
    assert [step.total_num_scheduled_tokens for step in runner.launched] == [3, 2, 2]
    assert runner.launched[2].scheduled_spec_decode_tokens == {}
    assert ahead.num_launched == 1


def test_without_drafts_no_step_verifies_a_placeholder():
    runner = Runner()
    Joined(runner, None)
    runner.execute_model(output())
    assert runner.sample_tokens(None) == "tokens of step 1"
    (launched,) = runner.launched
    assert launched.num_scheduled_tokens == {"a": 1, "b": 1}
    assert launched.scheduled_spec_decode_tokens == {}


@pytest.mark.parametrize("acceptable", [None, [3, 0]])
def test_a_grammars_masks_for_placeholders_go_with_them(acceptable):
    runner = Runner()
    Joined(runner, None)
    runner.execute_model(output())
    masks = np.arange(5 * 2).reshape(5, 2)  # of "b", its placeholders, and "new"
    given = Grammar(["b", "new"], masks, acceptable)
    runner.sample_tokens(given)
    (told,) = runner.grammars
    assert told.structured_output_request_ids == ["b", "new"]
    assert told.grammar_bitmask.tolist() == [[0, 1], [8, 9]]
    assert told.num_acceptable_drafts == (None if acceptable is None else [0, 0])
    assert given.grammar_bitmask is masks


def test_drafts_are_written_to_the_slots_of_their_requests():
    runner = Runner()
    upload(runner, ["b", "a"], np.array([[7, 8], [9, 0]]))
    expected = [[7, 8, 0], [0, 0, 0], [9, 0, 0], [0, 0, 0]]
    assert runner.req_states.draft_tokens.tolist() == expected


def test_ours_is_made_where_the_configuration_asks_for_it(monkeypatch):
    made = []
    monkeypatch.setattr(
        spec_decode, "init_speculator", lambda *args: made.append(args) or "vLLM's"
    )
    monkeypatch.delitem(
        __import__("sys").modules, speculator._MODEL_RUNNER, raising=False
    )
    speculator.offer()
    speculator.offer()  # once is enough
    config = SimpleNamespace(
        additional_config={},
        speculative_config=SimpleNamespace(num_speculative_tokens=3),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )
    device = torch.device("cpu")
    assert spec_decode.init_speculator(config, device, "states") == "vLLM's"
    assert made == [(config, device, "states")]
    config.additional_config = {ADDITIONAL_CONFIG_KEY: 1}
    ours = spec_decode.init_speculator(config, device, "states")
    assert isinstance(ours, GroupSpeculator)
    assert len(made) == 1
    drafts = ours.propose(SimpleNamespace(num_reqs=2), None)
    drafts[:, 2:] = -1  # as vLLM does where a step has fewer placeholders
    assert ours.propose(SimpleNamespace(num_reqs=3)).tolist() == [[0, 0, 0]] * 3
