"""What does a decision cost with 1 million waiting requests and 1,000 instances?

Instances are filled with chunks of 125,000 groups of 8; then chunks end, one at a time,
until waiting requests have replaced each other many times over. With each end the
instance's capacity is released, the request put back (or its length learnt), free
capacity turned into assignments, and those started. The time of all that over the
number of assignments is the time of a *decision* (`us_per_decision`). It is measured on
the parts that decide: scheduler, waiting queue, fleet, length context, KV residency.

`controller_us_per_decision` is the same for the whole controller, which also takes in
reports, keeps every request's tokens and history, and builds the chunks and the
responses. Its tokens are scaled down so that they fit in memory.

`context-aware, one pool` has a KV pool that all instances share, so that all of them
hold a request's KV; `context-aware, nodes` has nodes of 8 instances with a pool each,
so that siblings stay near each other, too. `reporting_cores` is the share of a core
that a whole controller and its recorder take while 256 requests run on each of 1,000
instances and every instance reports new tokens of all of them four times a second
(`reporting.py`).

Expected: at most 50 us a decision for every policy, with a pool or without, since a
decision is two moves in a tree of 125,000 groups, two passes over arrays of 1,000
instances, and some thirty calls in Python; half as much again for the whole controller.
Reports take a quarter of a core: a million times a second a request's tokens grow, at a
tenth of a microsecond each, and a report as a whole costs some twenty.

The mix is that of long rollouts: siblings of similar length, 11 chunks a response on
average, instances short of KV rather than of places, so that most ends leave room that
is too small for the request whose turn it is. Every chunk end is an event of its own,
the dearest case (engines report several at once). Policies take turns, batch by batch.
The garbage collector runs as in any program. A decision is work of one thread, so its
time is that thread's CPU time, which other programs on the machine lengthen less than
the wall time that stands beside it. The headline is the slower policy's.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from common import print_result, quantiles, result_line
from reporting import REPORTS_PER_S, Reporting

from aseer.context import ContextManager
from aseer.controller import Controller, Dispatch
from aseer.core.columns import Columns, columns_of
from aseer.core.residency import KvResidency
from aseer.core.waiting import Waiting
from aseer.policies import POLICIES
from aseer.scheduler import Scheduler
from aseer.types import (
    NO_POOL,
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
    from collections.abc import Callable, Iterator, Mapping

    from aseer.config import PolicyName
    from aseer.controller import Command
    from aseer.types import Chunk

MEASURED: tuple[PolicyName, ...] = ("context-aware", "fcfs")
POOLED = "context-aware, one pool"
SPREAD = "context-aware, nodes"
INSTANCES_PER_NODE = 8
REPORTING_ROUNDS = 20


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


def _node_of(instance_id: int) -> int:
    return instance_id // INSTANCES_PER_NODE


def measure(arms: Mapping[str, Arm], settings: Settings) -> dict[str, Any]:
    """Figures by arm; the arms take turns."""
    for arm in arms.values():
        for _ in range(settings.warmup_batches):
            arm.batch(settings.events_per_batch)
        arm.num_events = arm.num_decisions = 0
    costs: dict[str, list[Cost]] = {policy: [] for policy in arms}
    for i in range(settings.num_batches):
        for policy in list(arms)[:: 1 if i % 2 else -1]:
            costs[policy].append(arms[policy].batch(settings.events_per_batch))
    return {
        policy: {
            "us_per_decision": quantiles([cost.cpu_us for cost in costs[policy]]),
            "wall_us_per_decision": quantiles([cost.wall_us for cost in costs[policy]]),
            "decisions_per_event": round(arm.num_decisions / arm.num_events, 3),
            "num_waiting": arm.num_waiting(),
            "num_running": arm.num_running(),
            "num_finished": arm.num_finished,
        }
        for policy, arm in arms.items()
    }


def measure_reports(settings: Settings) -> dict[str, Any]:
    """What a report costs while nothing ends."""
    arm = Reporting(
        (replace(info, num_kv_blocks=1 << 30) for info in instances(settings)),
        settings.max_tokens,
    )
    arm.round()  # every array's first tokens
    costs = [arm.round() for _ in range(REPORTING_ROUNDS)]
    return {
        "us_per_report": quantiles(costs),
        "reports_per_s": REPORTS_PER_S * settings.num_instances,
        "num_running": arm.num_running,
    }


def run(settings: Settings, scaled: Settings) -> dict[str, Any]:
    """All figures."""
    deciding = measure({p: Deciding(p, settings) for p in MEASURED}, settings)
    gc.collect()  # a million requests, before the next million
    policy = MEASURED[0]
    pooled = Deciding(policy, settings, pool_of=lambda _: 0)
    deciding |= measure({POOLED: pooled}, settings)
    del pooled
    gc.collect()
    spread = Deciding(policy, settings, pool_of=_node_of, node_of=_node_of)
    deciding |= measure({SPREAD: spread}, settings)
    del spread
    gc.collect()
    controlling = measure({policy: Controlling(policy, scaled)}, scaled)
    gc.collect()
    reporting = measure_reports(settings)
    slowest = max(
        (figures["us_per_decision"] for figures in deciding.values()),
        key=lambda cost: float(cost["median"]),
    )
    us_per_report = reporting["us_per_report"]["median"]
    return {
        "us_per_decision": slowest["median"],
        "us_per_decision_p10": slowest["p10"],
        "us_per_decision_p90": slowest["p90"],
        "controller_us_per_decision": controlling[policy]["us_per_decision"]["median"],
        "reporting_cores": round(us_per_report * reporting["reports_per_s"] / 1e6, 3),
        "policies": deciding,
        "controller": controlling,
        "reporting": reporting,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a small run, in seconds")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    settings, scaled = Settings(), SCALED
    if args.smoke:
        settings, scaled = smoke(settings), smoke(scaled)
    figures = run(settings, scaled)
    both = {"deciding": asdict(settings), "controller": asdict(scaled)}
    line = result_line("scheduler", settings=both, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
