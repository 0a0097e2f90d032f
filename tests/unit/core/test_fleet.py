"""Capacity: what is reserved, what is free, who can take how much."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aseer.core._native import Capacity
from aseer.core.fleet import Fleet
from aseer.types import InstanceId, KvGroup
from tests.unit.builders import info_of

A, B, C = InstanceId(0), InstanceId(1), InstanceId(2)


def fleet_of(*num_kv_blocks: int, max_num_seqs: int = 100) -> Fleet:
    """Instances A, B, C with so many blocks of 4 tokens."""
    fleet = Fleet()
    for i, blocks in enumerate(num_kv_blocks):
        fleet.add(info_of(i, num_kv_blocks=blocks, max_num_seqs=max_num_seqs))
    return fleet


def busy_fleet_of(*num_kv_blocks: int) -> Fleet:
    """Each runs one request of one block."""
    fleet = fleet_of(*num_kv_blocks)
    for i in fleet.alive_ids():
        fleet.reserve(i, 4)
    return fleet


def selected(fleet: Fleet, num_tokens: int) -> list[int]:
    """Instances with room for a chunk ending with that many tokens."""
    any_selected = fleet.select(num_tokens)
    chosen = [i for i in fleet.alive_ids() if fleet.is_selected(i)]
    assert any_selected == bool(chosen)
    assert not chosen or num_tokens <= fleet.most_tokens()
    return list(chosen)


def test_a_reservation_takes_blocks_and_a_place_until_it_is_released() -> None:
    fleet = fleet_of(10)
    blocks = fleet.reserve(A, 17)
    assert (blocks, fleet.num_free_blocks(A), fleet.num_running(A)) == (5, 5, 1)
    fleet.release(A, blocks)
    assert (fleet.num_free_blocks(A), fleet.num_running(A)) == (10, 0)


def test_reservations_never_exceed_the_blocks() -> None:
    fleet = fleet_of(10)
    fleet.reserve(A, 24)
    with pytest.raises(AssertionError, match="beyond capacity"):
        fleet.reserve(A, 20)
    assert fleet.num_free_blocks(A) == 4


def test_candidates_have_the_blocks_free() -> None:
    fleet = fleet_of(10, 10)
    fleet.reserve(A, 20)  # 5 left
    fleet.reserve(B, 12)  # 7 left
    assert [selected(fleet, n) for n in (20, 21, 28, 29)] == [[0, 1], [1], [1], []]


def test_candidates_have_a_place_free() -> None:
    fleet = fleet_of(10, 10, max_num_seqs=1)
    fleet.reserve(A, 4)
    assert selected(fleet, 4) == [1]
    fleet.reserve(B, 4)
    assert selected(fleet, 4) == []
    assert fleet.most_tokens() == 0


def test_an_idle_instance_takes_even_what_is_larger_than_its_cache() -> None:
    fleet = fleet_of(10)
    assert selected(fleet, 1000) == [0]
    assert fleet.reserve(A, 1000) == 10
    assert selected(fleet, 1) == []


def test_draft_tokens_need_room_too() -> None:
    fleet = Fleet()
    fleet.add(info_of(0, num_kv_blocks=10, num_lookahead_tokens=3))
    fleet.reserve(A, 21)  # 21 + 3 = 6 blocks
    assert [selected(fleet, n) for n in (13, 14)] == [[0], []]


def test_instances_count_in_their_own_blocks() -> None:
    fleet = Fleet()
    fleet.add(info_of(0, num_kv_blocks=10, block_size=4))
    fleet.add(info_of(1, num_kv_blocks=10, block_size=16, num_lookahead_tokens=2))
    fleet.reserve(A, 4)  # 9 blocks of 4 left
    fleet.reserve(B, 16 * 6)  # 3 blocks of 16 left
    assert [selected(fleet, n) for n in (36, 37, 46, 47)] == [[0, 1], [1], [1], []]


def test_the_least_loaded_runs_the_fewest_then_has_the_most_free() -> None:
    fleet = fleet_of(10, 20, 30)
    fleet.select_alive()
    assert fleet.least_loaded() == C
    fleet.reserve(C, 4)
    assert fleet.least_loaded() == B
    fleet.reserve(B, 4)
    assert fleet.least_loaded() == A
    fleet.reserve(A, 4)
    assert fleet.least_loaded() == C


def test_only_candidates_are_least_loaded() -> None:
    fleet = fleet_of(10, 20)
    fleet.reserve(B, 4)
    fleet.reserve(A, 40)
    fleet.release(A, 0)  # idle by count, but nothing free
    fleet.reserve(A, 0)
    fleet.select(8)
    assert fleet.least_loaded() == B


def test_nobody_is_least_loaded_when_nobody_is_selected() -> None:
    fleet = fleet_of(10)
    fleet.reserve(A, 40)
    assert not fleet.select(4)
    with pytest.raises(ValueError, match="empty"):
        fleet.least_loaded()


def test_a_lost_instance_is_no_candidate() -> None:
    fleet = fleet_of(10, 10)
    fleet.select(4)
    fleet.remove(A)
    assert not fleet.is_selected(A)
    assert selected(fleet, 4) == [1]
    assert (fleet.alive_ids(), len(fleet)) == ([B], 1)


def test_what_ran_on_a_lost_instance_releases_nothing() -> None:
    fleet = fleet_of(10)
    blocks = fleet.reserve(A, 20)
    fleet.remove(A)
    fleet.release(A, blocks)
    assert fleet.most_tokens() == 0
    fleet.add(info_of(0, num_kv_blocks=10))
    assert (fleet.num_free_blocks(A), fleet.num_running(A)) == (10, 0)


def test_an_instance_may_come_back_with_another_size() -> None:
    fleet = fleet_of(10, 10)
    fleet.remove(A)
    fleet.add(info_of(0, num_kv_blocks=5, block_size=8))
    fleet.reserve(A, 8)
    fleet.reserve(B, 4)
    assert [selected(fleet, n) for n in (32, 33, 36, 37)] == [[0, 1], [1], [1], []]


def test_an_instance_comes_up_once() -> None:
    fleet = fleet_of(10)
    with pytest.raises(ValueError, match="instance 0: it is up already"):
        fleet.add(info_of(0))


def test_ids_may_have_gaps() -> None:
    fleet = Fleet()
    fleet.add(info_of(5))
    assert fleet.alive_ids() == [5]
    assert selected(fleet, 4) == [5]


def test_an_empty_fleet_has_no_room() -> None:
    fleet = Fleet()
    assert (fleet.most_tokens(), len(fleet), fleet.select_alive()) == (0, 0, False)
    assert not fleet.hold_freest()


def test_the_freest_is_kept_out_until_it_is_let_go() -> None:
    fleet = busy_fleet_of(10, 20)
    assert fleet.hold_freest()
    assert selected(fleet, 4) == [0]
    fleet.hold_none()
    assert selected(fleet, 4) == [0, 1]


def test_one_instance_is_held_at_a_time() -> None:
    fleet = busy_fleet_of(10, 20)
    assert [fleet.hold_freest(), fleet.hold_freest()] == [True, False]
    assert selected(fleet, 4) == [0]


def test_a_held_instance_may_be_lost_and_come_back() -> None:
    fleet = busy_fleet_of(10, 20)
    fleet.hold_freest()
    fleet.remove(B)
    assert selected(fleet, 4) == [0]
    fleet.hold_none()
    assert selected(fleet, 4) == [0]
    fleet.add(info_of(1, num_kv_blocks=20))
    assert selected(fleet, 4) == [0, 1]


MIXED = (KvGroup(4), KvGroup(4, 2), KvGroup(8, 2, 1))


@pytest.mark.parametrize("groups", [MIXED, MIXED[1:], (KvGroup(4, 3),)])
@pytest.mark.parametrize("lookahead", [0, 3])
def test_most_tokens_of_a_model_with_several_groups_is_the_most_that_fits(
    groups: tuple[KvGroup, ...], lookahead: int
) -> None:
    info = info_of(0, num_kv_blocks=30, kv_groups=groups)
    info = replace(info, num_lookahead_tokens=lookahead)
    fleet = Fleet()
    fleet.add(info)
    fleet.reserve(A, 4)
    while fleet.num_free_blocks(A):
        most = fleet.most_tokens()
        fits = [n for n in range(200) if fleet.select(n)]
        assert fits == list(range(min(200, most + 1))) or not most
        fleet.reserve(A, 1, info.blocks_for(1) - 1)  # one block less


def test_a_model_with_several_groups_reserves_for_all() -> None:
    fleet = Fleet()
    info = info_of(0, num_kv_blocks=30, kv_groups=MIXED)
    fleet.add(info)
    assert fleet.reserve(A, 20) == info.blocks_for(20) == 5 + 2 + 3
    assert fleet.num_free_blocks(A) == 20
    assert fleet.reserve(A, 20, 3) == 7
    assert fleet.fits(A, 32)
    assert not fleet.fits(A, 33)
    assert fleet.fits(A, 33, 1)


def test_instances_of_different_groups_are_each_counted_by_their_own() -> None:
    fleet = Fleet()
    fleet.add(info_of(0, num_kv_blocks=10))
    fleet.add(info_of(1, num_kv_blocks=10, kv_groups=MIXED))
    for i in (A, B):
        fleet.reserve(i, 1, 100)
    assert selected(fleet, 8) == [A, B]
    assert selected(fleet, 25) == [A]
    assert fleet.most_tokens() == 40


@pytest.mark.parametrize("group", [(0, -1, 0), (4, -2, 0), (4, -1, -1)])
def test_numbers_of_a_group_that_make_no_sense_are_refused(
    group: tuple[int, int, int],
) -> None:
    with pytest.raises(ValueError, match="group"):
        Capacity().add_instance(
            A,
            pool=-1,
            node=0,
            num_kv_blocks=1,
            block_size=4,
            num_lookahead_tokens=0,
            max_num_seqs=1,
            kv_groups=[group],
        )
