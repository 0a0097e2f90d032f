"""The requests that wait for their next chunk, in a policy's order and by age.

`WaitingQueue` asks the rank functions and keeps the requests; their order is kept in
C++ (`csrc/waiting.h`): groups by the rank of their first request, and in each group its
requests. Ranks are computed before anything changes, so a rank function that raises
leaves the queue as it was.

There may be two orders. Both are kept up to date, so that going from one to the other
takes no time, however many requests wait.

A *round* is one search for work that fits. A request that fits nowhere is passed over
for the round, and its group with it (siblings are alike), until `MAX_PASSED` groups
were. How many tokens the first request of a group needs is remembered, so that the next
rounds, which usually meet it again and can offer no more, pass it over unseen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aseer.core._native import MAX_PASSED, WaitingOrders, untracked

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.types import GroupId, RequestId

__all__ = ["MAX_PASSED", "Rank", "Waiting", "WaitingQueue"]

Rank = tuple[int, ...]  # at most 4


class Waiting(NamedTuple):
    """A request that waits for its next chunk, as a policy sees it.

    Attributes:
        arrival: order in which requests came, kept over chunks.
        num_tokens: prompt and generated; remaining: the most it may still generate.
        known_length: the response's true length if known beforehand, else None.
        is_new: it has not generated a whole chunk's tokens yet.
    """

    request_id: RequestId
    group_id: GroupId
    arrival: int
    is_probe: bool
    num_tokens: int
    num_generated: int
    remaining: int
    divisible: bool = True
    known_length: int | None = None
    is_new: bool = False


class _Group:
    """A group of which something waits."""

    __slots__ = ("handle", "length_estimate")

    def __init__(self, handle: int, length_estimate: int) -> None:
        self.handle = handle
        self.length_estimate = length_estimate


class WaitingQueue:
    """Waiting requests by rank and by age."""

    def __init__(
        self,
        rank: Callable[[Waiting, int], Rank],
        other: Callable[[Waiting, int], Rank] | None = None,
    ) -> None:
        """Start empty, in the first order.

        Args:
            rank: lowest `rank(request, length estimate of its group)` first, siblings
                among each other as if their estimate were 0. No two rank the same.
            other: of a second order.

        `orders` is the order itself; what is asked most often is asked there.
        """
        self._rank = rank
        self._other = other
        self.orders = WaitingOrders(1 if other is None else 2)
        self._handles: dict[RequestId, int] = {}
        self._waiting: list[Waiting | None] = untracked([])  # by handle
        self._groups: dict[GroupId, _Group] = {}
        self._first = self.orders.first
        self.begin_round = self.orders.begin_round
        self.pass_over = self.orders.pass_over

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._handles

    @property
    def num_passed(self) -> int:
        """Groups passed over in this round."""
        return self.orders.num_passed

    def choose(self, order: int) -> None:
        """Go by that one of the ranks from now on."""
        self.orders.choose(order)

    def add(self, request: Waiting, length_estimate: int) -> None:
        """Take a request that waits.

        Raises:
            ValueError: it waits already.
        """
        rank, other = self._rank, self._other
        own, lead = [rank(request, 0)], [rank(request, length_estimate)]
        if other is not None:
            own.append(other(request, 0))
            lead.append(other(request, length_estimate))
        request_id, group_id = request.request_id, request.group_id
        if request_id in self._handles:
            raise ValueError(f"request {request_id!r} waits already")
        group = self._groups.get(group_id)
        if group is not None and group.length_estimate != length_estimate:
            self.set_length_estimate(group_id, length_estimate)
        handle, of_group = self.orders.add(
            -1 if group is None else group.handle, own, lead
        )
        self._handles[request_id] = handle
        if handle < len(self._waiting):
            self._waiting[handle] = request
        else:
            self._waiting.append(request)
        if group is None:
            self._groups[group_id] = untracked(_Group(of_group, length_estimate))
            untracked(self._groups)

    def set_length_estimate(self, group_id: GroupId, length_estimate: int) -> None:
        """Re-rank a group whose estimate changed."""
        group = self._groups.get(group_id)
        if group is None:
            return
        leads = {}
        for handle in self.orders.members(group.handle):
            request = self._request(handle)
            leads[handle] = [self._rank(request, length_estimate)]
            if self._other is not None:
                leads[handle].append(self._other(request, length_estimate))
        self.orders.set_leads(group.handle, leads)
        group.length_estimate = length_estimate

    def length_estimate(self, group_id: GroupId) -> int:
        """Of a group of which something waits.

        Raises:
            KeyError: nothing does.
        """
        return self._groups[group_id].length_estimate

    def remove(self, request: Waiting) -> None:
        """A request waits no more.

        Raises:
            KeyError: it does not wait.
        """
        handle = self._handles.pop(request.request_id)
        self._waiting[handle] = None
        if self.orders.remove(handle):
            del self._groups[request.group_id]

    def remove_group(self, group_id: GroupId) -> None:
        """Drop a group and its waiting requests."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return
        for handle in self.orders.members(group.handle):
            del self._handles[self._request(handle).request_id]
            self._waiting[handle] = None
        self.orders.remove_group(group.handle)

    def oldest(self) -> Waiting | None:
        """The request that has waited longest."""
        handle = self.orders.oldest()
        return None if handle < 0 else self._waiting[handle]

    def head(self, num_groups: int) -> list[Waiting]:
        """The first request of each of the first groups, in order."""
        return [self._request(handle) for handle in self.orders.head(num_groups)]

    def first(self, room: int) -> Waiting | None:
        """The first request of the first group that this round has not passed over.

        Args:
            room: groups whose first is known to need more tokens are passed over.
        """
        handle = self._first(room)
        return None if handle < 0 else self._waiting[handle]

    def _request(self, handle: int) -> Waiting:
        request = self._waiting[handle]
        assert request is not None
        return request
