"""What `bench_scheduler.py` measures: the parts that decide, and a whole controller.

Both are filled with work, and then have chunks end, one after the other.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aseer.context import ContextManager
from aseer.controller import Controller
from aseer.core.columns import Columns, columns_of
from aseer.core.commands import Dispatch
from aseer.core.residency import NO_POOL, KvResidency
from aseer.core.waiting import Waiting
from aseer.policies import POLICIES
from aseer.scheduler import Scheduler
from aseer.types import (
    Assignment,
    ChunkEnd,
    ChunkProgress,
    GroupId,
    InstanceId,
    InstanceInfo,
    RequestId,
    Task,
    request_id_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aseer.config import PolicyName
    from aseer.core.commands import Command
    from aseer.types import Chunk


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the problem; lengths are those of Moonlight in the Seer paper."""

    num_groups: int = 125_000
    group_size: int = 8
    num_instances: int = 1_000
    num_kv_blocks: int = 16_384
    block_size: int = 16
    max_num_seqs: int = 256
    chunk_size: int = 2_048
    num_prompt_tokens: int = 512
    mean_tokens: int = 22_386
    max_tokens: int = 65_536
    starvation_interval: int = 32
    warmup_batches: int = 150
    events_per_batch: int = 1_000
    num_batches: int = 50
    seed: int = 1


# A controller keeps tokens: as many chunks, with 1/128 of the tokens.
SCALED = Settings(
    num_kv_blocks=1_024,
    block_size=2,
    chunk_size=16,
    num_prompt_tokens=4,
    mean_tokens=175,
    max_tokens=512,
)


def smoke(settings: Settings) -> Settings:
    """The same problem in seconds."""
    return replace(
        settings,
        num_groups=500,
        num_instances=20,
        warmup_batches=5,
        events_per_batch=100,
        num_batches=5,
    )


class Cost(NamedTuple):
    """Of one decision, in microseconds."""

    cpu_us: float
    wall_us: float


class Arm(Protocol):
    """What is measured: something that decides, filled with work."""

    num_events: int
    num_decisions: int
    num_finished: int

    def batch(self, num_events: int) -> Cost:
        """End that many chunks, one after the other."""
        ...

    def num_waiting(self) -> int:
        """Requests that wait."""
        ...

    def num_running(self) -> int:
        """Chunks that run."""
        ...


def draw_lengths(settings: Settings) -> Iterator[tuple[GroupId, list[int]]]:
    """Groups and the lengths of their responses; siblings are alike."""
    rng = random.Random(settings.seed)
    for g in range(settings.num_groups):
        mean = settings.mean_tokens * rng.lognormvariate(-0.18, 0.6)
        lengths = [mean * rng.lognormvariate(-0.045, 0.3) for _ in range(8)]
        yield (
            GroupId(f"g{g}"),
            [min(max(int(n), 1), settings.max_tokens) for n in lengths],
        )


def instances(settings: Settings) -> Iterator[InstanceInfo]:
    """Equal instances."""
    for i in range(settings.num_instances):
        yield InstanceInfo(
            instance_id=InstanceId(i),
            num_kv_blocks=settings.num_kv_blocks,
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.num_prompt_tokens + settings.max_tokens,
        )


def timed(calls: Iterator[int]) -> tuple[Cost, int, int]:
    """Run calls that return how many decisions they made; cost, decisions, calls."""
    cpu_s, wall_s = time.thread_time(), time.perf_counter()
    made = list(calls)
    cpu_s, wall_s = time.thread_time() - cpu_s, time.perf_counter() - wall_s
    num = sum(made)
    per = 1e6 / max(1, num)
    return Cost(per * cpu_s, per * wall_s), num, len(made)


class Deciding:
    """The parts that decide, and what they are told."""

    def __init__(
        self,
        policy: PolicyName,
        settings: Settings,
        *,
        pool_of: Callable[[int], int] = lambda _: NO_POOL,
        node_of: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.num_events = self.num_decisions = self.num_finished = 0
        self._rng = random.Random(settings.seed)
        self._max_tokens = settings.max_tokens
        self._context = ContextManager()
        self._residency = KvResidency()
        if pool_of(0) != NO_POOL:
            self._residency.use_pool(settings.block_size, pool_of)
        self._scheduler = Scheduler(
            POLICIES[policy],
            chunk_size=settings.chunk_size,
            starvation_interval=settings.starvation_interval,
        )
        self._requests: dict[RequestId, Waiting] = {}  # as last put back
        self._lengths: dict[RequestId, int] = {}
        self._running: list[Assignment] = []
        self._add_groups(settings)
        for info in instances(settings):
            where, node = info.instance_id, node_of(info.instance_id)
            self._scheduler.add_instance(replace(info, node=str(node)), pool_of(where))
            self._residency.add_instance(
                where, info.num_kv_blocks, info.block_size, node=node
            )
        self._start_chunks()

    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._scheduler)

    def num_running(self) -> int:
        """Chunks that run."""
        return len(self._running)

    def batch(self, num_events: int) -> Cost:
        """End that many chunks, one after the other."""
        ended = [self._draw() for _ in range(num_events)]
        cost, num_decisions, _ = timed(self._end_chunk(*chunk) for chunk in ended)
        self.num_events += num_events
        self.num_decisions += num_decisions
        return cost

    def _add_groups(self, settings: Settings) -> None:
        for group_id, lengths in draw_lengths(settings):
            self._context.add_group(group_id, settings.max_tokens, len(lengths))
            for index, length in enumerate(lengths):
                request = Waiting(
                    request_id=request_id_of(group_id, index),
                    group_id=group_id,
                    arrival=len(self._requests),
                    is_probe=index == 0,
                    num_tokens=settings.num_prompt_tokens,
                    num_generated=0,
                    remaining=settings.max_tokens,
                )
                self._requests[request.request_id] = request
                self._lengths[request.request_id] = length
                self._scheduler.add(request, settings.max_tokens)

    def _draw(self) -> tuple[Assignment, Waiting, int]:
        """A chunk that ends, its request, and how long the response will be."""
        running = self._running
        i = self._rng.randrange(len(running))
        running[i], running[-1] = running[-1], running[i]
        ended = running.pop()
        return ended, self._requests[ended.request_id], self._lengths[ended.request_id]

    def _end_chunk(self, ended: Assignment, request: Waiting, length: int) -> int:
        """One event; how many chunks it starts."""
        num_generated = min(length, request.num_generated + ended.max_tokens)
        num_new = num_generated - request.num_generated
        num_tokens = request.num_tokens + num_new
        finished = num_generated == length
        where, num_blocks = ended.instance_id, ended.num_reserved_blocks
        self._scheduler.fleet.release(where, num_blocks)
        self._residency.release(
            where, request.request_id, num_blocks, 0 if finished else num_tokens - 1
        )
        if finished:
            self._finish(request, length)
        else:
            request = Waiting(
                request_id=request.request_id,
                group_id=request.group_id,
                arrival=request.arrival,
                is_probe=request.is_probe,
                num_tokens=num_tokens,
                num_generated=num_generated,
                remaining=self._max_tokens - num_generated,
            )
            self._requests[request.request_id] = request
            self._scheduler.add(
                request, self._context.length_estimate(request.group_id)
            )
        return self._start_chunks()

    def _finish(self, request: Waiting, length: int) -> None:
        self.num_finished += 1
        self._residency.forget(request.request_id)
        group_id = request.group_id
        if self._context.record_finished(group_id, request.request_id, length):
            self._scheduler.set_length_estimate(
                group_id, self._context.length_estimate(group_id)
            )

    def _start_chunks(self) -> int:
        assignments = self._scheduler.schedule(self._residency.holders)
        for a in assignments:
            self._residency.reserve(a.instance_id, a.request_id, a.num_reserved_blocks)
        self._running += assignments
        return len(assignments)


class Controlling:
    """A whole controller, and the engines' side of it."""

    def __init__(self, policy: PolicyName, settings: Settings) -> None:
        self.num_events = self.num_decisions = self.num_finished = 0
        self._rng = random.Random(settings.seed)
        self._running: list[Chunk] = []
        self._left: dict[str, int] = {}
        self._now = 0.0
        self._controller = Controller(
            policy=policy,
            chunk_size=settings.chunk_size,
            starvation_interval=settings.starvation_interval,
        )
        self._controller.add_groups(self._tasks(settings), self._now)
        for info in instances(settings):
            self._take(self._controller.instance_up(info, self._now))

    def num_waiting(self) -> int:
        """Requests that wait."""
        return self._controller.num_waiting

    def num_running(self) -> int:
        """Chunks that run."""
        return len(self._running)

    def batch(self, num_events: int) -> Cost:
        """End that many chunks, one after the other."""
        reports = [columns_of([self._draw()]) for _ in range(num_events)]
        self._now += 1.0
        taken: list[list[Command]] = []

        def take_in(report: Columns) -> int:
            commands = self._controller.progress(report, self._now)
            taken.append(commands)
            return sum(isinstance(c, Dispatch) for c in commands)

        cost, num_decisions, _ = timed(take_in(report) for report in reports)
        for commands in taken:
            self._take(commands)
        self.num_events += num_events
        self.num_decisions += num_decisions
        return cost

    def _tasks(self, settings: Settings) -> Iterator[Task]:
        for group_id, lengths in draw_lengths(settings):
            for index, length in enumerate(lengths):
                self._left[request_id_of(group_id, index)] = length
            yield Task(
                group_id=group_id,
                num_requests=len(lengths),
                prompt=bytes(4 * settings.num_prompt_tokens),
                num_prompt_tokens=settings.num_prompt_tokens,
                max_tokens=settings.max_tokens,
            )

    def _draw(self) -> ChunkProgress:
        running = self._running
        i = self._rng.randrange(len(running))
        running[i], running[-1] = running[-1], running[i]
        chunk = running.pop()
        num_new = min(self._left[chunk.request_id], chunk.max_tokens)
        self._left[chunk.request_id] -= num_new
        over = not self._left[chunk.request_id]
        return ChunkProgress(
            chunk_id=chunk.chunk_id,
            start=0,
            tokens=bytes(4 * num_new),
            logprobs=bytes(4 * num_new),
            num_cached_tokens=0,
            end=ChunkEnd(reason="stop" if over else "length"),
        )

    def _take(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Dispatch):
                self._running.append(command.chunk)
            else:
                self.num_finished += 1
