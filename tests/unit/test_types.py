"""Ids, states, and how many KV blocks a request takes."""

from __future__ import annotations

import pytest

from aseer.types import GroupId, RequestState, request_id_of
from tests.unit.core import info_of


def test_members_ids_are_the_groups_id_and_their_index() -> None:
    assert [request_id_of(GroupId("g"), i) for i in range(3)] == ["g/0", "g/1", "g/2"]


def test_every_state_but_waiting_and_running_is_final() -> None:
    unfinished = [s for s in RequestState if not s.is_finished]
    assert unfinished == [RequestState.WAITING, RequestState.RUNNING]


def test_a_final_states_value_is_the_finish_reason_users_see() -> None:
    final = {s.value for s in RequestState if s.is_finished}
    assert final == {"stop", "length", "aborted", "error"}


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_tokens_occupy_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    assert info_of(block_size=16).blocks_for(num_tokens) == num_blocks


def test_draft_tokens_of_a_step_are_paid_for() -> None:
    info = info_of(block_size=16, num_lookahead_tokens=3)
    assert [info.blocks_for(n) for n in (13, 14)] == [1, 2]


def test_no_request_takes_more_blocks_than_there_are() -> None:
    assert info_of(block_size=16, num_kv_blocks=10).blocks_for(10_000) == 10
