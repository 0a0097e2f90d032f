"""What vLLM's engine tells of itself with every step, as the controller wants it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from aseer.counts import LATENCY_BUCKETS_S, KvCounts
from aseer.kv.settings import CONNECTOR
from aseer.types import InstanceLoad

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.instance.vllm.speculation import Speculation

_MIN_PREFILL_TOKENS = 64  # fewer say little about what a token costs


class EngineStats:
    """The engine's load, as its scheduler tells with every step."""

    def __init__(self) -> None:
        self._running = 0
        self._waiting = 0
        self._kv_used = 0.0
        self._preemptions = 0
        self._kv: Counter[str] = Counter()
        self._is_pool_ours = False
        self.speculation: Speculation | None = None

    def load(self) -> InstanceLoad:
        return InstanceLoad(
            num_running=self._running,
            num_waiting=self._waiting,
            kv_used=self._kv_used,
            num_preemptions=self._preemptions,
            drafts=self.speculation.counts if self.speculation else None,
            kv=kv_counts(self._kv) if self._kv else None,
        )

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            self._waiting = scheduler_stats.num_waiting_reqs
            self._kv_used = scheduler_stats.kv_cache_usage
            if self._is_pool_ours:  # other connectors tell other things
                self._kv.update(scheduler_stats.kv_connector_stats or {})
            drafts = scheduler_stats.spec_decoding_stats
            if drafts is not None and self.speculation is not None:
                self.speculation.record(drafts)
        if iteration_stats is not None:
            self._preemptions += iteration_stats.num_preempted_reqs
            for done in iteration_stats.finished_requests:
                computed = done.num_prompt_tokens - done.num_cached_tokens
                if self._kv and computed >= _MIN_PREFILL_TOKENS:
                    self._kv["prefill_tokens"] += computed
                    self._kv["prefill_s"] += done.prefill_time

    def make_logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        transfer = vllm_config.kv_transfer_config
        self._is_pool_ours = transfer is not None and transfer.kv_connector == CONNECTOR
        return _StatLogger(self)


def kv_counts(sums: Mapping[str, float]) -> KvCounts:
    """The connector's sums (`aseer.kv.connector.TransferStats`) in a message's form."""
    prefix = "loads_in_bucket_"
    own: dict[str, Any] = {k: v for k, v in sums.items() if not k.startswith(prefix)}
    num_buckets = len(LATENCY_BUCKETS_S) + 1 if len(own) < len(sums) else 0
    buckets = tuple(int(sums.get(f"{prefix}{i}", 0)) for i in range(num_buckets))
    return KvCounts(load_buckets=buckets, **own)


class _StatLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM is untyped to us
    """Hands vLLM's statistics on."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._stats.record(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass
