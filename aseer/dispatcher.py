"""Waiting requests become chunks on instances, and chunks end: what runs where.

The dispatcher keeps all books of the instances in step: the scheduler's capacity, the
chunks that run, and the KV that each instance and pool probably holds. The controller
decides what becomes of a request; every chunk that begins or ends goes through here.
Pure, as the controller is. Invariant: I3 (reservations fit) by the fleet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.core._native import untracked
from aseer.core.commands import Dispatch
from aseer.core.residency import DEFAULT_MOVE_PRICE, KvResidency
from aseer.core.running import RunningChunks
from aseer.core.waiting import Waiting
from aseer.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.buffer import Request, RequestBuffer
    from aseer.context import ContextManager
    from aseer.core.commands import Command
    from aseer.core.counters import Counters
    from aseer.policies import Policy
    from aseer.types import Chunk, GroupId, InstanceId, InstanceInfo, Task


class Dispatcher:
    """The instances of one rollout, and the requests that wait for them."""

    def __init__(
        self,
        policy: Policy,
        buffer: RequestBuffer,
        context: ContextManager,
        counters: Counters,
        *,
        chunk_size: int,
        granularity: int | None,
        starvation_interval: int,
    ) -> None:
        """Start with no instances; see `Controller` for the settings."""
        self._buffer = buffer
        self._context = context
        self._counters = counters
        self._chunk_size = chunk_size
        self._num_arrived = 0
        self._arrivals: dict[GroupId, int] = {}  # of a group's first request
        self.residency = KvResidency()
        self.running = RunningChunks()
        self.scheduler = Scheduler(
            policy,
            chunk_size=chunk_size,
            granularity=granularity,
            starvation_interval=starvation_interval,
        )

    # Groups and requests

    def add_group(self, task: Task) -> None:
        """A group has come; its requests are queued one by one."""
        self._arrivals[task.group_id] = self._num_arrived
        self._num_arrived += task.num_requests

    def forget_group(self, group_id: GroupId) -> None:
        """Every request of a group is over, or the group was not taken after all."""
        self.scheduler.forget_group(group_id)
        self._arrivals.pop(group_id, None)

    def enqueue(self, request: Request) -> None:
        """A request waits for its next chunk, with the tokens that it has."""
        task = request.group
        num_generated = request.num_generated
        self._context.record_length(task.group_id, request.request_id, num_generated)
        self.scheduler.set_siblings_alike(alike=self._context.siblings_are_alike)
        lengths = task.known_lengths
        waiting = untracked(
            Waiting(
                request_id=request.request_id,
                group_id=task.group_id,
                arrival=self._arrivals[task.group_id] + request.index,
                is_probe=request.is_probe and task.length_prior is None,
                num_tokens=task.num_prompt_tokens + num_generated,
                num_generated=num_generated,
                remaining=task.max_tokens - num_generated,
                divisible=task.undivided_because is None,
                known_length=lengths[request.index] if lengths is not None else None,
                is_new=num_generated < self._chunk_size,
            )
        )
        self.scheduler.add(waiting, self._context.length_estimate(task.group_id))

    def finished(self, request: Request) -> None:
        """A request is over; if it ran to its end, its length says something."""
        group_id = request.group.group_id
        self.residency.forget(request.request_id)
        if request.state.is_whole and self._context.record_finished(
            group_id, request.request_id, request.num_generated
        ):
            self.scheduler.set_length_estimate(
                group_id, self._context.length_estimate(group_id)
            )
        self.scheduler.set_siblings_alike(alike=self._context.siblings_are_alike)

    # Instances

    def add_instance(self, info: InstanceInfo) -> None:
        """An instance can take work; its caches are empty.

        Raises:
            ValueError: the instance is there already.
        """
        pool = self.residency.pool_of(info.instance_id)
        self.scheduler.add_instance(info, pool)
        num_blocks = info.num_kv_blocks if info.keeps_kv else 0
        self.residency.add_instance(
            info.instance_id,
            num_blocks,
            info.block_size,
            info.cached_blocks_each,
            self.scheduler.fleet.node_of(info.instance_id),
        )
        self.running.add_instance(info.instance_id)

    def drop_instance(self, instance_id: InstanceId) -> list[Request]:
        """An instance is gone; the requests that ran there."""
        requests = self.running.drop_instance(instance_id)
        self.scheduler.remove_instance(instance_id)
        self.residency.drop_instance(instance_id)
        return requests

    def use_pool(self, granularity: int, pool_of: Callable[[InstanceId], int]) -> None:
        """See `Controller.use_pool`."""
        self.residency.use_pool(granularity, pool_of)
        for instance_id in self.running:
            pool = self.residency.pool_of(instance_id)
            self.scheduler.fleet.set_pool(instance_id, pool)

    def set_move_price(self, price: float | None, far: float | None) -> None:
        """See `Controller.set_move_price`."""
        base = DEFAULT_MOVE_PRICE if price is None else price
        counters = self._counters
        within, between = (
            base + (1 - base) * moves.share_lost
            for base, moves in (
                (base, counters.moves),
                (min(1.0, base + (far or 0.0)), counters.node_moves),
            )
        )
        self.residency.set_prices(within, between)

    # Chunks

    def dispatch(self, now: float) -> list[Command]:
        """Turn free capacity into chunks."""
        commands: list[Command] = []
        for assignment in self.scheduler.schedule(self.residency.holders):
            request = self._buffer[assignment.request_id]
            before = request.instances[-1] if request.instances else None
            chunk = self._buffer.start_chunk(assignment, now)
            where = chunk.instance_id
            self.residency.reserve(
                where, chunk.request_id, assignment.num_reserved_blocks
            )
            self.running.start(where, chunk.chunk_id, request)
            self._counters.num_chunks += 1
            if before is not None and before != where:
                self._counters.num_migrations += 1
                self._counters.num_node_migrations += self._are_apart(before, where)
            commands.append(Dispatch(chunk))
        return commands

    def begun(self, request: Request, chunk: Chunk, num_cached: int) -> None:
        """A chunk's first report is there.

        Args:
            num_cached: tokens whose KV the chunk found.
        """
        places = request.instances
        if len(places) > 1 and places[-1] != places[-2]:  # it has moved
            counters = self._counters
            is_far = self._are_apart(places[-2], places[-1])
            moves = counters.node_moves if is_far else counters.moves
            moves.count(chunk, num_cached)
        self.scheduler.begin(chunk.group_id, chunk.instance_id, chunk.request_id)

    def release(self, chunk: Chunk, request: Request) -> None:
        """A chunk is over, and its instance still there."""
        where = chunk.instance_id
        self.running.end(where, chunk.chunk_id)
        self.scheduler.end(
            chunk.group_id, where, chunk.request_id, chunk.num_reserved_blocks
        )
        # The last token's KV is not computed until the next step.
        computed = 0 if request.state.is_finished else request.num_tokens - 1
        self.residency.release(
            where, chunk.request_id, chunk.num_reserved_blocks, computed
        )

    def check_integrity(self) -> None:
        """Assert that the books agree; changes nothing."""
        self.running.check_integrity()
        for instance_id in self.running:
            chunks = [r.chunk for r in self.running.on(instance_id) if r.chunk]
            self.scheduler.check_integrity(instance_id, chunks)

    def _are_apart(self, first: InstanceId, second: InstanceId) -> bool:
        """Whether two instances are on different nodes."""
        fleet = self.scheduler.fleet
        return fleet.node_of(first) != fleet.node_of(second)
