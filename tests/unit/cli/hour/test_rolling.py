"""What counts as equal, and where requests are sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aseer import scheduler
from aseer.cli.hour.rolling import (
    ROUNDING,
    difference,
    elsewhere,
    greedy_groups,
    moving,
    num_equal,
    num_tokens,
)


def response(tokens: list[int], logprobs: list[float], error: str | None = None) -> Any:
    return SimpleNamespace(token_ids=tokens, logprobs=logprobs, error=error)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"r": response([1, 2], [-1.0, -2.0])}, ""),
        ({"r": response([1, 2], [-1.0, -2.000001])}, ""),
        ({"r": response([1, 3], [-1.0, -2.5])}, "the tokens of r from place 1 on"),
        (
            {"r": response([1, 3], [-1.0, -2.00001])},
            "the tokens of r from place 1 on, where both are equally likely (1.0e-05)",
        ),
        ({"r": response([1, 2], [-1.0, -2.1])}, "the logprobs of r, by 1.0e-01"),
        ({"r": response([1], [-1.0])}, "the lengths of r, 2 and 1"),
        ({"r": response([], [], "it died")}, "r ended with an error: it died"),
        ({}, "1 and 0 responses"),
    ],
)
def test_equal_means_equal_tokens_and_logprobs(other, text) -> None:
    one = {"r": response([1, 2], [-1.0, -2.0])}
    assert difference(one, other, ROUNDING) == text


def test_equal_responses_are_counted_by_their_tokens() -> None:
    one = {
        "a": response([1], [0.0]),
        "b": response([2], [0.0]),
        "c": response([3], [0]),
    }
    other = {"a": response([1], [-9.0]), "b": response([9], [0.0])}
    assert num_equal(one, other) == 1


def test_all_tokens_are_counted() -> None:
    assert num_tokens(greedy_groups(max_tokens=10, n=4)) == 3 * 4 * 10


class Room:
    """Instances 0 to 2 by how many requests they run; 2 is not selected."""

    def __init__(self, *loads: int) -> None:
        self.loads = loads

    def alive_ids(self) -> list[int]:
        return [0, 1, 2]

    def is_selected(self, instance_id: int) -> bool:
        return instance_id < 2

    def num_running(self, instance_id: int) -> int:
        return self.loads[instance_id]

    def least_loaded(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("tokens", "loads", "chosen"),
    [
        ({0: 100}, (0, 9, 0), 1),
        ({1: 100}, (9, 0, 0), 0),
        ({0: 50, 1: 100}, (9, 0, 0), 0),
        ({}, (4, 3, 0), 1),
    ],
)
def test_a_chunk_is_sent_away_from_its_kv(tokens, loads, chosen) -> None:
    holders: Any = SimpleNamespace(tokens=tokens)
    room: Any = Room(*loads)
    assert elsewhere(holders, room) == chosen


def test_requests_are_sent_away_within_the_block_only() -> None:
    before = scheduler.place_by_affinity
    with pytest.raises(RuntimeError, match="x"), moving():
        assert scheduler.place_by_affinity is elsewhere
        raise RuntimeError("x")
    assert scheduler.place_by_affinity is before
