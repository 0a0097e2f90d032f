"""What an engine counts of drafts and of the KV pool, added up over reports.

Sums of two counts are counts, and so are differences, which say what happened between
two moments. Times come as histograms, whose limits are a factor of 1.4 apart.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    Counts = TypeVar("Counts", "DraftCounts", "KvCounts")

DRAFTING_SHARES = tuple(0.001 * 2 ** (i / 2) for i in range(20))
"""Upper limits of `DraftCounts.share_buckets`: 0.1% to 72%; one more is beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """What speculation did, from some moment on.

    A draft is what one request had verified in one step; steps without one count
    nowhere but in `step_s`, `draft_s` and `share_buckets`.

    Attributes:
        num_drafts: drafts verified.
        drafted: tokens drafted at each position of a draft. accepted: of them, the
            accepted.
        step_s: time that steps took. draft_s: of it, spent on drafting.
        share_buckets: steps by the share of their time spent on drafting, as
            `DRAFTING_SHARES` has them; empty = none.
    """

    num_drafts: int = 0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    step_s: float = 0.0
    draft_s: float = 0.0
    share_buckets: tuple[int, ...] = ()

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return self._combined(other, 1)

    def __sub__(self, other: DraftCounts) -> DraftCounts:
        return self._combined(other, -1)

    def _combined(self, other: DraftCounts, sign: int) -> DraftCounts:
        return DraftCounts(
            num_drafts=self.num_drafts + sign * other.num_drafts,
            drafted=_added(self.drafted, other.drafted, sign),
            accepted=_added(self.accepted, other.accepted, sign),
            step_s=self.step_s + sign * other.step_s,
            draft_s=self.draft_s + sign * other.draft_s,
            share_buckets=_added(self.share_buckets, other.share_buckets, sign),
        )

    @property
    def acceptance_length(self) -> float:
        """Mean tokens that a step with a draft yields, the model's own included."""
        return 1 + sum(self.accepted) / self.num_drafts if self.num_drafts else 1.0

    @property
    def drafting_share(self) -> float:
        """Share of the steps' time that drafting takes."""
        return self.draft_s / self.step_s if self.step_s else 0.0

    def drafting_share_of(self, share: float) -> float:
        """What that share of the steps stays within, to a factor of 1.4; 1 = of all."""
        return _quantile(self.share_buckets, (*DRAFTING_SHARES, 1.0), share)


def total(none: Counts, counts: Sequence[Counts]) -> Counts:
    """The sum of counts; `none` = the sum of none.

    It is made a field at a time: of a thousand it takes a tenth of the time that adding
    one by one does.
    """
    if not counts:
        return none
    sums: dict[str, Any] = {}
    for name in (f.name for f in fields(none)):
        values = [getattr(c, name) for c in counts]
        if isinstance(values[0], tuple):
            sums[name] = tuple(map(sum, zip_longest(*values, fillvalue=0)))
        else:
            sums[name] = sum(values)
    return type(none)(**sums)


def _quantile(buckets: Sequence[int], limits: Sequence[float], share: float) -> float:
    """The limit that so much of the `buckets` lies within; 0 if they are empty."""
    left = share * sum(buckets)
    for limit, num in zip(limits, buckets, strict=False):
        left -= num
        if left <= 0 < num:
            return limit
    return 0.0


def _added(a: Sequence[int], b: Sequence[int], sign: int) -> tuple[int, ...]:
    return tuple(x + sign * y for x, y in zip_longest(a, b, fillvalue=0))


LATENCY_BUCKETS_S = tuple(0.001 * 2 ** (i / 2) for i in range(34))
"""Upper limits of `KvCounts.load_buckets`: 1 ms to 93 s; one bucket more is beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCounts:
    """What an engine moved to and from the KV pool, from some moment on.

    Attributes:
        stored_tokens: offered to the pool, which may have them already.
        loaded_tokens: found there and copied into the engine's own cache.
        num_loads: requests that loaded. load_s: from their lookup to their last byte.
        load_buckets: loads by `LATENCY_BUCKETS_S`; empty = none.
        store_s, copy_s: time steps spent on stores, and on copying what was loaded.
        prefill_tokens: computed when a chunk started. prefill_s: the time it took.
        num_failures: calls on the pool that failed or took too long.
    """

    stored_tokens: int = 0
    loaded_tokens: int = 0
    num_loads: int = 0
    load_s: float = 0.0
    load_buckets: tuple[int, ...] = ()
    store_s: float = 0.0
    copy_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    num_failures: int = 0

    def __add__(self, other: KvCounts) -> KvCounts:
        return self._combined(other, 1)

    def __sub__(self, other: KvCounts) -> KvCounts:
        return self._combined(other, -1)

    def _combined(self, other: KvCounts, sign: int) -> KvCounts:
        sums: dict[str, Any] = {
            f.name: getattr(self, f.name) + sign * getattr(other, f.name)
            for f in fields(self)
            if f.name != "load_buckets"
        }
        buckets = _added(self.load_buckets, other.load_buckets, sign)
        return KvCounts(load_buckets=buckets, **sums)

    def load_latency_s(self, share: float) -> float:
        """The time within which that share of loads was done, to a factor of 1.4."""
        limits = (*LATENCY_BUCKETS_S, LATENCY_BUCKETS_S[-1])
        return _quantile(self.load_buckets, limits, share)

    @property
    def move_price(self) -> float | None:
        """Time to load a token over the time to compute it; None while unknown."""
        compute_s = self.compute_token_s
        if not (self.loaded_tokens and compute_s):
            return None
        return min(1.0, self.load_s / self.loaded_tokens / compute_s)

    @property
    def compute_token_s(self) -> float | None:
        """Time to compute a token; None while unknown."""
        if not (self.prefill_tokens and self.prefill_s):
            return None
        return self.prefill_s / self.prefill_tokens
