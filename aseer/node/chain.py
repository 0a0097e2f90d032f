"""From whom each node fetches an update's files: the nodes that do so form a chain.

The first takes them from the controller's host; each other takes every block from the
node before it, as soon as that one has it. So the controller's host sends them once,
however many nodes there are, and the last node has them hardly later than the first.
A node that comes later takes them from one that gives to nobody else just then. Pure.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# How many nodes in a row may give a node up until it is asked no more: one stall is an
# accident, and a firewall between hosts stays.
MAX_GIVEN_UP = 3
# A node should take this much longer than its neighbour took, at most. If it does, the
# way between them is the slow one.
_LATE_FACTOR = 1.5
_LATE_S = 2.0


@dataclass(eq=False, slots=True)
class Giver:
    """A node as others know it that fetch from it.

    Attributes:
        name: of the node.
        address: where it gives; "" = nowhere.
        num_given_up: how many in a row gave it up.
    """

    name: str
    address: str = ""
    num_given_up: int = 0

    @property
    def is_able(self) -> bool:
        """Whether another node may be sent to it."""
        return bool(self.address) and self.num_given_up < MAX_GIVEN_UP


@dataclass(eq=False, slots=True)
class Member:
    """A node that has an update's files, or fetches them.

    Attributes:
        giver: the node. folder: where it has them.
        began_s, took_s: when it began to fetch, and how long that took; None = it goes
            on.
        source: from whom it fetches; None = from the controller's host.
        hurry: has it take the rest from there.
    """

    giver: Giver
    folder: str
    began_s: float
    source: Member | None
    hurry: Callable[[], None]
    took_s: float | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """An update's files where it began: how it is known, their paths and sizes."""

    name: str
    paths: list[str]
    sizes: list[int]


@dataclass(eq=False, slots=True)
class Chain:
    """The nodes that have an update's files, or fetch them.

    Attributes:
        key: of the digests that tell its blocks from all others.
        files: of the update.
        base: of an earlier one, since which not much has changed; None = there is none.
    """

    key: bytes
    files: Files
    base: Files | None = None
    _members: list[Member] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether no node has them, or fetches them."""
        return not self._members

    def join(
        self, giver: Giver, folder: str, now_s: float, hurry: Callable[[], None]
    ) -> Member:
        """A node is to fetch the files; from whom it does."""
        member = Member(giver, folder, now_s, self._least_busy(), hurry)
        self._members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """It has the files no more, or never will."""
        if member in self._members:
            self._members.remove(member)

    def done(self, member: Member, now_s: float, *, gave_up: bool) -> list[Member]:
        """A node has the files; the nodes that fetch them from it.

        Args:
            gave_up: whether it took some from the controller's host instead.
        """
        member.took_s = now_s - member.began_s
        if member.source is not None:
            giver = member.source.giver
            giver.num_given_up = giver.num_given_up + 1 if gave_up else 0
        return [m for m in self._members if m.source is member and m.took_s is None]

    def _least_busy(self) -> Member | None:
        """Who gives to the fewest; of these, who has all; of these, who came last."""
        able = [member for member in self._members if member.giver.is_able]
        num_takers = Counter(m.source for m in self._members if m.took_s is None)
        return min(
            reversed(able),
            key=lambda member: (num_takers[member], member.took_s is None),
            default=None,
        )


def late_at_s(member: Member) -> float | None:
    """When a node is to take the rest from the controller's host; None = not yet known.

    It is known once its neighbour has all.
    """
    source = member.source
    if source is None or source.took_s is None:
        return None
    return member.began_s + _LATE_FACTOR * source.took_s + _LATE_S


class Chains(dict[str, Chain]):
    """The chains of all updates whose files nodes have, or fetch, by their names."""

    def __init__(self, *, has_bases: bool = False) -> None:
        """Start with none.

        Args:
            has_bases: whether blocks may be told by what has changed.
        """
        super().__init__()
        self.has_bases = has_bases

    def of(self, files: Files, new_key: Callable[[], bytes]) -> Chain:
        """The chain of an update; a new one if nobody has fetched its files yet.

        Its base is the update before it whose files have the same sizes.
        """
        if files.name not in self:
            earlier = [c.files for c in self.values() if self.has_bases]
            alike = [f for f in reversed(earlier) if f.sizes == files.sizes]
            self[files.name] = Chain(new_key(), files, next(iter(alike), None))
        return self[files.name]
