"""Recorded responses: what a step emits of them, wherever their requests are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aseer.data.trace import Trace, TraceGroup
from tests.lazy import Lazy

torch = Lazy("torch")

SAMPLED = 99
REJECTED = -1
# Group 0 has a prompt of 3 tokens, group 1 one of 1.
GROUPS = [([5, 6, 7], [[11, 12, 13, 14], [21, 22]]), ([8], [[31, 32, 33]])]


@pytest.fixture
def recorded():
    pytest.importorskip("torch")
    from aseer.instance.vllm.recorded import Recorded

    groups = [
        TraceGroup(
            np.array(prompt, np.int32), [np.array(r, np.int32) for r in responses]
        )
        for prompt, responses in GROUPS
    ]
    return Recorded(Trace(groups=groups, settings={}), torch.device("cpu"))


def batch(**num_tokens: int) -> Any:
    """Requests and how long each one's text is, its prompt included."""
    names = [name.replace("_", "/", 1).replace("_", "#") for name in num_tokens]
    return SimpleNamespace(
        req_ids=names, num_tokens_no_spec=np.array([*num_tokens.values()])
    )


def ids(*tokens: int) -> Any:
    return torch.tensor(tokens)


def test_each_row_emits_what_its_response_has_there_and_others_are_sampled(recorded):
    rows = batch(**{"0_0_a": 3, "0_1_b": 4, "stranger_1": 7, "1_0_c": 3})
    sampled = torch.full((4,), SAMPLED)
    found = recorded.instead_of_sampled(sampled, rows, 4)
    assert found.tolist() == [11, 22, SAMPLED, 33]
    assert sampled.tolist() == [SAMPLED] * 4


def test_past_its_end_a_response_repeats_its_last_token(recorded):
    rows = batch(**{"0_1_a": 9})
    assert recorded.instead_of_sampled(ids(SAMPLED), rows, 1).tolist() == [22]


def test_a_chunk_of_a_response_goes_on_where_the_last_one_ended(recorded):
    for first, length in (("a", 3), ("b", 5), ("c", 6)):
        rows = batch(**{f"0_0_{first}": length})
        found = recorded.instead_of_sampled(ids(SAMPLED), rows, 1)
        assert found.tolist() == [GROUPS[0][1][0][length - 3]]


def test_rows_with_drafts_have_a_token_after_the_text_and_after_each_draft(recorded):
    rows = batch(**{"0_0_a": 3, "stranger_1": 7, "1_0_c": 1})
    sampled = torch.full((6,), SAMPLED)
    found = recorded.instead_of_all(sampled, [2, 1, 0], rows)
    assert found.tolist() == [11, 12, 13, SAMPLED, SAMPLED, 31]


@pytest.mark.parametrize(
    ("drafts", "emitted"),
    [
        ([11, 12], [11, 12, 13]),
        ([11, 99], [11, 12, REJECTED]),
        ([99, 12], [11, REJECTED, REJECTED]),
    ],
)
def test_drafts_are_accepted_as_long_as_they_are_the_recorded_tokens(
    recorded, drafts, emitted
):
    rows = batch(**{"stranger_1": 7, "0_0_a": 3, "1_0_c": 1})
    output = torch.full((3, 3), SAMPLED)
    found = recorded.instead_of_verified(
        output, ids(1, *drafts, 31), [1, len(drafts), 1], rows
    )
    assert found.tolist() == [[SAMPLED] * 3, emitted, [31, 32, REJECTED]]


def test_a_slot_emits_its_requests_response_until_another_takes_it(recorded):
    slots = recorded.by_slots(2)
    everywhere = (ids(0, 0, 1), ids(2, 3, 0))
    sampled = torch.full((3,), SAMPLED)
    assert slots.instead_of(sampled, *everywhere).tolist() == [SAMPLED] * 3
    slots.begin(0, "0/0#a")
    slots.begin(1, "1/0#b")
    assert slots.instead_of(sampled, *everywhere).tolist() == [11, 12, 31]
    slots.begin(0, "stranger#1")
    assert slots.instead_of(sampled, *everywhere).tolist() == [SAMPLED, SAMPLED, 31]
