"""Keeps what a rollout's report and live display need; decides nothing.

What is done for a report of an instance does not grow with the cluster: sums over all
instances are made once a second, samples are thinned out to a number for all, and of a
finished request a row of numbers is kept.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from aseer.counts import DraftCounts, KvCounts, total
from aseer.report import (
    Completions,
    KvReport,
    Progress,
    RolloutReport,
    SpeculationReport,
    tail_time,
)
from aseer.runtime.figures import InstanceFigures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.controller import Controller
    from aseer.counts import Counts
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.metrics import Figures
    from aseer.types import (
        InstanceId,
        InstanceInfo,
        InstanceLoad,
        Response,
    )

# Samples of an instance: so many, but of all together not more than the second figure
# (some 30 MB), and a few of each in any case. Then every second one is dropped.
_MAX_SAMPLES = 2000
_MAX_SAMPLES_OF_ALL = 100_000
_MIN_SAMPLES = 50
# The least time between two snapshots of the rollout. It grows with the number of
# instances, as a snapshot's own time does, so that their share of the time is bounded.
_PROGRESS_INTERVAL_S = 0.2
_PROGRESS_INTERVAL_PER_INSTANCE_S = 0.001
_SUMS_INTERVAL_S = 1.0


class Recorder:
    """Figures of one rollout, collected as it runs."""

    def __init__(
        self,
        controller: Controller,
        policy: str,
        chunk_size: int,
        weight_version: int,
        kv_pool: KvPools | None = None,
    ) -> None:
        self._controller = controller
        self._kv_pool = kv_pool
        # Of those that requests go by; where they lose the last pool, it is 0 there.
        self._granularity = kv_pool.granularity if kv_pool is not None else 1
        if kv_pool is not None:
            self._pool_before = (kv_pool.counts, kv_pool.num_restarts)
        self._policy = policy
        self._chunk_size = chunk_size
        self._weight_version = weight_version
        self._instances: dict[InstanceId, InstanceFigures] = {}
        self._in_order: list[InstanceFigures] = []
        self._sums_at: float | None = None
        self._kv_sum = KvCounts()
        self._speculation_sum: SpeculationReport | None = None
        self._completions = Completions()
        self._reasons: Counter[str] = Counter()  # of requests that are over
        self._num_tokens_counted = 0
        self._num_ends_counted = 0
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
        record = self._instances.get(info.instance_id)
        if record is None:
            record = self._instances[info.instance_id] = InstanceFigures(info)
            self._in_order = [r for _, r in sorted(self._instances.items())]
            self._max_samples = max(
                _MIN_SAMPLES,
                min(_MAX_SAMPLES, _MAX_SAMPLES_OF_ALL // len(self._instances)),
            )
        record.begin(load)

    def instance_down(self, instance_id: InstanceId, now: float) -> None:
        """An instance is gone: it is not busy."""
        record = self._instances.get(instance_id)
        if record is not None:
            record.set_busy(busy=False, now=now)

    def count_tokens(self, instance_id: InstanceId) -> None:
        """The controller has taken an instance's report: what was new is of it."""
        record = self._instances[instance_id]
        counters = self._controller.counters
        record.num_tokens += counters.num_reported_tokens - self._num_tokens_counted
        record.num_chunks += counters.num_reported_ends - self._num_ends_counted
        self._num_tokens_counted = counters.num_reported_tokens
        self._num_ends_counted = counters.num_reported_ends

    def mark_busy(self, now: float) -> None:
        """Account which instances have work."""
        for instance_id in self._controller.running.take_touched():
            record = self._instances.get(instance_id)
            if record is not None:
                busy = self._controller.running.num_on(instance_id) > 0
                record.set_busy(busy=busy, now=now)

    def sample(self, instance_id: InstanceId, load: InstanceLoad, now: float) -> None:
        """An instance's load, for the timeline."""
        record = self._instances[instance_id]
        controller = self._controller
        record.count(load)
        record.note(
            now,
            controller.running.num_on(instance_id),
            controller.scheduler.fleet.num_free_blocks(instance_id),
            self._max_samples,
        )

    def finished(self, response: Response) -> None:
        """A request is over."""
        num_tokens = len(response.token_ids)
        self._reasons[response.finish_reason] += 1
        self._finished_tokens += num_tokens
        self._max_tokens = max(self._max_tokens, num_tokens)
        self._completions.add(response)

    def count_into(self, figures: Figures) -> None:
        """Add what the rollout has done so far to the engine's figures."""
        controller, counters = self._controller, self._controller.counters
        figures.responses.update(self._reasons)
        figures.counts.update(
            aseer_rollouts=1,
            aseer_replayed_responses=counters.num_replayed,
            aseer_output_tokens=counters.num_reported_tokens,
            aseer_chunks=counters.num_chunks,
            aseer_migrations=counters.num_migrations,
            aseer_node_migrations=counters.num_node_migrations,
            aseer_recomputed_tokens=counters.num_recomputed_tokens,
        )
        figures.num_unfinished = controller.num_unfinished
        figures.num_waiting = controller.num_waiting

    def progress(
        self, now: float, *, intake_open: bool, is_over: bool = False
    ) -> Progress:
        """The rollout as it stands: a snapshot, made anew every 0.2 s, more seldom with
        more than 200 instances, and at its end.
        """
        last = self._progress
        if last is not None and not is_over:
            num = len(self._instances)
            interval_s = max(
                _PROGRESS_INTERVAL_S, num * _PROGRESS_INTERVAL_PER_INSTANCE_S
            )
            if now - last.t_s < interval_s:
                return last
        self._sum_up(now, is_over=is_over)
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
            longest_running=controller.buffer.longest_running(),
            eta_s=self._eta(throughput),
            intake_open=intake_open,
            instances=[r.latest for r in self._in_order if r.latest is not None],
            speculation=self._speculation_sum,
            kv=self._kv(now),
        )
        return self._progress

    @property
    def kv_counts(self) -> KvCounts:
        """What all engines moved to and from the pool; of a second ago at most."""
        return self._kv_sum

    def _sum_up(self, now: float, *, is_over: bool = False) -> None:
        """Sums over all instances, once in a while."""
        last = self._sums_at
        if is_over or last is None or now - last >= _SUMS_INTERVAL_S:
            self._sums_at = now
            self._speculation_sum = self._speculation()
            if self._kv_pool is not None:
                terms = [r.kv_terms for r in self._in_order]
                self._kv_sum = _difference(KvCounts(), terms)

    def _kv(self, now: float) -> KvReport | None:
        """What the KV pool did; None if there is none."""
        if self._kv_pool is None:
            return None
        pool, (before, restarts_before) = self._kv_pool.counts, self._pool_before
        total, counters = self.kv_counts, self._controller.counters
        moves = (counters.moves, counters.node_moves)
        busy_s = sum(r.busy_until(now) for r in self._instances.values())
        per_token = pool.per_chunk / self._granularity
        return KvReport(
            stored_bytes=pool.stored - before.stored,
            loaded_bytes=int(total.loaded_tokens * per_token),
            evicted_bytes=pool.evicted - before.evicted,
            freed_bytes=pool.freed - before.freed,
            disk_written_bytes=pool.disk_written - before.disk_written,
            disk_read_bytes=pool.disk_read - before.disk_read,
            prefetched_bytes=pool.prefetched - before.prefetched,
            pulled_bytes=pool.pulled - before.pulled,
            resident_bytes=pool.resident,
            disk_resident_bytes=pool.disk_resident,
            capacity_bytes=pool.capacity,
            num_loads=total.num_loads,
            num_loaded_tokens=total.loaded_tokens,
            num_moves_found=sum(each.num_found for each in moves),
            num_moves_recomputed=sum(each.num_recomputed for each in moves),
            load_p50_s=total.load_latency_s(0.5),
            load_p90_s=total.load_latency_s(0.9),
            load_p99_s=total.load_latency_s(0.99),
            time_share=(total.store_s + total.copy_s) / busy_s if busy_s else 0.0,
            num_failures=total.num_failures,
            num_restarts=self._kv_pool.num_restarts - restarts_before,
        )

    def _speculation(self) -> SpeculationReport | None:
        """What the engines that speculate did; None if there is none."""
        terms = [r.draft_terms for r in self._in_order]
        if not any(plus for plus, _ in terms):
            return None
        counts = _difference(DraftCounts(), terms)
        return SpeculationReport(
            acceptance_length=counts.acceptance_length,
            num_drafts=counts.num_drafts,
            drafted=list(counts.drafted),
            accepted=list(counts.accepted),
            drafting_share=counts.drafting_share,
            drafting_share_p99=counts.drafting_share_of(0.99),
            drafting_share_worst=counts.drafting_share_of(1.0),
        )

    def _eta(self, throughput: float) -> float | None:
        """What is left if the rest is as long as what is finished; else None."""
        counters = self._controller.counters
        if not counters.num_finished or not throughput:
            return None
        mean = self._finished_tokens / counters.num_finished
        expected = mean * self._controller.num_unfinished
        had = counters.num_replayed_tokens + counters.num_resumed_tokens
        under_way = had + counters.num_output_tokens - self._finished_tokens
        return (expected - under_way) / throughput if expected > under_way else None

    def report(self, now: float, num_restarts: Sequence[int]) -> RolloutReport:
        """The finished rollout."""
        counters = self._controller.counters
        self._sum_up(now, is_over=True)
        for record in self._instances.values():
            record.set_busy(busy=False, now=now)
        times = self._completions.times()
        wall = max(times, default=0.0)
        busy = sum(r.busy_s for r in self._instances.values())
        capacity_s = wall * len(self._instances)  # none: all were down throughout
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
            num_node_migrations=counters.num_node_migrations,
            num_preemptions=sum(r.num_preemptions for r in self._instances.values()),
            num_recomputed_tokens=counters.num_recomputed_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_retries=counters.num_retries,
            finish_reasons=dict(self._reasons),
            mean_output_tokens=self._finished_tokens / len(times) if times else 0.0,
            max_output_tokens=self._max_tokens,
            idle_fraction=1 - busy / capacity_s if capacity_s else 0.0,
            weight_version=self._weight_version,
            instances=[
                record.report(restarts)
                for (_, record), restarts in zip(
                    sorted(self._instances.items()), num_restarts, strict=True
                )
            ],
            num_replayed=counters.num_replayed,
            num_resumed_tokens=counters.num_resumed_tokens,
            speculation=self._speculation_sum,
            kv=self._kv(now),
            completions=self._completions.rows(),
            timeline=sorted(
                (s for r in self._instances.values() for s in r.samples),
                key=lambda s: s.t_s,
            ),
        )


def _difference(
    none: Counts, terms: Sequence[tuple[list[Counts], list[Counts]]]
) -> Counts:
    """All that is counted, less all that does not count here."""
    plus = total(none, [c for counts, _ in terms for c in counts])
    return plus - total(none, [c for _, counts in terms for c in counts])
