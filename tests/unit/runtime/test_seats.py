"""Gangs of nodes: as many as there can be, anew when nodes come and go."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from aseer.runtime.seats import Seats


def names(gangs: list[list[tuple[str, int]]]) -> list[str]:
    return ["".join(node for node, _ in gang) for gang in gangs]


def test_too_few_nodes_form_none_and_wait() -> None:
    seats: Seats[str, int] = Seats(2)
    seats.add("a", [0], "kind")
    assert seats.form() == []
    assert seats.waiting == ["a"]
    seats.add("b", [0], "kind")
    assert names(seats.form()) == ["ab"]
    assert seats.waiting == []
    assert seats.form() == []


def test_a_gang_takes_one_seat_of_each_node_and_nodes_take_turns_to_lead() -> None:
    seats: Seats[str, int] = Seats(2)
    for node in "ab":
        seats.add(node, [0, 1, 2], "kind")
    gangs = seats.form()
    assert names(gangs) == ["ab", "ba", "ab"]
    assert [seat for gang in gangs for _, seat in gang] == [0, 0, 1, 1, 2, 2]


def test_a_team_takes_as_many_seats_of_a_node_as_it_needs() -> None:
    seats: Seats[str, int] = Seats(4, of_one_node=None)
    seats.add("a", [0, 1], "kind")
    seats.add("b", [0], "kind")
    assert seats.form() == []
    seats.add("c", [0, 1, 2, 3, 4], "kind")
    first, second = seats.form()
    assert names([first]) == ["cccc"], "on one node, where there is room"
    assert second == [("a", 0), ("a", 1), ("b", 0), ("c", 4)]
    assert seats.waiting == []


def test_seats_of_a_team_that_is_no_more_are_free_again() -> None:
    seats: Seats[str, int] = Seats(3, of_one_node=None)
    seats.add("a", [0, 1], "kind")
    seats.add("b", [0, 1], "kind")
    (team,) = seats.form()
    assert names([team]) == ["aab"]
    seats.keep(["b"])
    seats.release(team)
    assert seats.form() == []
    seats.add("c", [7], "kind")
    assert sorted(seats.form()[0]) == [("b", 0), ("b", 1), ("c", 7)]


def test_nodes_of_another_kind_form_none() -> None:
    seats: Seats[str, int] = Seats(2)
    seats.add("a", [0], "0.32")
    seats.add("b", [0], "0.33")
    assert seats.form() == []
    seats.add("c", [0], "0.32")
    assert names(seats.form()) == ["ac"]
    assert seats.waiting == ["b"]


def test_when_a_node_is_gone_the_rest_of_its_gang_joins_another() -> None:
    seats: Seats[str, int] = Seats(2)
    for node in "abc":
        seats.add(node, [0], "kind")
    (gang,) = seats.form()
    assert names([gang]) == ["ab"]
    seats.keep(["b", "c"])
    assert seats.form() == [], "its seat is taken until all of the gang has ended"
    seats.release(gang)
    assert names(seats.form()) == ["bc"]


def test_nodes_that_are_apart_form_gangs_with_others_until_they_meet() -> None:
    seats: Seats[str, int] = Seats(2)
    for node in "abc":
        seats.add(node, [0], "kind")
    seats.part("a", "b")
    seats.part("b", "a")
    (gang,) = seats.form()
    assert names([gang]) == ["ac"]
    seats.release(gang)
    seats.part("a", "c")
    assert names(seats.form()) == ["bc"], "one that reaches nobody is in nobody's way"
    seats.add("d", [0], "kind")
    seats.part("a", "d")
    assert seats.form() == []
    seats.meet("a", "d")
    assert names(seats.form()) in (["ad"], ["da"])


def test_of_three_all_reach_each_other() -> None:
    seats: Seats[str, int] = Seats(3)
    for node in "abc":
        seats.add(node, [0], "kind")
    seats.part("b", "c")
    assert seats.form() == []
    seats.add("d", [0], "kind")
    (gang,) = seats.form()
    assert {node for node, _ in gang} in ({*"bad"}, {*"acd"})


def test_a_node_that_comes_again_is_another() -> None:
    seats: Seats[object, int] = Seats(2)
    first, again, other = object(), object(), object()
    seats.add(first, [0], "kind")
    seats.add(other, [0], "kind")
    (gang,) = seats.form()
    seats.keep([other])
    seats.add(again, [0], "kind")
    seats.release(gang)
    (gang,) = seats.form()
    assert {node for node, _ in gang} == {again, other}
    assert seats.waiting == []


@pytest.mark.parametrize("seed", range(30))
def test_there_are_as_many_gangs_as_there_can_be(seed: int) -> None:
    """m gangs of k nodes are possible if and only if what nodes can give to m gangs,
    each at most m seats, adds up to m times k.
    """
    rng = Random(seed)
    num = rng.randrange(2, 5)
    free = {str(i): rng.randrange(1, 6) for i in range(rng.randrange(1, 9))}
    seats: Seats[str, int] = Seats(num)
    for node, size in free.items():
        seats.add(node, range(size), "kind")
    gangs = seats.form()
    for gang in gangs:
        assert len({node for node, _ in gang}) == num
    used = Counter(member for gang in gangs for member in gang)
    assert all(times == 1 for times in used.values())
    one_more = len(gangs) + 1
    assert sum(min(size, one_more) for size in free.values()) < one_more * num
