"""Keeps what a rollout's report and live display need; decides nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from aseer.report import (
    Completion,
    InstanceReport,
    KvReport,
    Progress,
    RolloutReport,
    SpeculationReport,
    TimelineSample,
    tail_time,
)
from aseer.types import DraftCounts, KvCounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aseer.controller import Controller
    from aseer.kv.pool import KvPool
    from aseer.types import (
        ChunkProgress,
        InstanceId,
        InstanceInfo,
        InstanceLoad,
        Response,
    )

_MAX_SAMPLES = 2000  # an instance; then every second one is dropped
_PROGRESS_INTERVAL_S = 0.2


class Recorder:
    """Figures of one rollout, collected as it runs."""

    def __init__(
        self,
        controller: Controller,
        policy: str,
        chunk_size: int,
        weight_version: int,
        kv_pool: KvPool | None = None,
    ) -> None:
        self._controller = controller
        self._kv_pool = kv_pool
        if kv_pool is not None:
            self._pool_before = (kv_pool.counts, kv_pool.num_restarts)
        self._policy = policy
        self._chunk_size = chunk_size
        self._weight_version = weight_version
        self._instances: dict[InstanceId, _InstanceRecord] = {}
        self._completions: list[Completion] = []
        self._reasons: Counter[str] = Counter()
        self._finished_tokens = 0
        self._max_tokens = 0
        self._progress: Progress | None = None

    def instance_ids(self) -> list[InstanceId]:
        """Instances that took part, ascending."""
        return sorted(self._instances)

    def any_instance(self) -> InstanceInfo | None:
        """One that took part; they differ in nothing but their ids."""
        return next((r.info for r in self._instances.values()), None)

    def instance_up(self, info: InstanceInfo, load: InstanceLoad) -> None:
        """An instance takes part, for the first time or again, from this load on."""
        record = self._instances.setdefault(info.instance_id, _InstanceRecord(info))
        record.preemptions_seen = load.num_preemptions
        record.drafts_seen = load.drafts or DraftCounts()
        record.kv_seen = load.kv or KvCounts()

    def instance_down(self, instance_id: InstanceId, now: float) -> None:
        """An instance is gone: it is not busy."""
        record = self._instances.get(instance_id)
        if record is not None:
            record.set_busy(busy=False, now=now)

    def count_tokens(
        self, instance_id: InstanceId, chunks: Iterable[ChunkProgress]
    ) -> None:
        """Tokens that an instance reports."""
        record = self._instances[instance_id]
        for chunk in chunks:
            record.num_tokens += len(chunk.tokens) // 4
            record.num_chunks += chunk.end is not None

    def mark_busy(self, now: float) -> None:
        """Account which instances have work."""
        for instance_id, record in self._instances.items():
            record.set_busy(busy=self._controller.num_running(instance_id) > 0, now=now)

    def sample(self, instance_id: InstanceId, load: InstanceLoad, now: float) -> None:
        """An instance's load, for the timeline."""
        record = self._instances[instance_id]
        record.count_preemptions(load.num_preemptions)
        drafts = record.count_drafts(load.drafts)
        kv = record.count_kv(load.kv)
        free = self._controller.scheduler.fleet.num_free_blocks(instance_id)
        record.add_sample(
            TimelineSample(
                t_s=now,
                instance_id=instance_id,
                num_running=self._controller.num_running(instance_id),
                num_waiting=load.num_waiting,
                kv_used=load.kv_used,
                kv_reserved=1 - free / record.info.num_kv_blocks,
                num_output_tokens=record.num_tokens,
                num_drafts=drafts.num_drafts,
                num_drafted_tokens=sum(drafts.drafted),
                num_accepted_tokens=sum(drafts.accepted),
                num_stored_tokens=kv.stored_tokens,
                num_loaded_tokens=kv.loaded_tokens,
            )
        )

    def finished(self, response: Response) -> None:
        """A request is over."""
        metrics = response.metrics
        num_tokens = len(response.token_ids)
        self._reasons[response.finish_reason] += 1
        self._finished_tokens += num_tokens
        self._max_tokens = max(self._max_tokens, num_tokens)
        self._completions.append(
            Completion(
                t_s=metrics.finished_at_s,
                group_id=response.group_id,
                index=response.index,
                instance_id=metrics.instances[-1] if metrics.instances else None,
                num_output_tokens=num_tokens,
                finish_reason=response.finish_reason,
            )
        )

    def progress(
        self, now: float, *, intake_open: bool, is_over: bool = False
    ) -> Progress:
        """The rollout as it stands; made anew a few times a second, and at its end."""
        last = self._progress
        if last is not None and not is_over:
            if now - last.t_s < _PROGRESS_INTERVAL_S:
                return last
        controller = self._controller
        counters = controller.counters
        throughput = counters.num_output_tokens / now if now > 0 else 0.0
        self._progress = Progress(
            t_s=now,
            num_groups=counters.num_groups,
            num_groups_finished=counters.num_groups_finished,
            num_requests=len(controller.buffer),
            num_finished=counters.num_finished,
            num_waiting=controller.num_waiting,
            num_output_tokens=counters.num_output_tokens,
            throughput_tok_s=throughput,
            longest_running=controller.longest_running(),
            eta_s=self._eta(throughput),
            intake_open=intake_open,
            instances=[
                r.samples[-1] for _, r in sorted(self._instances.items()) if r.samples
            ],
            speculation=self._speculation(),
            kv=self._kv(now),
        )
        return self._progress

    @property
    def kv_counts(self) -> KvCounts:
        """What all engines moved to and from the pool."""
        return sum((r.kv for r in self._instances.values()), KvCounts())

    def _kv(self, now: float) -> KvReport | None:
        """What the KV pool did; None if there is none."""
        if self._kv_pool is None:
            return None
        pool, (before, restarts_before) = self._kv_pool.counts, self._pool_before
        total, counters = self.kv_counts, self._controller.counters
        busy_s = sum(r.busy_until(now) for r in self._instances.values())
        per_token = pool.per_chunk / self._kv_pool.granularity
        return KvReport(
            stored_bytes=pool.stored - before.stored,
            loaded_bytes=int(total.loaded_tokens * per_token),
            evicted_bytes=pool.evicted - before.evicted,
            freed_bytes=pool.freed - before.freed,
            disk_written_bytes=pool.disk_written - before.disk_written,
            disk_read_bytes=pool.disk_read - before.disk_read,
            prefetched_bytes=pool.prefetched - before.prefetched,
            resident_bytes=pool.resident,
            disk_resident_bytes=pool.disk_resident,
            capacity_bytes=pool.capacity,
            num_loads=total.num_loads,
            num_loaded_tokens=total.loaded_tokens,
            num_moves_found=counters.num_moves_found,
            num_moves_recomputed=counters.num_moves_recomputed,
            load_p50_s=total.load_latency_s(0.5),
            load_p90_s=total.load_latency_s(0.9),
            load_p99_s=total.load_latency_s(0.99),
            time_share=(total.store_s + total.copy_s) / busy_s if busy_s else 0.0,
            num_failures=total.num_failures,
            num_restarts=self._kv_pool.num_restarts - restarts_before,
        )

    def _speculation(self) -> SpeculationReport | None:
        """What the engines that speculate did; None if there is none."""
        counted = [r.drafts for r in self._instances.values() if r.drafts is not None]
        if not counted:
            return None
        total = sum(counted, DraftCounts())
        return SpeculationReport(
            acceptance_length=total.acceptance_length,
            num_drafts=total.num_drafts,
            drafted=list(total.drafted),
            accepted=list(total.accepted),
            drafting_share=total.drafting_share,
            drafting_share_p99=total.drafting_share_of(0.99),
            drafting_share_worst=total.drafting_share_of(1.0),
        )

    def _eta(self, throughput: float) -> float | None:
        """What is left if the rest is as long as what is finished; else None."""
        counters = self._controller.counters
        if not counters.num_finished or not throughput:
            return None
        mean = self._finished_tokens / counters.num_finished
        expected = mean * self._controller.num_unfinished
        under_way = counters.num_output_tokens - self._finished_tokens
        return (expected - under_way) / throughput if expected > under_way else None

    def report(self, now: float, num_restarts: Sequence[int]) -> RolloutReport:
        """The finished rollout."""
        counters = self._controller.counters
        for record in self._instances.values():
            record.set_busy(busy=False, now=now)
        times = [c.t_s for c in self._completions]
        wall = max(times, default=0.0)
        busy = sum(r.busy_s for r in self._instances.values())
        return RolloutReport(
            policy=self._policy,
            chunk_size=self._chunk_size,
            num_groups=counters.num_groups,
            num_responses=len(times),
            num_prompt_tokens=counters.num_prompt_tokens,
            num_output_tokens=counters.num_output_tokens,
            wall_s=wall,
            throughput_tok_s=counters.num_output_tokens / wall if wall else 0.0,
            tail_s=tail_time(times),
            num_chunks=counters.num_chunks,
            num_migrations=counters.num_migrations,
            num_preemptions=sum(r.num_preemptions for r in self._instances.values()),
            num_recomputed_tokens=counters.num_recomputed_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_retries=counters.num_retries,
            finish_reasons=dict(self._reasons),
            mean_output_tokens=self._finished_tokens / len(times) if times else 0.0,
            max_output_tokens=self._max_tokens,
            idle_fraction=1 - busy / (wall * len(self._instances)) if wall else 0.0,
            weight_version=self._weight_version,
            instances=[
                record.report(restarts)
                for (_, record), restarts in zip(
                    sorted(self._instances.items()), num_restarts, strict=True
                )
            ],
            speculation=self._speculation(),
            kv=self._kv(now),
            completions=self._completions,
            timeline=sorted(
                (s for r in self._instances.values() for s in r.samples),
                key=lambda s: s.t_s,
            ),
        )


class _InstanceRecord:
    """One instance's figures."""

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.num_tokens = 0
        self.num_chunks = 0
        self.num_preemptions = 0
        self.preemptions_seen = 0
        self.drafts: DraftCounts | None = None
        self.drafts_seen = DraftCounts()
        self.kv = KvCounts()
        self.kv_seen = KvCounts()
        self.busy_s = 0.0
        self.samples: list[TimelineSample] = []
        self._busy_since: float | None = None
        self._keep_every = 1
        self._num_offered = 0

    def set_busy(self, *, busy: bool, now: float) -> None:
        if busy and self._busy_since is None:
            self._busy_since = now
        elif not busy and self._busy_since is not None:
            self.busy_s += now - self._busy_since
            self._busy_since = None

    def busy_until(self, now: float) -> float:
        """Time with work so far."""
        since = self._busy_since
        return self.busy_s + (0.0 if since is None else now - since)

    def count_preemptions(self, total: int) -> None:
        """`total` counts from the process's start, so only what is new is added."""
        self.num_preemptions += total - self.preemptions_seen
        self.preemptions_seen = total

    def count_drafts(self, total: DraftCounts | None) -> DraftCounts:
        """`total` counts from the process's start, too; what is new is added."""
        if total is not None:
            self.drafts = (self.drafts or DraftCounts()) + total - self.drafts_seen
            self.drafts_seen = total
        return self.drafts or DraftCounts()

    def count_kv(self, total: KvCounts | None) -> KvCounts:
        """`total` counts from the process's start, too; what is new is added."""
        if total is not None:
            self.kv = self.kv + total - self.kv_seen
            self.kv_seen = total
        return self.kv

    def add_sample(self, sample: TimelineSample) -> None:
        self._num_offered += 1
        if self._num_offered % self._keep_every == 0:
            self.samples.append(sample)
        if len(self.samples) > _MAX_SAMPLES:
            del self.samples[::2]
            self._keep_every *= 2

    def report(self, num_restarts: int) -> InstanceReport:
        return InstanceReport(
            instance_id=self.info.instance_id,
            num_output_tokens=self.num_tokens,
            num_chunks=self.num_chunks,
            num_preemptions=self.num_preemptions,
            num_restarts=num_restarts,
            busy_s=self.busy_s,
            num_kv_blocks=self.info.num_kv_blocks,
            block_size=self.info.block_size,
        )
