"""The requests that wait for their next chunk, in a policy's order and by age.

A heap of groups by the rank of their head, and in each group a heap of its requests:
when a group's length estimate changes, one entry moves. Entries that no longer hold are
dropped when they surface.

A *round* is one search for work that fits. A request that fits nowhere is passed over
for the round, and its group with it (siblings are alike). Heads that were passed over
stay out of the heap, in order and with the tokens they need, so that the next rounds,
which usually meet them again and can offer no more, pass them over by comparing a
number.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.types import GroupId, RequestId

MAX_PASSED = 2  # groups passed over in a round until it ends
_NUM_STALE = 1024  # entries without meaning that are tolerated beside as many as groups

Rank = tuple[int, ...]
# Flat, since a nested tuple is compared twice and kept apart: the rank of a request,
# and the request; the rank of a group's head, the group's version, and the group.
_Entry = tuple[Any, ...]
_Head = tuple[Any, ...]


class Waiting(NamedTuple):
    """A request that waits for its next chunk, as a policy sees it.

    Attributes:
        arrival: order in which requests came, kept over chunks.
        num_tokens: prompt and generated; remaining: the most it may still generate.
        known_length: the response's true length if known beforehand, else None.
    """

    request_id: RequestId
    group_id: GroupId
    group_size: int
    arrival: int
    is_probe: bool
    num_tokens: int
    num_generated: int
    remaining: int
    divisible: bool = True
    known_length: int | None = None


class WaitingQueue:
    """Waiting requests by rank and by age."""

    def __init__(self, rank: Callable[[Waiting, int], Rank]) -> None:
        """Start empty; lowest `rank(request, length estimate of its group)` first.

        No two requests rank the same, and a group's estimate does not change the order
        of its requests.
        """
        self._rank = rank
        self._waiting: OrderedDict[RequestId, Waiting] = OrderedDict()  # oldest first
        self._groups: dict[GroupId, _Group] = {}
        self._heads: list[_Head] = []
        self._passed: list[_Head] = []  # sorted when a round begins
        self.num_passed = 0  # in this round: the first of them
        self._num_entered = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._waiting

    def add(self, request: Waiting, length_estimate: int) -> None:
        """Take a request that waits.

        Raises:
            ValueError: it waits already.
        """
        if request.request_id in self._waiting:
            raise ValueError(f"request {request.request_id!r} waits already")
        self._waiting[request.request_id] = request
        group = self._groups.get(request.group_id)
        if group is None:
            group = self._groups[request.group_id] = _Group()
        changed = group.length_estimate != length_estimate
        group.length_estimate = length_estimate
        heapq.heappush(group.heap, (*self._rank(request, 0), request))
        if changed or group.heap[0][-1] is request:
            self._push_head(group)

    def set_length_estimate(self, group_id: GroupId, length_estimate: int) -> None:
        """Re-rank a group whose estimate changed."""
        group = self._groups.get(group_id)
        if group is not None:
            group.length_estimate = length_estimate
            self._push_head(group)

    def remove(self, request: Waiting) -> None:
        """A request waits no more."""
        del self._waiting[request.request_id]
        group = self._groups[request.group_id]
        if group.heap[0][-1] is request:
            self._push_head(group)

    def remove_group(self, group_id: GroupId) -> None:
        """Drop a group and its waiting requests."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return
        group.version = 0
        for entry in group.heap:
            request: Waiting = entry[-1]
            if self._waiting.get(request.request_id) is request:
                del self._waiting[request.request_id]

    def oldest(self) -> Waiting | None:
        """The request that has waited longest."""
        return next(iter(self._waiting.values()), None)

    # A round

    def begin_round(self) -> None:
        """Nothing is passed over yet."""
        self.num_passed = 0
        passed = self._passed
        passed.sort()
        while len(passed) > MAX_PASSED:
            heapq.heappush(self._heads, passed.pop())

    def first(self, room: int) -> Waiting | None:
        """The first request of the first group that this round has not passed over.

        Args:
            room: heads known to need more tokens are passed over.
        """
        passed, heads, at = self._passed, self._heads, self.num_passed
        first = None
        while at < MAX_PASSED:
            if at < len(passed) and not (heads and heads[0] < passed[at]):
                head = passed[at]
            elif heads:
                head = heapq.heappop(heads)
                passed.insert(at, head)
            else:
                break
            group = head[-1]
            if group.version != head[-2]:
                del passed[at]
            elif group.needs > room:
                at += 1
            else:
                first = group.heap[0][-1]
                break
        self.num_passed = at
        return first

    def pass_over(self, needs: int) -> None:
        """What `first` gave does not fit: it needs room for that many tokens."""
        self._passed[self.num_passed][-1].needs = needs
        self.num_passed += 1

    def _push_head(self, group: _Group) -> None:
        """Enter a group among the heads anew: its head or its rank changed."""
        heap, waiting = group.heap, self._waiting
        while heap:
            head = heap[0][-1]
            if waiting.get(head.request_id) is head:
                break
            heapq.heappop(heap)
        self._num_entered = version = self._num_entered + 1
        group.version = version
        group.needs = 0
        if heap:
            rank = self._rank(head, group.length_estimate)
            heapq.heappush(self._heads, (*rank, version, group))
            if len(self._heads) > 2 * len(self._groups) + _NUM_STALE:
                self._drop_stale()

    def _drop_stale(self) -> None:
        self._heads = [head for head in self._heads if head[-1].version == head[-2]]
        heapq.heapify(self._heads)


class _Group:
    """A group's waiting requests.

    Attributes:
        version: tells its live entry among the heads; 0 = it has none.
        needs: tokens its head needs room for, if it did not fit; else 0.
    """

    __slots__ = ("heap", "length_estimate", "needs", "version")

    def __init__(self) -> None:
        self.heap: list[_Entry] = []
        self.length_estimate = -1
        self.needs = 0
        self.version = 0
