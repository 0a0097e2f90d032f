"""One rollout's decisions: events in, commands out.

The controller joins the core: the buffer's request states, the context manager's length
estimates, the scheduler's choices and the KV residency estimate. It is pure (no clock,
no I/O), so the engine and the simulator drive the same one, and a log of its calls
replays.

    add_groups, cancel ---------+
    instance_up, _down, _left --+--> Controller --> Dispatch, Abort, Finished
    progress -------------------+

Every call returns the commands it causes, in order. Invariants: I1 (one `Finished` a
request) by the buffer, I3 (reservations fit) by the fleet.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING

from aseer.buffer import Request, RequestBuffer
from aseer.context import ContextManager
from aseer.core.columns import Columns, columns_of
from aseer.core.commands import Abort, Blame, Command, Dispatch, Finished
from aseer.core.counters import Counters
from aseer.core.quarantine import Quarantine
from aseer.core.residency import DEFAULT_MOVE_PRICE, KvResidency
from aseer.core.running import RunningChunks
from aseer.core.waiting import Waiting
from aseer.policies import POLICIES, Policy
from aseer.scheduler import Scheduler
from aseer.types import Chunk, GroupId, InstanceId, RequestState, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aseer.config import PolicyName
    from aseer.core.outputs import Outputs
    from aseer.types import ChunkProgress, InstanceInfo, Past

    Pasts = Mapping[GroupId, Mapping[int, Past]]

__all__ = ["Abort", "Blame", "Command", "Controller", "Dispatch", "Finished"]


class Controller:
    """The decisions of one rollout."""

    def __init__(
        self,
        *,
        policy: PolicyName | Policy,
        chunk_size: int,
        starvation_interval: int = 0,
        max_request_retries: int = 3,
        weight_version: int = 0,
        first_chunk_id: int = 0,
        granularity: int | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        """Start with no groups and no instances; `EngineConfig` has the settings."""
        self.buffer = RequestBuffer(
            max_request_retries=max_request_retries,
            first_chunk_id=first_chunk_id,
            weight_version=weight_version,
            outputs=outputs,
        )
        self.context = ContextManager()
        self.residency = KvResidency()
        self.scheduler = Scheduler(
            policy if isinstance(policy, Policy) else POLICIES[policy],
            chunk_size=chunk_size,
            granularity=granularity,
            starvation_interval=starvation_interval,
        )
        self.counters = Counters()
        self._chunk_size = chunk_size
        self._weight_version = weight_version
        self._num_arrived = 0
        self._arrivals: dict[GroupId, int] = {}
        self.running = RunningChunks()
        self._quarantine = Quarantine()
        self._to_cancel: deque[GroupId] | None = None  # once everything is to end
        self._unfinished_in_group: dict[GroupId, int] = {}
        self._just_finished: list[GroupId] = []

    @property
    def num_unfinished(self) -> int:
        return self.buffer.num_unfinished

    @property
    def num_waiting(self) -> int:
        """Requests that do not run, those that wait for a trial included."""
        return len(self.scheduler) + len(self._quarantine)

    def is_group_finished(self, group_id: GroupId) -> bool:
        """Whether all its requests are over; a KeyError if there is no such group."""
        self.buffer.group(group_id)
        return not self._unfinished_in_group.get(group_id)

    def num_running(self, instance_id: InstanceId) -> int:
        """Chunks that run on an instance."""
        return self.running.num_on(instance_id)

    def longest_running(self) -> tuple[str, int] | None:
        """The running request with the most tokens so far, and how many."""
        return self.buffer.longest_running()

    def upcoming(self, num_groups: int) -> list[Request]:
        """Waiting requests that are among the next to run and have run before."""
        waiting = map(self.buffer.__getitem__, self.scheduler.upcoming(num_groups))
        return [request for request in waiting if request.num_generated]

    def add_groups(
        self, tasks: Iterable[Task], now: float, past: Pasts | None = None
    ) -> list[Command]:
        """Take validated groups, and decide once all their probes are known.

        Args:
            past: what requests had in an earlier run of the rollout; what is finished
                is not run again, and the rest goes on from there.
        Raises:
            ValueError: an id is taken already, or two are the same; then no group was
                taken.
        """
        tasks = list(tasks)
        ids: set[GroupId] = set()
        for task in tasks:
            if task.group_id in ids or self.buffer.has_group(task.group_id):
                raise ValueError(f"group {task.group_id!r} is in this rollout already")
            ids.add(task.group_id)
        self.forget_finished()
        commands: list[Command] = []
        try:
            for task in tasks:
                had = past.get(task.group_id) if past else None
                commands += self._add_group(task, now, had)
        except BaseException:  # of a policy's own
            for task in tasks:
                self.scheduler.remove_group(task.group_id)
                self._forget(task.group_id, was_taken=False)
            self._just_finished.clear()
            raise
        self.counters.num_groups += len(tasks)
        return commands + self.schedule(now)

    def instance_up(self, info: InstanceInfo, now: float) -> list[Command]:
        """An instance can take work; its caches are empty.

        Raises:
            ValueError: the instance is up already.
        """
        self.forget_finished()
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
        return self.schedule(now)

    def instance_down(
        self, instance_id: InstanceId, now: float, why: str
    ) -> list[Command]:
        """An instance is gone; its requests wait again, with the tokens they have."""
        self.forget_finished()
        return self._lose_instance(instance_id, now, why) + self.schedule(now)

    def instance_left(
        self, instance_id: InstanceId, now: float, why: str
    ) -> list[Command]:
        """An instance is gone with its node, for nothing that ran there.

        Its requests go on elsewhere at once, with the tokens they have, however often
        that happens to them.
        """
        self.forget_finished()
        lost = self._lose_instance(instance_id, now, why, is_blameless=True)
        return lost + self.schedule(now)

    def progress(
        self, report: Columns | Iterable[ChunkProgress], now: float
    ) -> list[Command]:
        """Take what an instance reports of its chunks."""
        self.forget_finished()
        if not isinstance(report, Columns):
            report = columns_of(report)
        taken = self.buffer.take(report)
        self.counters.num_output_tokens += taken.num_tokens
        self.counters.num_reported_tokens += taken.num_tokens
        commands: list[Command] = []
        ended = False
        for news in taken.news:
            request = self.buffer.chunk_owner(news.chunk_id)
            if request is None:
                continue
            chunk = request.chunk
            assert chunk is not None
            num_before = request.num_generated
            is_first = request.cached_by_chunk is None
            outcome = self.buffer.settle(news, now)
            self.counters.num_output_tokens += request.num_generated - num_before
            if is_first and request.cached_by_chunk is not None:
                self._count_move(request, chunk, request.cached_by_chunk)
                self.scheduler.begin(
                    chunk.group_id, chunk.instance_id, chunk.request_id
                )
            if outcome == "broken":
                commands.append(Abort(chunk.instance_id, chunk.chunk_id))
            if outcome in ("running", "broken"):
                continue
            ended = True
            self.counters.num_reported_ends += 1
            self._release(chunk, request)
            if outcome == "finished":
                commands += self._finish(request)
            else:
                self._enqueue(request)
        ended |= self._quarantine.is_due()
        return commands + self.schedule(now) if ended else commands

    def cancel_group(self, group_id: GroupId, now: float) -> list[Command]:
        """End a group early: what waits finishes now, what runs is aborted.

        Raises:
            KeyError: no such group.
        """
        self.buffer.group(group_id)
        self.forget_finished()
        # Requests that the group held up (an instance may have been kept for it) can go
        # on.
        return self._cancel(group_id, now) + self.schedule(now)

    def cancel_all(self, now: float, max_requests: int = sys.maxsize) -> list[Command]:
        """End every group early; from the first call on nothing is started any more.

        Args:
            max_requests: about how many requests to end in this call; further calls
                end the rest, until `is_cancelled`.
        """
        self.forget_finished()
        if self._to_cancel is None:
            self._to_cancel = deque(self._unfinished_in_group)
        commands: list[Command] = []
        while self._to_cancel and len(commands) < max_requests:
            group_id = self._to_cancel.popleft()
            if self._unfinished_in_group.get(group_id):
                commands += self._cancel(group_id, now)
        return commands

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel_all` has been called often enough."""
        return self._to_cancel is not None and not self._to_cancel

    def fail_all(self, now: float, why: str) -> list[Command]:
        """Nothing can run any more: every unfinished request ends as an error."""
        self.forget_finished()
        commands: list[Command] = []
        for instance_id in list(self.running):
            commands += self._lose_instance(instance_id, now, why)
        for request in self.buffer.requests():
            if request.state is RequestState.WAITING:
                self.scheduler.remove_group(request.group.group_id)
                self._quarantine.remove_group(request.group.group_id)
                commands += self._end_waiting(
                    request, RequestState.FINISHED_ERROR, now, why
                )
        return commands

    def schedule(self, now: float) -> list[Command]:
        """Turn free capacity into dispatches."""
        commands: list[Command] = []
        if self._to_cancel is not None:
            return commands
        for request in self._quarantine.next_trials():
            self._enqueue(request)
        for assignment in self.scheduler.schedule(self.residency.holders):
            request = self.buffer[assignment.request_id]
            before = request.instances[-1] if request.instances else None
            chunk = self.buffer.start_chunk(assignment, now)
            where = chunk.instance_id
            self.residency.reserve(
                where, chunk.request_id, assignment.num_reserved_blocks
            )
            self.running.start(where, chunk.chunk_id, request)
            self.counters.num_chunks += 1
            if before is not None and before != where:
                self.counters.num_migrations += 1
                self.counters.num_node_migrations += self._are_apart(before, where)
            commands.append(Dispatch(chunk))
        return commands

    def use_pool(self, granularity: int, pool_of: Callable[[InstanceId], int]) -> None:
        """From now on, KV that is computed is in a KV pool as well.

        Args:
            granularity: how many tokens are stored and found together.
            pool_of: the number of an instance's pool, from 0.
        """
        self.residency.use_pool(granularity, pool_of)
        for instance_id in self.running:
            pool = self.residency.pool_of(instance_id)
            self.scheduler.fleet.set_pool(instance_id, pool)

    def set_move_price(self, price: float | None) -> None:
        """Set the measured cost of loading a token from the pool, in tokens computed.

        Moves that did not find their KV in the pool raise the cost that is used: those
        within a node that of such moves, and those between nodes that of theirs.

        Args:
            price: None = not known yet.
        """
        base = DEFAULT_MOVE_PRICE if price is None else price
        counters = self.counters
        within, between = (
            base + (1 - base) * moves.share_lost
            for moves in (counters.moves, counters.node_moves)
        )
        self.residency.set_prices(within, between)

    def check_integrity(self) -> None:
        """Assert that the parts agree; changes nothing."""
        self.buffer.check_integrity()
        requests = self.buffer.requests()
        waiting = [r for r in requests if r.state is RequestState.WAITING]
        held = [r for r in waiting if r in self._quarantine]
        assert len(held) == len(self._quarantine)
        assert not any(r.request_id in self.scheduler for r in held)
        assert len(waiting) - len(held) == len(self.scheduler)
        self.running.check_integrity()
        for instance_id in self.running:
            chunks = [r.chunk for r in self.running.on(instance_id) if r.chunk]
            self.scheduler.check_integrity(instance_id, chunks)

    def _lose_instance(
        self,
        instance_id: InstanceId,
        now: float,
        why: str,
        *,
        is_blameless: bool = False,
    ) -> list[Command]:
        if instance_id not in self.running:
            return []
        chunks = self.running.drop_instance(instance_id)
        self.scheduler.remove_instance(instance_id)
        self.residency.drop_instance(instance_id)
        commands: list[Command] = []
        owners = ((c, self.buffer.chunk_owner(c)) for c in chunks)
        lost = [(chunk_id, r) for chunk_id, r in owners if r is not None]
        lost.sort(key=lambda each: each[1].num_generated, reverse=True)
        suspects = [] if is_blameless else self._quarantine.lose(r for _, r in lost)
        blamed: dict[GroupId, int] = {}
        for chunk_id, request in lost:
            num_before = request.num_generated
            is_suspect = request in suspects
            is_blamed = not (is_blameless or suspects) or suspects == [request]
            outcome = self.buffer.lose_chunk(chunk_id, now, why, is_blamed=is_blamed)
            self.counters.num_output_tokens += request.num_generated - num_before
            if outcome == "waiting" and is_blameless:
                self._enqueue(request)
                continue
            if outcome == "waiting":
                self._quarantine.hold(request, was_on_trial=is_suspect)
                continue
            if request.state is RequestState.FINISHED_ERROR:
                group_id = request.group.group_id
                blamed[group_id] = max(blamed.get(group_id, 0), request.num_retries)
            commands += self._finish(request)
        # If several groups end with an engine, none of them is known to be the cause.
        if len(blamed) == 1:
            commands.append(Blame(*blamed.values()))
        elif len(suspects) == 1:
            commands.append(Blame(1))
        return commands

    def _cancel(self, group_id: GroupId, now: float) -> list[Command]:
        commands: list[Command] = []
        self.scheduler.remove_group(group_id)
        self._quarantine.remove_group(group_id)
        for request in self.buffer.group(group_id):
            request.cancelled = True
            if request.state is RequestState.WAITING:
                commands += self._end_waiting(
                    request, RequestState.FINISHED_ABORTED, now, "cancelled"
                )
            elif request.chunk is not None:
                chunk = request.chunk
                commands.append(Abort(chunk.instance_id, chunk.chunk_id))
        return commands

    def _add_group(
        self, task: Task, now: float, past: Mapping[int, Past] | None
    ) -> list[Command]:
        group_id = task.group_id
        self.context.add_group(
            group_id, task.max_tokens, task.num_requests, task.length_prior
        )
        self._arrivals[group_id] = self._num_arrived
        self._num_arrived += task.num_requests
        self._unfinished_in_group[group_id] = task.num_requests
        if self._to_cancel is not None:
            self._to_cancel.append(group_id)
        finished: list[Command] = []
        for request in self.buffer.add_group(task, now, past):
            if request.state.is_finished:
                self.counters.num_replayed += 1
                self.counters.num_replayed_tokens += request.num_generated
                finished += self._finish(request)
            else:
                self.counters.num_resumed_tokens += request.num_generated
                self._enqueue(request)
        return finished

    def _enqueue(self, request: Request) -> None:
        task = request.group
        num_generated = request.num_generated
        self.context.record_length(task.group_id, request.request_id, num_generated)
        self.scheduler.set_siblings_alike(alike=self.context.siblings_are_alike)
        lengths = task.known_lengths
        waiting = Waiting(
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
        self.scheduler.add(waiting, self.context.length_estimate(task.group_id))

    def _count_move(self, request: Request, chunk: Chunk, num_cached: int) -> None:
        """If a chunk that starts has moved, count whether its KV was there."""
        places = request.instances
        if len(places) > 1 and places[-1] != places[-2]:
            counters = self.counters
            is_far = self._are_apart(places[-2], places[-1])
            moves = counters.node_moves if is_far else counters.moves
            moves.count(chunk, num_cached)

    def _are_apart(self, first: InstanceId, second: InstanceId) -> bool:
        """Whether two instances are on different nodes."""
        fleet = self.scheduler.fleet
        return fleet.node_of(first) != fleet.node_of(second)

    def _release(self, chunk: Chunk, request: Request) -> None:
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

    def _end_waiting(
        self, request: Request, state: RequestState, now: float, why: str
    ) -> list[Command]:
        self.buffer.finish_waiting(request, state, now, why)
        return self._finish(request)

    def _finish(self, request: Request) -> list[Command]:
        group_id = request.group.group_id
        self.residency.forget(request.request_id)
        learns = request.state in (
            RequestState.FINISHED_STOPPED,
            RequestState.FINISHED_LENGTH_CAPPED,
        )
        if learns and self.context.record_finished(
            group_id, request.request_id, request.num_generated
        ):
            self.scheduler.set_length_estimate(
                group_id, self.context.length_estimate(group_id)
            )
        self.scheduler.set_siblings_alike(alike=self.context.siblings_are_alike)
        self.counters.count_finished(request)
        self._unfinished_in_group[group_id] -= 1
        if not self._unfinished_in_group[group_id]:
            self.counters.num_groups_finished += 1
            self._just_finished.append(group_id)
        response = request.to_response(self._weight_version)
        held_text = request.held_text
        request.drop_output()
        return [Finished(response, held_text)]

    def forget_finished(self) -> None:
        """Forget groups that finished in the last call.

        Whoever took that call's commands has asked about these groups by now.
        """
        while self._just_finished:
            self._forget(self._just_finished.pop())

    def _forget(self, group_id: GroupId, *, was_taken: bool = True) -> None:
        """Drop a group; the buffer keeps the id of a group that was taken."""
        self.scheduler.forget_group(group_id)
        self.buffer.forget_group(group_id, was_taken=was_taken)
        self.context.forget_group(group_id)
        self._arrivals.pop(group_id, None)
        self._unfinished_in_group.pop(group_id, None)
