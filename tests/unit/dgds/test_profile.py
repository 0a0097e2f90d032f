"""Which steps are measured at an engine's start, and where its CUDA graphs end."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.dgds.profile import graph_tokens, profile_sizes

Mode = Enum("Mode", ["NONE", "PIECEWISE", "FULL_AND_PIECEWISE"])


def config(mode: str, size: int | None) -> Any:
    compilation = SimpleNamespace(
        cudagraph_mode=Mode[mode], max_cudagraph_capture_size=size
    )
    return SimpleNamespace(compilation_config=compilation)


@pytest.mark.parametrize(
    ("mode", "size", "tokens"),
    [
        ("FULL_AND_PIECEWISE", 512, 512),
        ("PIECEWISE", 144, 144),
        ("NONE", 512, None),  # the attention of the device has turned them off
        ("NONE", 0, None),
        ("PIECEWISE", 0, None),
        ("PIECEWISE", None, None),
    ],
)
def test_graphs_end_at_the_largest_that_vllm_captures(mode, size, tokens):
    assert graph_tokens(config(mode, size)) == tokens


def tokens_of(sizes: list[tuple[int, int]]) -> list[int]:
    return [rows * (1 + drafted) for rows, drafted in sizes]


def test_without_graphs_the_steps_are_those_they_were():
    sizes = profile_sizes(1024, 8, None, 2000)
    assert sizes == [
        *((1, 8), (1, 0), (1, 3), (1, 8), (4, 0), (4, 8)),
        *((16, 0), (16, 3), (64, 0)),
    ]
    assert profile_sizes(8, 8, None, 2000) == sizes[:6]


@pytest.mark.parametrize("most", [1, 4, 8, 16])
@pytest.mark.parametrize("graphs", [144, 512, 1024])
def test_a_step_on_either_side_of_the_graphs_end_is_measured(most, graphs):
    before = profile_sizes(1024, most, None, 10**6)
    sizes = profile_sizes(1024, most, graphs, 10**6)
    assert sizes[: len(before)] == before
    below, above = tokens_of(sizes[len(before) :])
    assert below <= graphs < above
    assert above - below < 0.25 * graphs


def test_a_step_that_drafts_cannot_make_or_memory_not_hold_is_not_measured():
    assert max(tokens_of(profile_sizes(32, 8, 512, 10**6))) <= 512
    assert max(tokens_of(profile_sizes(1024, 8, 512, 512))) <= 512
    assert min(rows for rows, _ in profile_sizes(1024, 16, 8, 10**6)) == 1
