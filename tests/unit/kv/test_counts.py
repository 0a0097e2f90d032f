"""What engines count of the KV pool: sums, differences, latencies, prices."""

from __future__ import annotations

import pytest

from aseer.counts import LATENCY_BUCKETS_S, KvCounts


def counts_of(*latencies_s: float) -> KvCounts:
    buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)
    for latency_s in latencies_s:
        buckets[sum(latency_s > limit for limit in LATENCY_BUCKETS_S)] += 1
    return KvCounts(
        num_loads=len(latencies_s),
        load_s=sum(latencies_s),
        load_buckets=tuple(buckets),
        loaded_tokens=100 * len(latencies_s),
    )


def test_a_difference_and_a_sum_make_the_whole():
    first, both = counts_of(0.01), counts_of(0.01, 0.5)
    assert (both - first) + first == both
    assert (both - first).num_loads == 1
    assert KvCounts() + both == both


def test_latencies_are_known_to_a_factor():
    counts = counts_of(*[0.01] * 90, *[0.3] * 9, 5.0)
    for share, true_s in ((0.5, 0.01), (0.95, 0.3), (1.0, 5.0)):
        assert true_s <= counts.load_latency_s(share) <= 1.5 * true_s
    assert KvCounts().load_latency_s(0.5) == 0
    assert counts_of(1000.0).load_latency_s(0.5) == LATENCY_BUCKETS_S[-1]


def test_the_price_of_a_move_is_what_loading_takes_of_computing():
    loads = counts_of(0.1)  # 1 ms a token
    assert loads.move_price is None
    computed = KvCounts(prefill_tokens=1000, prefill_s=10.0)
    assert (loads + computed).move_price == pytest.approx(0.1)
    cheap = KvCounts(prefill_tokens=1000, prefill_s=0.01)
    assert (loads + cheap).move_price == 1.0, "then computing is as good"
