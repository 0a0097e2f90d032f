"""What a rollout did: figures at its end, and a timeline while it runs.

Definitions follow the Seer paper. *Throughput* is output tokens over the rollout's wall
time. *Tail requests* are the last 10% to complete, and *tail time* is the end of the
rollout minus the completion time of the 90th-percentile request.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.types import FinishReason, Response

TAIL_FRACTION = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSample:
    """One instance at one moment.

    Attributes:
        t_s: since the rollout's start.
        num_running: chunks placed there. num_waiting: of them, not yet running in the
            engine.
        kv_used: share of its KV blocks in use, 0 to 1.
        kv_reserved: share of its KV blocks reserved by admitted chunks, 0 to 1.
        num_output_tokens: generated there since the start.
        num_drafts, num_drafted_tokens, num_accepted_tokens: drafts verified there since
            the start, the tokens in them, and of those the accepted.
        num_stored_tokens, num_loaded_tokens: to and from the KV pool since the start.
    """

    t_s: float
    instance_id: int
    num_running: int
    num_waiting: int
    kv_used: float
    kv_reserved: float
    num_output_tokens: int
    num_drafts: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_stored_tokens: int = 0
    num_loaded_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReport:
    """One instance over a rollout.

    Attributes:
        busy_s: time with at least one chunk placed there.
        num_restarts: times it died and came back.
        num_kv_blocks, block_size: as `InstanceInfo` has them.
        kv_tokens: tokens whose KV fits at once, in requests as long as the model takes;
            of models whose layers differ in what they keep, this is not the product of
            the former two.
    """

    instance_id: int
    num_output_tokens: int
    num_chunks: int
    num_preemptions: int
    num_restarts: int
    busy_s: float
    num_kv_blocks: int
    block_size: int
    kv_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationReport:
    """What speculation did over a rollout.

    Attributes:
        acceptance_length: mean tokens that a step with a draft yields for its request:
            1 + accepted / drafts, the model's own token included.
        num_drafts: drafts verified, one a request and step.
        drafted: tokens drafted at each position of a draft. accepted: of them, the
            accepted.
        drafting_share: share of the engines' step time spent on drafting, 0 to 1.
        drafting_share_p99, drafting_share_worst: what it is at most in 99% of the
            steps, and in all, to a factor of 1.4.
    """

    acceptance_length: float
    num_drafts: int
    drafted: list[int]
    accepted: list[int]
    drafting_share: float
    drafting_share_p99: float
    drafting_share_worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReport:
    """What the KV pool did over a rollout.

    Figures of its servers are as of the last poll, half a second ago at most.

    Attributes:
        stored_bytes: written to it by engines. loaded_bytes: read from it by engines.
        evicted_bytes: dropped from DRAM for want of room (a disk may have it).
        freed_bytes: dropped since nobody will ask for it again.
        disk_written_bytes, disk_read_bytes: moved between DRAM and disk.
        prefetched_bytes: of those read, what was read before an engine asked for it.
        pulled_bytes: brought from other nodes, to where a request went on.
        resident_bytes, disk_resident_bytes: held at the end. capacity_bytes: of DRAM.
        num_loaded_tokens: whose KV was found there; not those in an engine's own cache.
        num_moves_found: chunks on another instance than the one before that computed
            one token only. num_moves_recomputed: that computed more.
        load_p50_s, load_p90_s, load_p99_s: from an engine's question to the last byte,
            to a factor of 1.4.
        time_share: of the busy engines' time that stores and copies took, 0 to 1.
        num_failures: calls of engines that failed or took too long.
        num_restarts: of servers.
    """

    stored_bytes: int
    loaded_bytes: int
    evicted_bytes: int
    freed_bytes: int
    disk_written_bytes: int
    disk_read_bytes: int
    prefetched_bytes: int
    pulled_bytes: int
    resident_bytes: int
    disk_resident_bytes: int
    capacity_bytes: int
    num_loads: int
    num_loaded_tokens: int
    num_moves_found: int
    num_moves_recomputed: int
    load_p50_s: float
    load_p90_s: float
    load_p99_s: float
    time_share: float
    num_failures: int
    num_restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """When a request was over, and how."""

    t_s: float
    group_id: str
    index: int
    instance_id: int | None
    num_output_tokens: int
    finish_reason: str


class Completions:
    """When requests were over, and how: columns, some 30 bytes a request."""

    _REASONS: tuple[FinishReason, ...] = ("stop", "length", "aborted", "error")
    _NOWHERE = -1

    def __init__(self) -> None:
        self._times = array("d")
        self._group_ids: list[str] = []
        self._indices = array("i")
        self._instances = array("i")
        self._lengths = array("i")
        self._reasons = array("b")

    def add(self, response: Response) -> None:
        """A request is over."""
        metrics = response.metrics
        self._times.append(metrics.finished_at_s)
        self._group_ids.append(response.group_id)
        self._indices.append(response.index)
        places = [] if response.replayed else metrics.instances
        self._instances.append(places[-1] if places else self._NOWHERE)
        self._lengths.append(len(response.token_ids))
        self._reasons.append(self._REASONS.index(response.finish_reason))

    def times(self) -> list[float]:
        """In order of completion."""
        return self._times.tolist()

    def rows(self) -> list[Completion]:
        """For the report."""
        columns = zip(
            self._times,
            self._group_ids,
            self._indices,
            self._instances,
            self._lengths,
            self._reasons,
            strict=True,
        )
        return [
            Completion(
                t_s=t_s,
                group_id=group_id,
                index=index,
                instance_id=None if instance_id == self._NOWHERE else instance_id,
                num_output_tokens=num_tokens,
                finish_reason=self._REASONS[reason],
            )
            for t_s, group_id, index, instance_id, num_tokens, reason in columns
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A rollout while it runs, for a live display.

    Attributes:
        num_requests: known so far; more may come while `intake_open`.
        longest_running: id of the running request that has the most tokens, and how
            many it has.
        eta_s: until the end if the length estimates hold; None while unknown.
        instances: the latest sample of each.
        speculation: so far; None if the engines do not speculate.
        kv: so far; None without a KV pool.
    """

    t_s: float
    num_groups: int
    num_groups_finished: int
    num_requests: int
    num_finished: int
    num_waiting: int
    num_output_tokens: int
    throughput_tok_s: float
    longest_running: tuple[str, int] | None
    eta_s: float | None
    intake_open: bool
    instances: list[TimelineSample]
    speculation: SpeculationReport | None = None
    kv: KvReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdateReport:
    """What `Engine.update_weights` did, and how long its parts took.

    Attributes:
        version: of the weights that every instance has now.
        send_s: checking the tensors, and writing those that are not in files yet.
        prepare_s: until every instance had opened them.
        switch_s: until every instance had loaded them.
    """

    version: int
    num_tensors: int
    num_bytes: int
    send_s: float
    prepare_s: float
    switch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """A finished rollout.

    Attributes:
        wall_s: from the start to the last response.
        tail_s: end minus the completion of the 90th-percentile request.
        num_chunks: dispatches. num_migrations: chunks that started on another instance
            than the request's chunk before. num_node_migrations: of these, on another
            host. num_retries: chunks lost with their instance.
        num_recomputed_tokens: tokens whose KV was computed again.
        num_cached_tokens: tokens whose KV a chunk found when it started.
        num_preemptions: requests the engines dropped from KV and restarted.
        num_replayed: responses that came out of a journal. num_resumed_tokens: tokens
            that a journal had of other responses. Neither is in `num_output_tokens`.
        journal_error: why the journal went off; None = it did not, or there is none.
        speculation: None if the engines do not speculate.
        kv: None without a KV pool.
    """

    policy: str
    chunk_size: int
    num_groups: int
    num_responses: int
    num_prompt_tokens: int
    num_output_tokens: int
    wall_s: float
    throughput_tok_s: float
    tail_s: float
    num_chunks: int
    num_migrations: int
    num_preemptions: int
    num_recomputed_tokens: int
    num_cached_tokens: int
    num_retries: int
    finish_reasons: dict[str, int]
    mean_output_tokens: float
    max_output_tokens: int
    idle_fraction: float
    weight_version: int
    instances: list[InstanceReport]
    num_node_migrations: int = 0
    num_replayed: int = 0
    num_resumed_tokens: int = 0
    journal_error: str | None = None
    speculation: SpeculationReport | None = None
    kv: KvReport | None = None
    completions: list[Completion] = field(default_factory=list)
    timeline: list[TimelineSample] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def tail_time(finished_at_s: Sequence[float]) -> float:
    """End of the rollout minus the completion time of the 90th-percentile request.

    The 90th-percentile request is the last of the first 90% to complete (rounded up),
    so that a single request has no tail.
    """
    if not finished_at_s:
        return 0.0
    times = sorted(finished_at_s)
    last_of_body = math.ceil((1 - TAIL_FRACTION) * len(times)) - 1
    return times[-1] - times[last_of_body]
