"""One instance's figures over a rollout, also over the lives of several processes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aseer.counts import DraftCounts, KvCounts, total
from aseer.report import InstanceReport, TimelineSample
from aseer.types import InstanceLoad

if TYPE_CHECKING:
    from aseer.types import InstanceInfo


class InstanceFigures:
    """One instance's figures.

    What an engine counts, it counts from its process's start. What counts here is what
    is new since `begin`, and what earlier processes had counted.
    """

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.num_tokens = 0
        self.num_chunks = 0
        self.busy_s = 0.0
        self.samples: list[TimelineSample] = []
        self._load = self._seen = InstanceLoad()
        self._earlier_preemptions = 0
        self._earlier_drafts: DraftCounts | None = None
        self._earlier_kv = KvCounts()
        self._busy_since: float | None = None
        # When it reported last: the time, chunks placed there, and free KV blocks.
        self._noted: tuple[float, int, int] | None = None
        self._keep_every = 1
        self._num_offered = 0

    def begin(self, load: InstanceLoad) -> None:
        """A process takes part, with what it has counted before."""
        self._earlier_preemptions = self.num_preemptions
        self._earlier_drafts = self.drafts
        self._earlier_kv = self.kv
        self._load = self._seen = load

    def count(self, load: InstanceLoad) -> None:
        """What the process has counted now; what it does not say stays as it was."""
        last = self._load
        drafts, kv = load.drafts or last.drafts, load.kv or last.kv
        if drafts is not load.drafts or kv is not load.kv:
            load = replace(load, drafts=drafts, kv=kv)
        self._load = load

    @property
    def num_preemptions(self) -> int:
        new = self._load.num_preemptions - self._seen.num_preemptions
        return self._earlier_preemptions + new

    @property
    def drafts(self) -> DraftCounts | None:
        """None if it has never counted any."""
        plus, minus = self.draft_terms
        none = DraftCounts()
        return total(none, plus) - total(none, minus) if plus else None

    @property
    def draft_terms(self) -> tuple[list[DraftCounts], list[DraftCounts]]:
        """What is counted, and what of that does not count here."""
        now, seen = self._load.drafts, self._seen.drafts
        plus = [] if self._earlier_drafts is None else [self._earlier_drafts]
        if now is None or self._load is self._seen:
            return plus, []
        return [*plus, now], [] if seen is None else [seen]

    @property
    def kv(self) -> KvCounts:
        plus, minus = self.kv_terms
        return total(KvCounts(), plus) - total(KvCounts(), minus)

    @property
    def kv_terms(self) -> tuple[list[KvCounts], list[KvCounts]]:
        """As `draft_terms`."""
        now, seen = self._load.kv, self._seen.kv
        if now is None:
            return [self._earlier_kv], []
        return [self._earlier_kv, now], [] if seen is None else [seen]

    @property
    def drafts_in_all(self) -> tuple[int, int, int]:
        """Drafts, their tokens, and of those the accepted; for every sample."""
        counts = (self._earlier_drafts, self._load.drafts)
        if not any(counts):
            return 0, 0, 0
        seen = _draft_sums(self._seen.drafts)
        earlier, now = map(_draft_sums, counts)
        return (
            earlier[0] + now[0] - seen[0],
            earlier[1] + now[1] - seen[1],
            earlier[2] + now[2] - seen[2],
        )

    @property
    def kv_in_all(self) -> tuple[int, int]:
        """Tokens stored and loaded; for every sample."""
        if self._load.kv is None:
            return self._earlier_kv.stored_tokens, self._earlier_kv.loaded_tokens
        kv, now, seen = self._earlier_kv, self._load.kv, self._seen.kv or KvCounts()
        return (
            kv.stored_tokens + now.stored_tokens - seen.stored_tokens,
            kv.loaded_tokens + now.loaded_tokens - seen.loaded_tokens,
        )

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

    def note(
        self, now: float, num_running: int, num_free_blocks: int, max_samples: int
    ) -> None:
        """It has reported; a sample is made only if one is kept."""
        self._noted = (now, num_running, num_free_blocks)
        self._num_offered += 1
        if self._num_offered % self._keep_every == 0:
            self.samples.append(self._sample(*self._noted))
        while len(self.samples) > max_samples:
            del self.samples[::2]
            self._keep_every *= 2

    @property
    def latest(self) -> TimelineSample | None:
        """The instance when it reported last; None if it has not."""
        return self._noted and self._sample(*self._noted)

    def _sample(
        self, now: float, num_running: int, num_free_blocks: int
    ) -> TimelineSample:
        load, drafts, kv = self._load, self.drafts_in_all, self.kv_in_all
        return TimelineSample(
            t_s=now,
            instance_id=self.info.instance_id,
            num_running=num_running,
            num_waiting=load.num_waiting,
            kv_used=load.kv_used,
            kv_reserved=1 - num_free_blocks / self.info.num_kv_blocks,
            num_output_tokens=self.num_tokens,
            num_drafts=drafts[0],
            num_drafted_tokens=drafts[1],
            num_accepted_tokens=drafts[2],
            num_stored_tokens=kv[0],
            num_loaded_tokens=kv[1],
        )

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
            kv_tokens=self.info.kv_tokens,
        )


def _draft_sums(counts: DraftCounts | None) -> tuple[int, int, int]:
    if counts is None:
        return 0, 0, 0
    return counts.num_drafts, sum(counts.drafted), sum(counts.accepted)
