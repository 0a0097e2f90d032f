"""A rollout on simulated engines: the real controller, a virtual clock.

    Workload -> Controller --Dispatch--> SimEngine (one an instance)
                    ^                        |
                    +------ChunkProgress-----+      Recorder -> RolloutReport

Every decision is the controller's, so what is compared here is what runs. Engines
report when a chunk ends; the network takes no time.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from aseer.controller import Controller
from aseer.core.commands import Dispatch, Finished
from aseer.core.outputs import Outputs
from aseer.errors import ConfigError
from aseer.policies import POLICIES, Policy
from aseer.runtime.recorder import Recorder
from aseer.sim.drafting import Drafting
from aseer.sim.engine import SimEngine
from aseer.types import (
    ChunkEnd,
    ChunkProgress,
    GroupId,
    InstanceId,
    InstanceInfo,
    InstanceLoad,
    Task,
    request_id_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aseer.config import PolicyName
    from aseer.core.commands import Command
    from aseer.report import RolloutReport
    from aseer.sim.hardware import StepTime
    from aseer.sim.workload import Workload
    from aseer.types import ChunkId, RequestId, Response

DraftingName = Literal["off", "own", "grouped"]
_SAMPLES = 400  # an instance, about


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal instances.

    Attributes:
        num_kv_tokens: KV cache of an instance, in tokens.
        block_size: tokens of a KV block.
        max_num_seqs: requests an instance runs at once.
        kv_bytes_per_token: of all layers; only for loads from the pool.
        load_bytes_per_s: KV that an instance reads from the pool; None = no pool, a
            request that moves is computed anew.
        shares_prompts: siblings that run on an instance share full blocks of their
            prompt's KV (prefix caching).
    """

    num_instances: int
    step_time: StepTime
    num_kv_tokens: int
    block_size: int = 16
    max_num_seqs: int = 256
    kv_bytes_per_token: float = 0.0
    load_bytes_per_s: float | None = None
    shares_prompts: bool = False


def simulate(
    workload: Workload,
    cluster: Cluster,
    *,
    policy: PolicyName | Policy = "context-aware",
    known_lengths: Sequence[Sequence[int]] | None = None,
    length_priors: Sequence[int] | None = None,
    chunk_size: int = 2048,
    drafting: DraftingName = "off",
    starvation_interval: int = 256,
    progress: Callable[[int, int], object] | None = None,
) -> RolloutReport:
    """Roll a workload out.

    Args:
        policy: see `EngineConfig`; or one of your own, for experiments.
        known_lengths: [num_groups][group size] what the policy is told of the lengths;
            None = the truth for "longest-first", and nothing for the others.
        length_priors: [num_groups] the longest response that an earlier rollout had.
        drafting: "own" drafts from a request's own text, "grouped" from its finished
            siblings' too.
        progress: called now and then with the requests finished, and all there are.

    Returns:
        The report of the rollout, in the simulated clock's seconds.

    Raises:
        ConfigError: a request does not fit into an instance's KV cache.
    """
    if isinstance(policy, str):
        if policy == "longest-first" and known_lengths is None:
            known_lengths = workload.lengths
        policy = POLICIES[policy]
    return _Rollout(
        workload,
        cluster,
        policy,
        known_lengths,
        length_priors,
        chunk_size,
        drafting,
        starvation_interval,
    ).run(progress)


class _Rollout:
    """One simulation."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        policy: Policy,
        known_lengths: Sequence[Sequence[int]] | None,
        length_priors: Sequence[int] | None,
        chunk_size: int,
        drafting: DraftingName,
        starvation_interval: int,
    ) -> None:
        _check(workload, cluster)
        self._workload = workload
        self._cluster = cluster
        self._known_lengths = known_lengths
        self._length_priors = length_priors
        self._controller = Controller(
            policy=policy,
            chunk_size=chunk_size if policy.divided else 0,
            starvation_interval=starvation_interval,
            outputs=_Counted(),
        )
        if cluster.load_bytes_per_s is not None:
            self._controller.use_pool(cluster.block_size, lambda _: 0)
            self._controller.set_move_price(_move_price(cluster))
        self._recorder = Recorder(self._controller, policy.name, chunk_size, 0)
        self._drafting = _new_drafting(drafting, workload)
        self._engines = [
            SimEngine(
                step_time=cluster.step_time,
                num_kv_tokens=cluster.num_kv_tokens,
                max_num_seqs=cluster.max_num_seqs,
                load_bytes_per_s=cluster.load_bytes_per_s,
                kv_bytes_per_token=cluster.kv_bytes_per_token,
                drafting=self._drafting,
                shared_block_size=cluster.block_size if cluster.shares_prompts else 0,
            )
            for _ in range(cluster.num_instances)
        ]
        self._events: list[tuple[float, int, int]] = []  # time, instance, version
        self._left: dict[RequestId, int] = {}
        self._num_finished: dict[GroupId, int] = {}
        self._chunks: dict[RequestId, tuple[InstanceId, ChunkId]] = {}
        self._next_sample = [0.0] * cluster.num_instances
        self._sample_s = 0.0

    def run(self, progress: Callable[[int, int], object] | None) -> RolloutReport:
        total = self._workload.num_requests
        self._begin()
        num_events = 0
        while self._events:
            now, i, version = heapq.heappop(self._events)
            engine = self._engines[i]
            if version != engine.version:
                continue
            self._advance(i, now)
            num_events += 1
            if progress is not None and num_events % 1000 == 0:
                progress(self._controller.counters.num_finished, total)
        assert not self._controller.num_unfinished, "work is left, and nothing runs"
        return self._recorder.report(self._now, [0] * len(self._engines))

    def _begin(self) -> None:
        self._now = 0.0
        cluster = self._cluster
        for i in range(cluster.num_instances):
            info = InstanceInfo(
                instance_id=InstanceId(i),
                num_kv_blocks=cluster.num_kv_tokens // cluster.block_size,
                block_size=cluster.block_size,
                max_num_seqs=cluster.max_num_seqs,
                max_model_len=cluster.num_kv_tokens,
                shares_prompts=cluster.shares_prompts,
            )
            self._recorder.instance_up(info, InstanceLoad())
            self._take(self._controller.instance_up(info, 0.0))
        self._take(self._controller.add_groups(self._tasks(), 0.0))

    def _tasks(self) -> Iterable[Task]:
        workload, known = self._workload, self._known_lengths
        priors = self._length_priors
        prompts = {n: bytes(4 * n) for n in set(workload.num_prompt_tokens)}
        for g, lengths in enumerate(workload.lengths):
            group_id = GroupId(f"g{g}")
            self._num_finished[group_id] = 0
            for index, length in enumerate(lengths):
                self._left[request_id_of(group_id, index)] = length
            num_prompt_tokens = workload.num_prompt_tokens[g]
            yield Task(
                group_id=group_id,
                num_requests=len(lengths),
                prompt=prompts[num_prompt_tokens],
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=workload.max_tokens,
                known_lengths=known[g] if known is not None else None,
                length_prior=priors[g] if priors is not None else None,
            )

    def _advance(self, i: int, now: float) -> None:
        """An engine's own event: what ended there is decided upon."""
        self._now = now
        engine = self._engines[i]
        engine.advance(now)
        reports = []
        for chunk, num_tokens, num_cached in engine.take_ended():
            left = self._left[chunk.request_id] - num_tokens
            self._left[chunk.request_id] = left
            del self._chunks[chunk.request_id]
            reason: Literal["stop", "length"] = "length"
            if not left:
                engine.forget(chunk.request_id)
                at_most = len(chunk.generated) // 4 + num_tokens
                reason = "stop" if at_most < self._workload.max_tokens else "length"
            reports.append(
                ChunkProgress(
                    chunk_id=chunk.chunk_id,
                    start=0,
                    tokens=_zeros(num_tokens),
                    logprobs=_zeros(num_tokens),
                    num_cached_tokens=num_cached,
                    end=ChunkEnd(reason=reason),
                )
            )
        instance_id = InstanceId(i)
        if reports:
            commands = self._controller.progress(reports, now)
            self._recorder.count_tokens(instance_id)
            self._take(commands)
            self._recorder.mark_busy(now)
        self._plan(i)
        self._sample(i)

    def _take(self, commands: list[Command]) -> None:
        touched = set()
        for command in commands:
            if isinstance(command, Dispatch):
                chunk = command.chunk
                i = chunk.instance_id
                engine = self._engines[i]
                engine.advance(self._now)
                touched.add(i)
                num_tokens = min(self._left[chunk.request_id], chunk.max_tokens)
                self._chunks[chunk.request_id] = (i, chunk.chunk_id)
                engine.add(chunk, num_tokens, self._class_of(chunk.group_id))
                # Siblings that are placed after it find its prompt there.
                self._controller.scheduler.begin(
                    chunk.group_id, chunk.instance_id, chunk.request_id
                )
            elif isinstance(command, Finished):
                touched |= self._finished(command.response)
        for i in touched:
            self._plan(i)

    def _finished(self, response: Response) -> set[InstanceId]:
        """Siblings have one more to draft from; the instances they run on."""
        self._recorder.finished(response)
        group_id = GroupId(response.group_id)
        self._num_finished[group_id] += 1
        for i in set(response.metrics.instances):
            self._engines[i].forget(request_id_of(group_id, response.index))
        touched: set[InstanceId] = set()
        if self._drafting is not None and self._drafting.num_classes > 1:
            for sibling in self._controller.buffer.group(group_id):
                where = self._chunks.get(sibling.request_id)
                if where is not None:
                    engine = self._engines[where[0]]
                    engine.advance(self._now)
                    engine.set_class(where[1], self._class_of(group_id))
                    touched.add(where[0])
        return touched

    def _plan(self, i: int) -> None:
        engine = self._engines[i]
        at = engine.next_event()
        if at < math.inf:
            heapq.heappush(self._events, (at, i, engine.version))

    def _class_of(self, group_id: GroupId) -> int:
        drafting = self._drafting
        return drafting.class_of(self._num_finished[group_id]) if drafting else 0

    def _sample(self, i: int) -> None:
        """The engine's load, for the timeline, at even distances."""
        if self._now < self._next_sample[i]:
            return
        self._sample_s = max(self._sample_s, self._now / _SAMPLES)
        self._next_sample[i] = self._now + self._sample_s
        engine = self._engines[i]
        load = InstanceLoad(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            kv_used=engine.kv_used,
            num_preemptions=engine.num_preemptions,
        )
        self._recorder.sample(InstanceId(i), load, self._now)


def _new_drafting(name: DraftingName, workload: Workload) -> Drafting | None:
    if name == "off":
        return None
    size = max(len(lengths) for lengths in workload.lengths)
    return Drafting(size, grouped=name == "grouped")


def _move_price(cluster: Cluster) -> float:
    """What loading a token's KV costs, in tokens computed."""
    assert cluster.load_bytes_per_s is not None
    load_s = cluster.kv_bytes_per_token / cluster.load_bytes_per_s
    return min(1.0, load_s * 1000 / max(cluster.step_time.prefill_s(1000), 1e-12))


def _check(workload: Workload, cluster: Cluster) -> None:
    for group, lengths in enumerate(workload.lengths):
        needed = workload.num_prompt_tokens[group] + max(lengths)
        if needed > cluster.num_kv_tokens:
            raise ConfigError(
                f"a response of group {group} has {needed} tokens with its prompt, and "
                f"an instance's KV cache holds {cluster.num_kv_tokens}; give instances "
                "more GPUs, or shorten the workload"
            )


_BYTES = memoryview(bytes(1 << 22))


def _zeros(num_values: int) -> bytes:
    """That many 4-byte zeros, which only their length counts of."""
    return cast("bytes", _BYTES[: 4 * num_values])


class _Counted(Outputs):
    """Keeps how many tokens requests have generated, and makes up the rest."""

    def __init__(self) -> None:
        super().__init__(keeps_values=False)

    def tokens(self, request: int) -> bytes:
        """Zeros."""
        return _zeros(self.num_tokens(request))

    def token_ids(self, request: int) -> list[int]:
        """As many."""
        return cast("list[int]", range(self.num_tokens(request)))

    def logprobs_of_tokens(self, request: int) -> list[float]:
        """As many."""
        return cast("list[float]", range(self.num_tokens(request)))
