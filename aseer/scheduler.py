"""Who runs next, where, and for how many tokens.

The `Scheduler` keeps waiting requests in a policy's order (`aseer.policies`) and turns
free capacity into assignments; what siblings share of their prompt's KV is reserved
once (`aseer.core.prompts`). It has no clock, no randomness and no I/O, so a sequence of
calls is a trace that replays.

Placement. Seer §3.2 places a request where its KV is while loads differ by less than 32
requests, and else on the least loaded instance. Here a price replaces that fixed limit:
staying with the KV is worth one request of imbalance for every
`RECOMPUTE_TOKENS_PER_REQUEST` tokens that would have to be computed again; tokens that
a shared pool has count for little. A request that stays with no KV goes to a node where
siblings ran last, while that costs at most `SLACK_FOR_SIBLINGS` requests of imbalance:
there are drafts, which other nodes have to fetch, and the prompt's KV.

Starvation (the paper gives no rate). Every `starvation_interval`-th assignment is owed
to the request that has waited longest, and stays owed until there is room for it.

A request that fits nowhere is passed over, with its group, but is not overtaken for
good: the instance with the most free KV is kept for the first such request, while other
requests go on elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.core._native import untracked
from aseer.core.fleet import Fleet
from aseer.core.prompts import SharedPrompts
from aseer.core.residency import NO_POOL, Holders
from aseer.core.waiting import Waiting, WaitingQueue
from aseer.types import Assignment

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from aseer.policies import Policy
    from aseer.types import Chunk, GroupId, InstanceId, InstanceInfo, RequestId

# The price of a move: tokens to be computed again that outweigh one more request.
RECOMPUTE_TOKENS_PER_REQUEST = 256
# Being on a node of its siblings is worth as much as having KV of less than the above.
SLACK_FOR_SIBLINGS = 1
# Nodes that a group is remembered to have run on. One that is on more is everywhere.
MAX_GROUP_NODES = 4
_NEVER = 1 << 62


def chunk_tokens(
    num_tokens: int, remaining: int, chunk_size: int, granularity: int
) -> int:
    """How many tokens a chunk may generate.

    A chunk that does not end its request ends where prompt + generated = k x
    granularity + 1: all KV that the next chunk needs is then in full blocks, and it
    computes one token.

    Args:
        num_tokens: prompt and generated tokens at the chunk's start.
        chunk_size: 0 = no limit.
        granularity: tokens of KV that are reused together: an engine's block size, or
            the pool's chunk.
    """
    if not chunk_size or remaining <= chunk_size:
        return remaining
    end = (num_tokens + chunk_size - 1) // granularity * granularity + 1
    if end <= num_tokens:
        end += granularity
    return min(remaining, end - num_tokens)


def place_by_affinity(
    holders: Holders, room: Fleet, nodes: Sequence[int] = ()
) -> InstanceId:
    """The instance that holds the most of the request's KV, unless it is too loaded.

    Args:
        holders: where the request's KV is.
        room: the fleet, with at least one candidate selected (`Fleet.select`).
        nodes: where the request's siblings are; empty = there is one node only.
    """
    least = room.least_loaded(nodes, SLACK_FOR_SIBLINGS)
    tokens = holders.tokens
    if holders.num_pooled:
        home, lost = _home_with_pool(holders, room, least)
    elif tokens:
        home = next(iter(tokens))
        if len(tokens) > 1:
            home = max(tokens, key=lambda i: (tokens[i], -room.num_running(i)))
        lost = tokens[home] - tokens.get(least, 0)
    else:
        return least
    if home == least or not room.is_selected(home):
        return least
    allowed = 1 + max(0, lost) // RECOMPUTE_TOKENS_PER_REQUEST
    imbalance = room.num_running(home) - room.num_running(least)
    return least if imbalance > allowed else home


def _home_with_pool(
    holders: Holders, room: Fleet, least: InstanceId
) -> tuple[InstanceId, int]:
    """The instance that holds the most, and how many tokens more than `least` holds.

    The pool's instances are not looked at one by one: on the node that stored the KV,
    all that hold no more than the pool has are alike, so the least loaded of them
    stands for all.
    """
    tokens, num_pooled, pool, num_far, node = holders
    is_near, at_least = False, 0
    if room.pool_of(least) == pool:
        is_near = room.node_of(least) == node
        at_least = num_pooled if is_near else num_far
    at_least = tokens.get(least, at_least)
    if tokens:
        home = max(tokens, key=lambda i: (tokens[i], -room.num_running(i)))
        if tokens[home] > num_pooled:
            return home, tokens[home] - at_least
    near = least if is_near else room.least_loaded_of(pool, node)
    return (least, 0) if near < 0 else (near, num_pooled - at_least)


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
            chunk_size: tokens; with 0, or a policy that divides nothing, requests run
                to their end.
            granularity: tokens of KV that are reused together; None = the instance's
                block size.
            starvation_interval: in assignments; 0 = never.
        """
        self.policy = policy
        self._if_alike = policy
        self._if_unlike = policy.if_unlike or policy
        self.fleet = Fleet()
        other = policy.if_unlike
        self._queue = WaitingQueue(policy.rank, other.rank if other else None)
        self._chunk_size = chunk_size if policy.divided else 0
        self._granularity = granularity
        self._starvation_interval = starvation_interval or _NEVER
        self._num_since_oldest = 0
        self._group_homes: dict[GroupId, InstanceId] = {}  # one a group of the rollout
        self._num_groups_placed = 0
        # Nodes on which a group's requests were placed last, the latest first.
        self._group_nodes: dict[GroupId, tuple[int, ...]] = {}
        self._prompts = SharedPrompts()
        self._shares_prompts = False

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._queue

    def add_instance(self, info: InstanceInfo, pool: int = NO_POOL) -> None:
        """An instance can take work.

        Args:
            pool: number of the KV pool that the instance shares.

        Raises:
            ValueError: the instance is up already.
        """
        self.fleet.add(info, pool)
        self._shares_prompts |= info.shares_prompts

    def remove_instance(self, instance_id: InstanceId) -> None:
        """An instance is gone, with all that ran there."""
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
        """A chunk is over: free what the chunk reserved."""
        of_prompt = self._prompts.end(group_id, instance_id, request_id)
        self.fleet.release(instance_id, num_reserved_blocks + of_prompt)

    def num_prompt_blocks(self, instance_id: InstanceId) -> int:
        """Blocks reserved there for prompts, which no assignment counts."""
        return self._prompts.num_blocks(instance_id)

    def add(self, request: Waiting, length_estimate: int) -> None:
        """Take a request that waits.

        Raises:
            ValueError: the request waits already.
        """
        self._queue.add(request, length_estimate)

    def set_length_estimate(self, group_id: GroupId, length_estimate: int) -> None:
        """Re-rank a group whose estimate changed."""
        self._queue.set_length_estimate(group_id, length_estimate)

    def set_siblings_alike(self, *, alike: bool) -> None:
        """Order by the policy for siblings that are alike, or that are not."""
        policy = self._if_alike if alike else self._if_unlike
        if policy is not self.policy:
            self.policy = policy
            self._queue.choose(0 if alike else 1)

    def remove_group(self, group_id: GroupId) -> None:
        """Drop a cancelled group's waiting requests."""
        self._queue.remove_group(group_id)

    def forget_group(self, group_id: GroupId) -> None:
        """Drop a group of which nothing waits or runs any more."""
        self._group_homes.pop(group_id, None)
        self._group_nodes.pop(group_id, None)

    def upcoming(self, num_groups: int) -> list[RequestId]:
        """The requests that are likely to run next: the first of the first groups."""
        return [request.request_id for request in self._queue.head(num_groups)]

    def schedule(self, holders: Callable[[RequestId], Holders]) -> list[Assignment]:
        """Turn free capacity into assignments; the assigned requests wait no more.

        Args:
            holders: tells where a request's KV is.

        Raises:
            Exception: what the policy's `expect` raised, in the first call that could
                assign nothing before it; nothing has changed.
        """
        if not self.policy.reserves_kv:
            return self._schedule_unreserved()
        queue, orders, fleet = self._queue, self._queue.orders, self.fleet
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
            if (orders.num_passed or not oldest_fits) and fleet.hold_freest():
                continue  # an instance is kept now for the first that did not fit
            try:
                tokens = self._chunk_tokens(request)
            except Exception:  # a policy's own
                if not assignments:
                    raise
                break  # what was assigned counts; the next call raises
            # The KV of a chunk's last token is not written.
            needs = request.num_tokens + tokens - 1
            where = self._place(request, needs, room, holders)
            if where is not None:
                blocks = self._reserve(request, where, needs)
                self._note_node(request.group_id, where)
                assignments.append(
                    untracked(Assignment(request.request_id, where, tokens, blocks))
                )
                queue.remove(request)
                self._num_since_oldest = 0 if owed else self._num_since_oldest + 1
            elif owed:
                oldest_fits = False
            else:
                queue.pass_over(needs - self._num_shared_tokens(request))
        return assignments

    def check_integrity(
        self, instance_id: InstanceId, chunks: Collection[Chunk]
    ) -> None:
        """Assert that an instance's chunks reserved all blocks that are not free."""
        fleet, total = self.fleet, self.fleet.info(instance_id).num_kv_blocks
        reserved = sum(chunk.num_reserved_blocks for chunk in chunks)
        reserved += self.num_prompt_blocks(instance_id)
        assert reserved + fleet.num_free_blocks(instance_id) == total >= reserved
        assert len(chunks) == fleet.num_running(instance_id)

    def _place(
        self,
        request: Waiting,
        needs: int,
        room: int,
        holders: Callable[[RequestId], Holders],
    ) -> InstanceId | None:
        """The instance for a request that needs so many tokens of KV; None = none."""
        fleet, group_id = self.fleet, request.group_id
        if needs <= room and fleet.select(needs):
            kv = holders(request.request_id)
            if self._shares_prompts and not (kv.tokens or kv.num_pooled):
                shared = self._num_shared_tokens(request)
                kv = Holders(dict.fromkeys(self._prompts.holders(group_id), shared))
            return place_by_affinity(kv, fleet, self._group_nodes.get(group_id, ()))
        fits = [
            i
            for i in self._prompts.holders(group_id)
            if fleet.fits(i, needs, self._num_shared_blocks(request, i))
        ]
        return min(fits, key=fleet.num_running, default=None)

    def _note_node(self, group_id: GroupId, where: InstanceId) -> None:
        """A group has a request there now; with one node, nothing is kept."""
        if self.fleet.num_nodes > 1:
            node, nodes = self.fleet.node_of(where), self._group_nodes.get(group_id, ())
            if nodes[:1] != (node,):
                others = (other for other in nodes if other != node)
                self._group_nodes[group_id] = (node, *others)[:MAX_GROUP_NODES]

    def _reserve(self, request: Waiting, where: InstanceId, needs: int) -> int:
        """Reserve a chunk's KV; returns the blocks that are the chunk's own."""
        if not self.fleet.info(where).shares_prompts:
            return self.fleet.reserve(where, needs)
        of_prompt = self._num_shared_blocks(request, where)
        if self._prompts.start(request.group_id, where, request.request_id, of_prompt):
            return self.fleet.reserve(where, needs, of_prompt)
        return self.fleet.reserve(where, needs) - of_prompt

    def _num_shared_blocks(self, request: Waiting, where: InstanceId) -> int:
        shared = self._num_shared_tokens(request)
        return self.fleet.info(where).shared_blocks_for(shared)

    def _num_shared_tokens(self, request: Waiting) -> int:
        """Prompt tokens that may be shared: all but one, which a request computes."""
        if not self._shares_prompts:
            return 0
        return request.num_tokens - request.num_generated - 1

    def _chunk_tokens(self, request: Waiting) -> int:
        """Tokens of the next chunk: at most what the response is expected to take."""
        granularity = self._granularity or self.fleet.block_size
        size = self._chunk_size if request.divisible else 0
        if size and self.policy.expect is not None:
            estimate = self._queue.length_estimate(request.group_id)
            left = self.policy.expect(request, estimate) - request.num_generated
            size = min(size, max(1, left) + granularity - 1)
        return chunk_tokens(request.num_tokens, request.remaining, size, granularity)

    def _schedule_unreserved(self) -> list[Assignment]:
        """Assign everything at once, whatever is free, as the baselines do."""
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
                untracked(Assignment(request.request_id, where, request.remaining, 0))
            )
            queue.remove(request)
        return assignments

    def _group_home(self, group_id: GroupId) -> InstanceId:
        """The instance to which a baseline's whole group goes."""
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
