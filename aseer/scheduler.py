"""Who runs next, where, and for how many tokens.

A *policy* is a pure function, `rank` (which waiting request goes first), a way to
place, maybe another function, `expect` (how long a response becomes), and two switches:
whether requests are divided into chunks, and whether KV is reserved before a chunk is
admitted. The `Scheduler` keeps waiting requests in the policy's order and turns free
capacity into assignments; what siblings share of their prompt's KV is reserved once
(`aseer.prompts`). It has no clock, no randomness and no I/O, so a sequence of calls is
a trace that replays.

    context-aware           waiting probes first; then who is expected to be longest,
                            by the group's length estimate (Seer, Alg. 2)
    fcfs                    arrival order (divided rollout alone)
    longest-first           most tokens left first, by lengths known beforehand
                            (an oracle)
    group-round-robin       whole groups in turn (veRL in the Seer paper)
    least-loaded            each request to the instance with the fewest (verl today)
    group-least-unfinished  whole groups to the instance with the fewest (OpenRLHF)

The last three are baselines: everything is handed to the engines at once, undivided and
without reservation, and the engines' own queue and preemption do the rest.

Placement (Seer §3.2: affinity while loads are even, else the least loaded). Ours
replaces the paper's fixed spread of 32 requests by a price: staying with the KV is
worth one request of imbalance for every `RECOMPUTE_TOKENS_PER_REQUEST` tokens that
would have to be computed again, which is 0 where a shared pool has them.

Context-aware scheduling differs from the paper's in three points. Whatever its group's
estimate, a request is expected to become at least twice as long as it is, so that the
one long response of a group of short ones does not wait behind longer groups until the
end. And of those alike the one with the most tokens goes first, not the one with the
fewest: who runs goes on, and fewer change places, each time at the price of loading
(or, without a pool, computing) KV. Last, a chunk is no longer than what the response is
expected to take: short responses reserve little, however large chunks may be.

Where siblings turn out not to be alike (`aseer.context`), their group's estimate is
relied on less: every request first runs for a whole chunk, long groups first, so that
none is found to be long at the end; after that those with the most expected to be left
go first, and a request is expected to become at least five times as long as it is. What
is left is compared by its power of two, and who runs goes on within that, again for the
sake of KV.

Starvation (the paper gives no rate): every `starvation_interval`-th assignment is owed
to the request that has waited longest, and stays owed until there is room for it.

A request that fits nowhere is passed over, with its group, but not overtaken for good:
the instance with the most free KV is kept for the first of them while the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from aseer.fleet import Fleet
from aseer.prompts import SharedPrompts
from aseer.types import Assignment
from aseer.waiting import Rank, Waiting, WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aseer.config import PolicyName
    from aseer.types import GroupId, InstanceId, InstanceInfo, RequestId

Placement = Literal[
    "affinity", "group-round-robin", "least-loaded", "group-least-unfinished"
]

RECOMPUTE_TOKENS_PER_REQUEST = 256
AT_LEAST = 2  # times as long as it is, a request is expected to become,
AT_LEAST_UNLIKE = 5  # and where siblings are unlike
_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Policy:
    """How to order and place; see the module's table.

    Attributes:
        expect: the tokens a response will have in the end, from what is known of it and
            its group's length estimate; None = the policy does not ask.
        if_unlike: what takes its place where siblings are not alike; None = nothing.
    """

    name: PolicyName
    rank: Callable[[Waiting, int], Rank]
    placement: Placement
    divided: bool = True
    reserves_kv: bool = True
    expect: Callable[[Waiting, int], int] | None = None
    if_unlike: Policy | None = None


def expect_like_group(request: Waiting, length_estimate: int) -> int:
    """As long as the group's estimate, but at least twice as long as it is."""
    return _expect_at_least(AT_LEAST, request, length_estimate)


def expect_unlike(request: Waiting, length_estimate: int) -> int:
    """As long as the group's estimate, but at least five times as long as it is."""
    return _expect_at_least(AT_LEAST_UNLIKE, request, length_estimate)


def _expect_at_least(times: int, request: Waiting, length_estimate: int) -> int:
    generated = request.num_generated
    at_least = min(times * generated, generated + request.remaining)
    return max(length_estimate, at_least)


def expect_known(request: Waiting, length_estimate: int) -> int:
    """What is known beforehand; the estimate where nobody knows."""
    length = request.known_length
    return length_estimate if length is None else length


def rank_context_aware(request: Waiting, length_estimate: int) -> Rank:
    """Probes as they came, the rest by the longest expected first."""
    if request.is_probe:
        return (0, request.arrival)
    expected = expect_like_group(request, length_estimate)
    return (1, -expected, -request.num_generated, request.arrival)


def rank_unlike(request: Waiting, length_estimate: int) -> Rank:
    """Probes as they came, then who is new, then by the tokens expected to be left."""
    if request.is_probe:
        return (0, request.arrival)
    generated = request.num_generated
    if request.is_new:
        return (1, -length_estimate, request.arrival)
    left = expect_unlike(request, length_estimate) - generated
    return (2, -left.bit_length(), -generated, request.arrival)


def rank_fcfs(request: Waiting, length_estimate: int) -> Rank:
    """By arrival."""
    del length_estimate
    return (request.arrival,)


def rank_longest_first(request: Waiting, length_estimate: int) -> Rank:
    """By the tokens that are really left."""
    left = expect_known(request, length_estimate) - request.num_generated
    return (-left, request.arrival)


POLICIES: Mapping[PolicyName, Policy] = {
    p.name: p
    for p in (
        Policy(
            "context-aware",
            rank_context_aware,
            "affinity",
            expect=expect_like_group,
            if_unlike=Policy(
                "context-aware", rank_unlike, "affinity", expect=expect_unlike
            ),
        ),
        Policy("fcfs", rank_fcfs, "affinity"),
        Policy("longest-first", rank_longest_first, "affinity", expect=expect_known),
        Policy("group-round-robin", rank_fcfs, "group-round-robin", False, False),
        Policy("least-loaded", rank_fcfs, "least-loaded", False, False),
        Policy(
            "group-least-unfinished", rank_fcfs, "group-least-unfinished", False, False
        ),
    )
}


def chunk_tokens(
    num_tokens: int, remaining: int, chunk_size: int, granularity: int
) -> int:
    """How many tokens a chunk may generate.

    A chunk that does not end its request ends where prompt + generated = k x
    granularity + 1: all KV that the next chunk needs is then in full blocks, and it
    computes one token.

    Args:
        num_tokens: prompt and generated tokens at its start.
        chunk_size: 0 = no limit.
        granularity: of KV reuse, in tokens (an engine's block size, or the pool's).
    """
    if not chunk_size or remaining <= chunk_size:
        return remaining
    end = (num_tokens + chunk_size - 1) // granularity * granularity + 1
    if end <= num_tokens:
        end += granularity
    return min(remaining, end - num_tokens)


def place_by_affinity(holders: Mapping[InstanceId, int], room: Fleet) -> InstanceId:
    """The instance that holds the most of the request's KV, unless it is too loaded.

    Args:
        holders: KV tokens of the request by instance.
        room: candidates, as left by `Fleet.select`; there is at least one.
    """
    least = room.least_loaded()
    if not holders:
        return least
    home = next(iter(holders))
    if len(holders) > 1:
        home = max(holders, key=lambda i: (holders[i], -room.num_running(i)))
    if home == least or not room.is_selected(home):
        return least
    lost = holders[home] - holders.get(least, 0)
    allowed = 1 + max(0, lost) // RECOMPUTE_TOKENS_PER_REQUEST
    imbalance = room.num_running(home) - room.num_running(least)
    return least if imbalance > allowed else home


class Scheduler:
    """Waiting requests in a policy's order, and the capacity to run them."""

    def __init__(
        self,
        policy: Policy,
        *,
        chunk_size: int,
        granularity: int | None = None,
        starvation_interval: int = 0,
    ) -> None:
        """Start empty.

        Args:
            chunk_size: tokens; 0 or an undividing policy = requests run to their end.
            granularity: of KV reuse in tokens; None = the instance's block size.
            starvation_interval: in assignments; 0 = never.
        """
        self.policy = policy
        self._if_alike = policy
        self.fleet = Fleet()
        self._queue = WaitingQueue(policy.rank)
        self._chunk_size = chunk_size if policy.divided else 0
        self._granularity = granularity
        self._starvation_interval = starvation_interval or _NEVER
        self._num_since_oldest = 0
        self._group_homes: dict[GroupId, InstanceId] = {}
        self._num_groups_placed = 0
        self._prompts = SharedPrompts()
        self._shares_prompts = False

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._queue

    def add_instance(self, info: InstanceInfo) -> None:
        """An instance can take work.

        Raises:
            ValueError: it is up already.
        """
        self.fleet.add(info)
        self._shares_prompts |= info.shares_prompts

    def remove_instance(self, instance_id: InstanceId) -> None:
        """It is gone, and all that ran there with it."""
        self.fleet.remove(instance_id)
        self._prompts.drop_instance(instance_id)

    def begin(
        self, group_id: GroupId, instance_id: InstanceId, request_id: RequestId
    ) -> None:
        """A chunk that was assigned has its first token."""
        self._prompts.begin(group_id, instance_id, request_id)

    def end(
        self,
        group_id: GroupId,
        instance_id: InstanceId,
        request_id: RequestId,
        num_reserved_blocks: int,
    ) -> None:
        """A chunk is over: what it reserved is free."""
        of_prompt = self._prompts.end(group_id, instance_id, request_id)
        self.fleet.release(instance_id, num_reserved_blocks + of_prompt)

    def num_prompt_blocks(self, instance_id: InstanceId) -> int:
        """Blocks reserved there for prompts, which no assignment counts."""
        return self._prompts.num_blocks(instance_id)

    def add(self, request: Waiting, length_estimate: int) -> None:
        """Take a request that waits.

        Raises:
            ValueError: it waits already.
        """
        self._queue.add(request, length_estimate)

    def set_length_estimate(self, group_id: GroupId, length_estimate: int) -> None:
        """Re-rank a group whose estimate changed."""
        self._queue.set_length_estimate(group_id, length_estimate)

    def set_siblings_alike(self, *, alike: bool) -> None:
        """Take the policy for siblings that are, or are not."""
        policy = self._if_alike if alike else self._if_alike.if_unlike or self._if_alike
        if policy is not self.policy:
            self.policy = policy
            self._queue.set_rank(policy.rank)

    def remove_group(self, group_id: GroupId) -> None:
        """Drop a cancelled group's waiting requests."""
        self._queue.remove_group(group_id)

    def upcoming(self, num_groups: int) -> list[RequestId]:
        """Who will be among the next to run: the first of the first groups."""
        return [request.request_id for request in self._queue.head(num_groups)]

    def schedule(
        self, holders: Callable[[RequestId], Mapping[InstanceId, int]]
    ) -> list[Assignment]:
        """Turn free capacity into assignments; the assigned requests wait no more.

        Args:
            holders: tells where a request's KV is (tokens by instance).
        """
        if not self.policy.reserves_kv:
            return self._schedule_unreserved()
        queue, fleet = self._queue, self.fleet
        queue.begin_round()
        fleet.hold_none()
        assignments: list[Assignment] = []
        oldest_fits = True  # as far as is known
        while (room := fleet.most_tokens()) > 0:
            is_owed = self._num_since_oldest >= self._starvation_interval - 1
            owed = queue.oldest() if is_owed and oldest_fits else None
            request = owed or queue.first(room)
            if request is None:
                break
            if (queue.num_passed or not oldest_fits) and fleet.hold_freest():
                continue  # kept for the first that did not fit; there is less room now
            tokens = self._chunk_tokens(request)
            needs = request.num_tokens + tokens - 1  # the last one's KV is not written
            where = self._place(request, needs, room, holders)
            if where is not None:
                blocks = self._reserve(request, where, needs)
                assignments.append(
                    Assignment(request.request_id, where, tokens, blocks)
                )
                queue.remove(request)
                self._num_since_oldest = 0 if owed else self._num_since_oldest + 1
            elif owed:
                oldest_fits = False
            else:
                queue.pass_over(needs - self._num_shared_tokens(request))
        return assignments

    def _place(
        self,
        request: Waiting,
        needs: int,
        room: int,
        holders: Callable[[RequestId], Mapping[InstanceId, int]],
    ) -> InstanceId | None:
        """Where so many tokens' KV fit; None = nowhere."""
        fleet, group_id = self.fleet, request.group_id
        if needs <= room and fleet.select(needs):
            kv = holders(request.request_id)
            if not kv:
                shared = self._num_shared_tokens(request)
                kv = dict.fromkeys(self._prompts.holders(group_id), shared)
            return place_by_affinity(kv, fleet)
        fits = [
            i
            for i in self._prompts.holders(group_id)
            if fleet.fits(
                i,
                needs - self._num_shared_blocks(request, i) * fleet.info(i).block_size,
            )
        ]
        return min(fits, key=fleet.num_running, default=None)

    def _reserve(self, request: Waiting, where: InstanceId, needs: int) -> int:
        """Take the place; blocks of the chunk's own."""
        if not self.fleet.info(where).shares_prompts:
            return self.fleet.reserve(where, needs)
        of_prompt = self._num_shared_blocks(request, where)
        if self._prompts.start(request.group_id, where, request.request_id, of_prompt):
            return self.fleet.reserve(where, needs, of_prompt)
        return self.fleet.reserve(where, needs) - of_prompt

    def _num_shared_blocks(self, request: Waiting, where: InstanceId) -> int:
        return self._num_shared_tokens(request) // self.fleet.info(where).block_size

    def _num_shared_tokens(self, request: Waiting) -> int:
        """Of its prompt, but the last: a request computes at least one token."""
        if not self._shares_prompts:
            return 0
        return request.num_tokens - request.num_generated - 1

    def _chunk_tokens(self, request: Waiting) -> int:
        """A whole chunk, or what the response is expected to take, in full blocks."""
        granularity = self._granularity or self.fleet.block_size
        size = self._chunk_size if request.divisible else 0
        if size and self.policy.expect is not None:
            estimate = self._queue.length_estimate(request.group_id)
            left = self.policy.expect(request, estimate) - request.num_generated
            size = min(size, max(1, left) + granularity - 1)
        return chunk_tokens(request.num_tokens, request.remaining, size, granularity)

    def _schedule_unreserved(self) -> list[Assignment]:
        """A baseline's way: everything at once, whatever the engines have free."""
        queue, fleet = self._queue, self.fleet
        assignments: list[Assignment] = []
        if not fleet.select_alive():
            return assignments
        queue.begin_round()
        while (request := queue.first(0)) is not None:
            if self.policy.placement == "least-loaded":
                where = fleet.least_loaded()
            else:
                where = self._group_home(request.group_id)
            fleet.reserve(where, 0)
            assignments.append(
                Assignment(request.request_id, where, request.remaining, 0)
            )
            queue.remove(request)
        return assignments

    def _group_home(self, group_id: GroupId) -> InstanceId:
        """Where a baseline's whole group goes."""
        home = self._group_homes.get(group_id)
        if home is None or not self.fleet.is_selected(home):
            if self.policy.placement == "group-round-robin":
                alive = self.fleet.alive_ids()
                home = alive[self._num_groups_placed % len(alive)]
            else:
                home = self.fleet.least_loaded()
            self._num_groups_placed += 1
            self._group_homes[group_id] = home
        return home
