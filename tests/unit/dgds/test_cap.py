"""No step verifies more rows of logits than there is memory for."""

from __future__ import annotations

import numpy as np
import pytest

from aseer.dgds.budget import Candidates, FixedBudget
from aseer.dgds.cap import MAX_LOGITS_BYTES, CappedBudget


def candidates(*lengths: int) -> Candidates:
    return Candidates(
        confidences=np.full(sum(lengths), 0.9, np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        weights=np.ones(len(lengths)),
        num_context_tokens=0,
    )


def capped(max_rows: int) -> CappedBudget:
    return CappedBudget(FixedBudget(8), MAX_LOGITS_BYTES // (4 * max_rows))


@pytest.mark.parametrize(
    ("max_rows", "lengths", "drafted"),
    [
        (100, (8, 3, 0), [8, 3, 0]),
        (14, (8, 3, 0), [8, 3, 0]),
        (13, (8, 3, 0), [7, 3, 0]),
        (8, (8, 3, 0), [2, 2, 0]),
        (4, (8, 3, 0), [0, 0, 0]),
        (2, (8, 3, 0), [0, 0, 0]),
    ],
)
def test_the_ends_of_the_longest_drafts_go_first(
    max_rows: int, lengths: tuple[int, ...], drafted: list[int]
) -> None:
    assert capped(max_rows).choose(candidates(*lengths)).tolist() == drafted


def test_a_thousand_requests_of_a_large_vocabulary_stay_within_memory() -> None:
    budget = CappedBudget(FixedBudget(8), 152_000)
    lengths = budget.choose(candidates(*[8] * 1024))
    assert 0 < (1024 + lengths.sum()) * 152_000 * 4 <= MAX_LOGITS_BYTES


def test_nothing_is_looked_for_where_nothing_fits() -> None:
    assert capped(16).max_draft_tokens(15) == 8
    assert capped(16).max_draft_tokens(16) == 0
