"""The drafter against a runner that is a stand-in for vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aseer.dgds.budget import FixedBudget
from aseer.dgds.messages import Deltas, GroupDelta, RequestDelta
from aseer.dgds.proposer import GroupDrafter
from aseer.dgds.replica import Replica, RequestKey
from aseer.dgds.steptime import StepTimeModel

PROMPT = [1, 2, 3]
MAX_DRAFT_TOKENS = 4


class Limited(FixedBudget):
    """Drafts all there is, up to `limit` tokens, which may change."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def max_draft_tokens(self, num_rows: int) -> int:
        return self.limit


class Engine:
    """Runs requests that sample what it is told, with drafts verified."""

    def __init__(self) -> None:
        self.token_ids = np.zeros((4, 100), np.int32)
        self.num_tokens = np.zeros(4, np.int32)
        self.drafts: list[list[int]] = []
        batch = SimpleNamespace(
            req_ids=[], req_id_to_index={}, num_prompt_tokens=np.zeros(4, np.int32)
        )
        self.runner = SimpleNamespace(
            input_batch=batch, requests={}, execute_model=lambda scheduled: None
        )
        self.replica = Replica(ttl_s=600.0)
        self.budget = Limited(MAX_DRAFT_TOKENS)
        self.model = StepTimeModel()
        self.drafter = GroupDrafter(
            SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
        )
        self.clock = self.drafter.start(
            self.runner, self.replica, self.budget, self.model, 2.0
        )
        self.runner.execute_model = self.clock.timed(self.runner.execute_model)

    def add(
        self,
        name: str,
        generated: list[int],
        *,
        max_tokens: int = 50,
        min_tokens: int = 0,
        told: Any = True,
    ) -> None:
        batch = self.runner.input_batch
        place = len(batch.req_ids)
        batch.req_ids.append(name)
        batch.req_id_to_index[name] = place
        text = PROMPT + generated
        self.token_ids[place, : len(text)] = text
        self.num_tokens[place] = batch.num_prompt_tokens[place] = len(text)
        identity = {
            "group": "g",
            "request": name,
            "prompt_tokens": len(PROMPT),
            "probe": place == 0,
        }
        self.runner.requests[name] = SimpleNamespace(
            sampling_params=SimpleNamespace(
                extra_args={"aseer": identity} if told else None,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
            )
        )
        self.drafts.append([])

    def step(self, *sampled: list[int]) -> list[list[int]]:
        scheduled = {
            name: draft
            for name, draft in zip(
                self.runner.input_batch.req_ids, self.drafts, strict=True
            )
            if draft
        }
        num = len(sampled) + sum(map(len, self.drafts))
        self.runner.execute_model(
            SimpleNamespace(
                total_num_scheduled_tokens=num, scheduled_spec_decode_tokens=scheduled
            )
        )
        for place, tokens in enumerate(sampled):
            start = self.num_tokens[place]
            self.token_ids[place, start : start + len(tokens)] = tokens
            self.num_tokens[place] += len(tokens)
        self.drafts = self.drafter.propose(
            list(sampled), self.num_tokens, self.token_ids
        )
        return self.drafts

    def text(self, name: str) -> list[int]:
        return self.replica.text(RequestKey("g", name)).tolist()


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_a_request_drafts_from_its_siblings_text(engine):
    engine.add("a", [5, 6, 7, 8, 9, 5])
    engine.add("b", [])
    drafts = engine.step([6], [5])
    assert drafts[1][:3] == [6, 7, 8]
    assert engine.text("a") == [5, 6, 7, 8, 9, 5, 6]


def test_a_resumed_chunk_appends_what_it_generates_once(engine):
    engine.add("a", [5, 6, 7])
    engine.step([8])
    engine.step([9, 10])
    assert engine.text("a") == [5, 6, 7, 8, 9, 10]


def test_drafts_end_where_the_chunk_does(engine):
    engine.add("a", [5, 6, 7, 8, 9] * 3)
    engine.add("b", [], max_tokens=4)
    # One is sampled, three may follow: a draft, the model's own token, and the last.
    assert len(engine.step([5], [5])[1]) == 1
    assert len(engine.step([6], [6, 7])[1]) == 0
    assert len(engine.step([7], [8])[1]) == 0


def test_a_chunks_last_token_is_sampled_without_a_draft(engine):
    engine.add("a", [5, 6, 7, 8, 9] * 3)
    engine.add("b", [], max_tokens=7)
    assert engine.step([5], [5])[1] == [6, 7, 8, 9]
    assert engine.step([6], [6, 7, 8, 9, 5])[1] == []


def test_no_draft_crosses_the_place_from_which_a_request_may_stop(engine):
    engine.add("a", [5, 6, 7, 8, 9] * 3)
    engine.add("b", [], min_tokens=3)
    # Two more must follow the first: one draft and the model's own token.
    assert len(engine.step([5], [5])[1]) == 1
    assert len(engine.step([6], [6, 7])[1]) == MAX_DRAFT_TOKENS


def test_a_request_of_somebody_else_gets_no_drafts(engine):
    engine.add("a", [5, 6, 7, 8, 9, 5])
    engine.add("stranger", [5], told=False)
    assert engine.step([6], [6])[1] == []


def test_a_request_still_in_its_prompt_is_left_alone(engine):
    engine.add("a", [5, 6, 7, 8, 9, 5])
    engine.add("b", [5])
    assert engine.step([6], [])[1] == []
    assert engine.step([7], [6])[1][:2] == [7, 8]


def test_what_became_of_drafts_is_learnt_and_steps_are_timed(engine):
    told = []
    budget = engine.drafter._drafting._budget
    budget.learn = lambda outcome: told.append(outcome.survived.tolist())
    settled = []
    budget.settle = lambda *args: settled.append(args[:3])
    engine.add("a", [5, 6, 7, 8, 9, 5, 6, 7, 8, 9])
    draft = engine.step([5])[0]
    assert draft == [6, 7, 8, 9]
    engine.step([6, 7, 1])
    assert told == [[True, True, False, False]]
    # One request, three tokens sampled, 17 in all.
    assert settled == [(1, 3, len(PROMPT) + 10 + 1 + 3)]
    assert engine.model.predict(1, 0, 10)[0] > 0
    assert 0 < engine.clock.draft_s < engine.clock.step_s
    assert sum(engine.clock.share_buckets) == 2


def test_a_step_that_the_drafter_was_not_told_of_is_made_up_for(engine):
    engine.add("a", [5, 6])
    engine.step([7])
    engine.token_ids[0, 6:8] = [8, 9]
    engine.num_tokens[0] = 8
    engine.step([4])
    engine.step([3])
    assert engine.text("a") == [5, 6, 7, 8, 9, 4, 3]


def test_a_text_that_became_shorter_is_begun_anew(engine, caplog):
    engine.add("a", [5, 6])
    engine.step([7])
    engine.num_tokens[0] = 4
    engine.step([4])
    assert "lost track" in caplog.text
    engine.step([3])
    assert engine.text("a") == [5, 4, 3]


def test_steps_without_a_look_are_made_up_for_by_the_next(engine):
    engine.add("a", [5, 6])
    engine.step([7])
    engine.budget.limit = 0
    assert engine.step([8]) == [[]]
    assert engine.text("a") == [5, 6, 7]
    engine.budget.limit = MAX_DRAFT_TOKENS
    engine.step([5])
    assert engine.text("a") == [5, 6, 7, 8, 5]
    assert engine.drafts == [[6, 7, 8, 5]]


def test_requests_that_change_places_keep_their_texts(engine):
    engine.add("a", [5, 6, 7, 8, 9, 5])
    engine.add("b", [5])
    assert engine.step([6], [6])[1][:2] == [7, 8]
    batch = engine.runner.input_batch
    for of_rows in (engine.token_ids, engine.num_tokens, batch.num_prompt_tokens):
        of_rows[[0, 1]] = of_rows[[1, 0]]
    batch.req_ids.reverse()
    batch.req_id_to_index = {name: i for i, name in enumerate(batch.req_ids)}
    engine.drafts.reverse()
    assert engine.step([7], [7])[0][:2] == [8, 9]
    assert engine.text("a") == [5, 6, 7, 8, 9, 5, 6, 7]
    assert engine.text("b") == [5, 6, 7]


def test_what_a_chunk_sampled_after_its_last_look_comes_from_the_server(engine):
    engine.add("a", [5, 6])
    engine.add("b", [])
    engine.step([7], [5])
    engine.budget.limit = 0
    engine.step([8], [6])
    del engine.runner.input_batch.req_id_to_index["a"]
    engine.runner.input_batch.req_ids[0] = "gone"
    engine.budget.limit = MAX_DRAFT_TOKENS
    engine.step([], [7])
    assert engine.text("a") == [5, 6, 7]
    assert engine.text("b") == [5, 6, 7]
    asked = engine.replica.fetch()
    assert asked.cache_infos == {"g": {"a": 3, "b": 3}}
    news = RequestDelta("a", 3, np.array([8], np.int32).tobytes())
    engine.replica.apply(Deltas([GroupDelta("g", True, [news])]))
    assert engine.text("a") == [5, 6, 7, 8]


def test_an_error_ends_drafting_and_nothing_else(engine, caplog):
    engine.add("a", [5, 6, 5])
    engine.drafter._drafting._replica = None
    assert engine.step([6]) == [[]]
    assert "drafting failed" in caplog.text
    assert engine.step([7]) == [[]]


def test_an_unbound_drafter_drafts_nothing():
    drafter = GroupDrafter(
        SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
    )
    assert drafter.propose([[1], [2]], np.zeros(2), np.zeros((2, 2))) == [[], []]
