"""Who fetches an update's files from whom."""

from __future__ import annotations

from aseer.node.chain import (
    MAX_GIVEN_UP,
    Chain,
    Chains,
    Files,
    Giver,
    Member,
    late_at_s,
)


class Cluster:
    """Nodes, each of which can give, in the order in which they come."""

    def __init__(self, num: int) -> None:
        self.givers = [Giver(f"n{i}", f"tcp://10.0.0.{i}:1") for i in range(num)]
        self.chain = Chain(b"key", Files("1", [], []))
        self.members: dict[str, Member] = {}

    def join(self, number: int, now_s: float = 0.0) -> str:
        """The name of whom the node fetches from; "" = the controller's host."""
        giver = self.givers[number]
        member = self.chain.join(giver, "1", now_s, lambda: None)
        self.members[giver.name] = member
        return member.source.giver.name if member.source else ""

    def done(self, number: int, now_s: float, *, gave_up: bool = False) -> list[str]:
        member = self.members[f"n{number}"]
        takers = self.chain.done(member, now_s, gave_up=gave_up)
        return [taker.giver.name for taker in takers]


def test_nodes_that_fetch_at_the_same_time_form_a_chain() -> None:
    cluster = Cluster(5)
    assert [cluster.join(i) for i in range(5)] == ["", "n0", "n1", "n2", "n3"]


def test_a_late_node_fetches_from_one_that_has_all_and_gives_to_nobody() -> None:
    cluster = Cluster(6)
    for number in range(3):
        cluster.join(number)
    cluster.done(0, 10.0)
    assert cluster.join(3, 11.0) == "n2", "n0 and n1 give to others"
    for number in (1, 2):
        cluster.done(number, 12.0)
    assert cluster.join(4, 13.0) == "n1", "n2 gives to n3, and n3 has not all yet"
    assert cluster.join(5, 13.0) == "n0"


def test_nodes_that_give_nothing_or_were_given_up_are_passed_over() -> None:
    cluster = Cluster(4)
    cluster.givers[0].address = ""
    cluster.givers[1].num_given_up = MAX_GIVEN_UP
    assert [cluster.join(i) for i in range(4)] == ["", "", "", "n2"]


def test_a_node_is_given_up_so_often_in_a_row_and_no_more() -> None:
    cluster = Cluster(2)
    giver = cluster.givers[0]
    for _ in range(MAX_GIVEN_UP - 1):
        cluster.chain = Chain(b"key", Files("1", [], []))
        assert [cluster.join(i) for i in range(2)] == ["", "n0"]
        cluster.done(1, 1.0, gave_up=True)
    assert giver.is_able
    cluster.done(1, 1.0)
    assert giver.num_given_up == 0
    for _ in range(MAX_GIVEN_UP):
        cluster.done(1, 1.0, gave_up=True)
    assert not giver.is_able
    cluster.done(0, 1.0, gave_up=True)  # by the controller's host: it is nobody's fault


def test_who_has_left_gives_nothing() -> None:
    cluster = Cluster(3)
    assert [cluster.join(i) for i in range(2)] == ["", "n0"]
    for name in ("n0", "n1"):
        assert not cluster.chain.is_empty
        cluster.chain.leave(cluster.members[name])
        cluster.chain.leave(cluster.members[name])
    assert cluster.chain.is_empty
    assert cluster.join(2) == ""


def test_when_a_node_is_late_is_known_once_its_neighbour_has_all() -> None:
    cluster = Cluster(4)
    for number in range(3):
        cluster.join(number, 100.0)
    first, second, third = cluster.members.values()
    assert [late_at_s(each) for each in (first, second, third)] == [None] * 3
    assert cluster.done(0, 120.0) == ["n1"]
    assert late_at_s(second) == 100.0 + 1.5 * 20.0 + 2.0
    assert late_at_s(third) is None
    assert cluster.done(2, 121.0) == []
    assert cluster.done(1, 121.0) == [], "n2 has all already"
    cluster.join(3, 500.0)
    assert late_at_s(cluster.members["n3"]) == 500.0 + 1.5 * 21.0 + 2.0


def test_an_update_is_told_by_what_has_changed_since_the_last_of_the_same_sizes() -> (
    None
):
    chains = Chains(has_bases=True)
    one, two, other, three = (
        Files(name, [f"/{name}"], [size])
        for name, size in (("1", 8), ("2", 8), ("adapters", 2), ("3", 8))
    )
    found = [chains.of(files, lambda: b"key") for files in (one, two, other, three)]
    assert [chain.base for chain in found] == [None, one, None, two]
    assert chains.of(two, lambda: b"another key") is found[1]
    assert Chains().of(one, lambda: b"key").base is None
    chains.has_bases = False
    assert chains.of(Files("4", ["/4"], [8]), lambda: b"key").base is None
