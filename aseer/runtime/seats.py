"""Which nodes form a gang: they run one instance together, or several that compute
together. Pure.

A node has a seat for each engine that it could run, or run a part of. A gang takes
seats of its nodes, which are all of one kind: one of each, or as many as they have.
A node may be in as many gangs as it has seats. Nodes with most free seats go first: so
there are as many gangs as there can be, each on as few nodes as can be. Nodes that do
not reach each other are in no gang together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable

Node = TypeVar("Node")
Seat = TypeVar("Seat")


@dataclass(slots=True)
class _Place(Generic[Seat]):
    kind: Hashable
    free: list[Seat]
    num_led: int = 0


class Seats(Generic[Node, Seat]):
    """Of all nodes, in the order in which they came."""

    def __init__(self, seats_per_gang: int, *, of_one_node: int | None = 1) -> None:
        """There are no nodes yet.

        Args:
            of_one_node: the most seats that a gang takes of a node; None = any number.
        """
        self._num = seats_per_gang
        self._of_one_node = of_one_node
        self._places: dict[Node, _Place[Seat]] = {}
        self._apart: list[frozenset[Node]] = []

    def add(self, node: Node, seats: Iterable[Seat], kind: Hashable) -> None:
        """A node has come.

        Args:
            kind: of the node; nodes of different kinds form no gang.
        """
        self._places[node] = _Place(kind, list(seats))

    def keep(self, nodes: Collection[Node]) -> None:
        """These are left, and none beside them."""
        self._places = {n: place for n, place in self._places.items() if n in nodes}

    def part(self, one: Node, other: Node) -> None:
        """Two nodes do not reach each other."""
        self._apart.append(frozenset((one, other)))

    def meet(self, one: Node, other: Node) -> None:
        """What was told of two nodes by a `part` is over."""
        self._apart.remove(frozenset((one, other)))

    def form(self) -> list[list[tuple[Node, Seat]]]:
        """All gangs that free seats are enough for, which they take; leaders first."""
        gangs = []
        kinds = {place.kind: None for place in self._places.values()}
        for kind in kinds:
            while self._room(found := self._most_free(kind)) >= self._num:
                found.sort(key=lambda node: self._places[node].num_led)
                self._places[found[0]].num_led += 1
                gangs.append(self._take(found))
        return gangs

    def release(self, gang: Iterable[tuple[Node, Seat]]) -> None:
        """A gang is no more: the seats of its nodes that are left are free again."""
        for rank, (node, seat) in enumerate(gang):
            place = self._places.get(node)
            if place is not None:
                place.free.append(seat)
                place.num_led -= rank == 0

    @property
    def waiting(self) -> list[Node]:
        """Nodes with free seats."""
        return [node for node, place in self._places.items() if place.free]

    def _most_free(self, kind: Hashable) -> list[Node]:
        """As many nodes of a kind as form a gang, if they have the seats for one."""
        able = [n for n, p in self._places.items() if p.free and p.kind == kind]
        able.sort(key=lambda node: -len(self._places[node].free))
        found: list[Node] = []
        for first in able:  # else one that reaches nobody would be in everyone's way
            found = [first]
            for node in able:
                met = all(frozenset((node, each)) not in self._apart for each in found)
                if node not in found and met:
                    found.append(node)
                if self._room(found) >= self._num:
                    return found
        return found

    def _room(self, nodes: Iterable[Node]) -> int:
        """How many seats a gang of these could have."""
        most = self._num if self._of_one_node is None else self._of_one_node
        return sum(min(most, len(self._places[node].free)) for node in nodes)

    def _take(self, nodes: Iterable[Node]) -> list[tuple[Node, Seat]]:
        gang: list[tuple[Node, Seat]] = []
        for node in nodes:
            free = self._places[node].free
            num = min(self._room([node]), self._num - len(gang))
            gang += [(node, free.pop(0)) for _ in range(num)]
        return gang
