"""Ids, states, and how many KV blocks a request takes."""

from __future__ import annotations

import pytest

from aseer.types import GroupId, KvGroup, RequestState, request_id_of
from tests.unit.builders import info_of


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


def test_the_room_in_tokens_counts_what_every_group_of_layers_takes() -> None:
    plain = info_of(block_size=16, num_kv_blocks=30)
    assert plain.kv_tokens == 480
    # A request of 10,000 tokens takes 625 blocks, twice; or 625, 3 and 2.
    twice = (KvGroup(16), KvGroup(16))
    mixed = (KvGroup(16), KvGroup(16, 3), KvGroup(16, 1, 1))
    infos = [
        info_of(block_size=16, num_kv_blocks=1250, kv_groups=g) for g in (twice, mixed)
    ]
    assert [info.kv_tokens for info in infos] == [10_000, 10_000 * 1250 // 630]
    windows = info_of(block_size=16, num_kv_blocks=30, kv_groups=(KvGroup(16, 3),))
    assert windows.kv_tokens == 100_000, "ten of any length"


def test_no_request_takes_more_blocks_than_there_are() -> None:
    assert info_of(block_size=16, num_kv_blocks=10).blocks_for(10_000) == 10


# What vLLM was seen to hold for one request of so many tokens: with a sliding window of
# 64 tokens, and with recurrent states of which a step keeps two.
MIXED = [
    ("gemma3", (KvGroup(32),) + (KvGroup(32, 3),) * 5, [12, 13, 14, 26]),
    ("gemma2", (KvGroup(32), KvGroup(32, 3)), [4, 5, 6, 14]),
    ("mistral", (KvGroup(32, 3),), [2, 2, 2, 3]),
    ("granite", (KvGroup(160),) + (KvGroup(160, 2),) * 3, [4, 4, 4, 6]),
]
TOKENS = (41, 97, 129, 339)


@pytest.mark.parametrize(("family", "groups", "held"), MIXED)
def test_every_group_of_a_model_takes_blocks_of_its_own(
    family: str, groups: tuple[KvGroup, ...], held: list[int]
) -> None:
    info = info_of(block_size=groups[0].block_size, kv_groups=groups)
    reserved = [info.blocks_for(n - 1) for n in TOKENS]  # the last one is not written
    assert all(r >= h for r, h in zip(reserved, held, strict=True)), family
    assert reserved[-1] - held[-1] <= len(groups), "and not much more than is held"


def test_states_of_drafted_tokens_are_paid_for_whatever_the_length() -> None:
    info = info_of(block_size=16, kv_groups=(KvGroup(16), KvGroup(16, 2, 4)))
    assert [info.blocks_for(n) for n in (1, 17, 160)] == [6, 8, 16]


def test_siblings_share_only_what_stays() -> None:
    assert info_of(block_size=16).shared_blocks_for(47) == 2
    info = info_of(block_size=16, kv_groups=(KvGroup(16), KvGroup(8), KvGroup(16, 2)))
    assert info.shared_blocks_for(47) == 2 + 5


def test_a_piece_that_is_found_again_takes_blocks_of_every_group() -> None:
    assert info_of(block_size=16).cached_blocks_each == 1
    info = info_of(block_size=16, kv_groups=(KvGroup(16), KvGroup(8), KvGroup(16, 2)))
    assert info.cached_blocks_each == 1 + 2 + 1
