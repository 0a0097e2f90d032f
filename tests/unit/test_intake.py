"""A running chunk's reports: the usual one is taken the short way, and no other."""

from __future__ import annotations

from array import array

import pytest

from aseer.intake import Intake
from aseer.types import ChunkId, ChunkProgress


def reported(
    start: int, num: int, text_start: int = 0, text: str = ""
) -> ChunkProgress:
    ids = array("i", range(start, start + num))
    return ChunkProgress(
        chunk_id=ChunkId(1),
        start=start,
        tokens=ids.tobytes(),
        logprobs=array("f", ids).tobytes(),
        text_start=text_start,
        text=text,
    )


def intake_of(
    max_tokens: int = 10,
) -> tuple[Intake, array[int], array[float], list[str]]:
    """That has taken three tokens and the text "abc"."""
    tokens, logprobs, text = array("i"), array("f"), list[str]()
    intake = Intake(tokens, logprobs, text, max_tokens)
    assert intake.take(reported(0, 3, text="abc"))
    return intake, tokens, logprobs, text


@pytest.mark.parametrize(("num", "more"), [(0, ""), (1, "d"), (7, ""), (7, "defg")])
def test_the_next_tokens_are_taken_alike_either_way(num: int, more: str) -> None:
    report = reported(3, num, 3, more)
    short, *by_extend = intake_of()
    long, *by_take = intake_of()
    assert short.extend(report) == num
    assert long.take(report)
    assert by_extend == by_take
    for intake in (short, long):  # and both go on from there
        assert intake.take(reported(3 + num, 0, 3 + len(more)))
    assert not short.is_broken


@pytest.mark.parametrize(
    "report",
    [
        reported(2, 2, 3),
        reported(4, 1, 3),
        reported(3, 8, 3),
        reported(3, 1, 2, "cd"),
        reported(3, 1, 4, "d"),
        ChunkProgress(chunk_id=ChunkId(1), start=3, tokens=b"1234", text_start=3),
        ChunkProgress(
            chunk_id=ChunkId(1), start=3, tokens=b"12", logprobs=b"12", text_start=3
        ),
    ],
)
def test_anything_else_is_left_to_the_long_way(report: ChunkProgress) -> None:
    intake, *kept = intake_of()
    before = [list(values) for values in kept]
    assert intake.extend(report) == -1
    assert [list(values) for values in kept] == before
    assert not intake.is_broken
