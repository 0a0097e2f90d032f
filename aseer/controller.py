"""One rollout's decisions: events in, commands out.

The controller joins the core: the buffer's request states, the context manager's length
estimates, and the dispatcher, which brings requests to instances. It is pure (no clock,
no I/O), so the engine and the simulator drive the same one, and a log of its calls
replays.

    add_groups, cancel ---------+
    instance_up, _down, _left --+--> Controller --> Dispatch, Abort, Finished
    progress -------------------+

Every call returns the commands it causes, in order. Invariants: I1 (one `Finished` a
request) by the buffer, I3 (reservations fit) by the dispatcher.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING

from aseer.buffer import Request, RequestBuffer
from aseer.context import ContextManager
from aseer.core.columns import Columns, columns_of
from aseer.core.commands import Abort, Blame, Finished
from aseer.core.counters import Counters
from aseer.core.quarantine import Quarantine
from aseer.dispatcher import Dispatcher
from aseer.policies import POLICIES, Policy
from aseer.types import GroupId, InstanceId, RequestState, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from aseer.config import PolicyName
    from aseer.core.commands import Command
    from aseer.core.outputs import Outputs
    from aseer.types import ChunkProgress, InstanceInfo, Past

    Pasts = Mapping[GroupId, Mapping[int, Past]]


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
        self.counters = Counters()
        self._dispatcher = Dispatcher(
            policy if isinstance(policy, Policy) else POLICIES[policy],
            self.buffer,
            self.context,
            self.counters,
            chunk_size=chunk_size,
            granularity=granularity,
            starvation_interval=starvation_interval,
        )
        self.scheduler = self._dispatcher.scheduler
        self.residency = self._dispatcher.residency
        self.running = self._dispatcher.running
        self._weight_version = weight_version
        self._quarantine = Quarantine()
        self._to_cancel: deque[GroupId] | None = None  # since `cancel_all`
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
        self._dispatcher.add_instance(info)
        return self.schedule(now)

    def instance_down(
        self,
        instance_id: InstanceId,
        now: float,
        why: str,
        partners: Collection[InstanceId] = (),
    ) -> list[Command]:
        """An instance has died; its requests wait again, with the tokens they have.

        One of them may have been the cause, so they are tried a few at a time
        (`aseer.core.quarantine`). `partners` died with it, as if they were one.
        """
        self.forget_finished()
        gone = (instance_id, *partners)
        return self._lose_instances(gone, now, why) + self.schedule(now)

    def instance_left(
        self, instance_id: InstanceId, now: float, why: str
    ) -> list[Command]:
        """An instance is gone with its node: its requests go on elsewhere at once, with
        their tokens, as often as it happens.
        """
        self.forget_finished()
        gone = self._lose_instances((instance_id,), now, why, is_blameless=True)
        return gone + self.schedule(now)

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
            chunk = request.running
            num_before = request.num_generated
            is_first = request.cached_by_chunk is None
            outcome = self.buffer.settle(news, now)
            self.counters.num_output_tokens += request.num_generated - num_before
            if is_first and request.cached_by_chunk is not None:
                self._dispatcher.begun(request, chunk, request.cached_by_chunk)
            if outcome == "broken":
                commands.append(Abort(chunk.instance_id, chunk.chunk_id))
            if outcome in ("running", "broken"):
                continue
            ended = True
            self.counters.num_reported_ends += 1
            self._dispatcher.release(chunk, request)
            if outcome == "finished":
                commands += self._finish(request)
            else:
                self._dispatcher.enqueue(request)
        ended |= self._quarantine.is_due()
        return commands + self.schedule(now) if ended else commands

    def cancel_group(self, group_id: GroupId, now: float) -> list[Command]:
        """End a group early: what waits finishes now, what runs is aborted.

        Raises:
            KeyError: no such group.
        """
        self.buffer.group(group_id)
        self.forget_finished()
        # An instance may have been kept for the group; others can go on there now.
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
        commands = self._lose_instances(list(self.running), now, why)
        for request in self.buffer.requests():
            if request.state is RequestState.WAITING:
                self.scheduler.remove_group(request.group.group_id)
                self._quarantine.remove_group(request.group.group_id)
                state = RequestState.FINISHED_ERROR
                self.buffer.finish_waiting(request, state, now, why)
                commands += self._finish(request)
        return commands

    def schedule(self, now: float) -> list[Command]:
        """Turn free capacity into dispatches."""
        if self._to_cancel is not None:
            return []
        for request in self._quarantine.next_trials():
            self._dispatcher.enqueue(request)
        return self._dispatcher.dispatch(now)

    def use_pool(self, granularity: int, pool_of: Callable[[InstanceId], int]) -> None:
        """From now on, KV that is computed is in a KV pool as well.

        Args:
            granularity: how many tokens are stored and found together.
            pool_of: the number of an instance's pool, from 0.
        """
        self._dispatcher.use_pool(granularity, pool_of)

    def set_move_price(self, price: float | None, far: float | None = None) -> None:
        """Set the measured cost of loading a token from the pool, in tokens computed.

        Moves that did not find their KV in the pool raise the cost that is used: those
        within a node that of such moves, and those between nodes that of theirs.

        Args:
            price: None = not known yet.
            far: what it takes beside that to bring one from another node; None = not
                known, or nothing.
        """
        self._dispatcher.set_move_price(price, far)

    def check_integrity(self) -> None:
        """Assert that the parts agree; changes nothing."""
        self.buffer.check_integrity()
        requests = self.buffer.requests()
        waiting = [r for r in requests if r.state is RequestState.WAITING]
        held = [r for r in waiting if r in self._quarantine]
        assert len(held) == len(self._quarantine)
        assert not any(r.request_id in self.scheduler for r in held)
        assert len(waiting) - len(held) == len(self.scheduler)
        self._dispatcher.check_integrity()

    def _lose_instances(
        self,
        instance_ids: Iterable[InstanceId],
        now: float,
        why: str,
        *,
        is_blameless: bool = False,
    ) -> list[Command]:
        commands: list[Command] = []
        there = [i for i in instance_ids if i in self.running]
        lost = [r for i in there for r in self._dispatcher.drop_instance(i)]
        lost.sort(key=lambda request: request.num_generated, reverse=True)
        suspects = [] if is_blameless else self._quarantine.lose(lost)
        blamed: dict[GroupId, int] = {}
        for request in lost:
            num_before = request.num_generated
            is_suspect = request in suspects
            # Of several suspects none is known to be the cause.
            is_blamed = not (is_blameless or suspects) or suspects == [request]
            outcome = self.buffer.lose_chunk(
                request.running.chunk_id, now, why, is_blamed=is_blamed
            )
            self.counters.num_output_tokens += request.num_generated - num_before
            if outcome != "waiting":
                if request.state is RequestState.FINISHED_ERROR:
                    group_id = request.group.group_id
                    num = request.num_retries
                    blamed[group_id] = max(blamed.get(group_id, 0), num)
                commands += self._finish(request)
            elif is_blameless:
                self._dispatcher.enqueue(request)
            else:
                self._quarantine.hold(request, was_on_trial=is_suspect)
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
                state = RequestState.FINISHED_ABORTED
                self.buffer.finish_waiting(request, state, now, "cancelled")
                commands += self._finish(request)
            elif (chunk := request.chunk) is not None:
                commands.append(Abort(chunk.instance_id, chunk.chunk_id))
        return commands

    def _add_group(
        self, task: Task, now: float, past: Mapping[int, Past] | None
    ) -> list[Command]:
        group_id = task.group_id
        self.context.add_group(
            group_id, task.max_tokens, task.num_requests, task.length_prior
        )
        self._dispatcher.add_group(task)
        self._unfinished_in_group[group_id] = task.num_requests
        if self._to_cancel is not None:
            self._to_cancel.append(group_id)
        finished: list[Command] = []
        for request in self.buffer.add_group(task, now, past):
            self.counters.count_past(request)
            if request.state.is_finished:
                finished += self._finish(request)
            else:
                self._dispatcher.enqueue(request)
        return finished

    def _finish(self, request: Request) -> list[Command]:
        group_id = request.group.group_id
        self._dispatcher.finished(request)
        self.counters.count_finished(request)
        self._unfinished_in_group[group_id] -= 1
        if not self._unfinished_in_group[group_id]:
            self.counters.num_groups_finished += 1
            self._just_finished.append(group_id)
        response = request.to_response(self._weight_version)
        finished = Finished(response, request.held_text)
        request.drop_output()
        return [finished]

    def forget_finished(self) -> None:
        """Forget groups that finished in the last call.

        Until the next call they are known, so that whoever takes the commands of the
        last one can ask about them.
        """
        while self._just_finished:
            self._forget(self._just_finished.pop())

    def _forget(self, group_id: GroupId, *, was_taken: bool = True) -> None:
        """Drop a group; the buffer keeps the id of a group that was taken."""
        self._dispatcher.forget_group(group_id)
        self.buffer.forget_group(group_id, was_taken=was_taken)
        self.context.forget_group(group_id)
        self._unfinished_in_group.pop(group_id, None)
