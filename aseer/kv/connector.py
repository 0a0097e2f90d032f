"""LMCache's connector in an engine, guarded: a pool that fails costs recomputation.

Loaded by vLLM by name, in the scheduler's and the workers' processes. An exception out
of a connector kills the engine, and LMCache lets several through when its server dies
or hangs. Guarded are exactly the calls that talk to the server; a failed one marks the
server unhealthy, whereupon LMCache's own heartbeat waits for its return and registers
the engine anew. A lookup that takes too long is given up. Further:

- LMCache counts a request's computed tokens by adding up what is scheduled. After a
  load that failed in part, and with drafts that were rejected, that is too many, and it
  would store memory that is not computed yet. Here the count is vLLM's, at every step.
- Telemetry of block allocations, which copies every token id again and again, is off.

What is stored and loaded, and how long that takes, is counted as `KvCounts` and sent
along vLLM's statistics.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from aseer.kv.pickles import refuse_in_engine
from aseer.kv.settings import TIMEOUT_KEY
from aseer.types import LATENCY_BUCKETS_S

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("aseer.kv")


@dataclass
class Stats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped to us
    """Sums since the last report: the fields of `KvCounts`."""

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.data[name] = self.data.get(name, 0) + amount

    def add_load(self, num_tokens: int, seconds: float) -> None:
        """One request's load, from lookup to the last byte."""
        self.add(loaded_tokens=num_tokens, num_loads=1, load_s=seconds)
        bucket = sum(seconds > limit for limit in LATENCY_BUCKETS_S)
        self.add(**{f"loads_in_bucket_{bucket}": 1})

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data

    def take(self) -> Stats | None:
        taken = Stats(self.data)
        self.reset()
        return None if taken.is_empty() else taken


class GuardedConnector(LMCacheMPConnector):  # type: ignore[misc]  # untyped, too
    """See the module."""

    def __init__(
        self, vllm_config: Any, role: Any, kv_cache_config: Any = None
    ) -> None:
        refuse_in_engine()
        super().__init__(vllm_config, role, kv_cache_config)
        self._stats = Stats()
        self._lookups: dict[str, float] = {}
        self._loads: dict[str, tuple[float, int]] = {}
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._timeout_s = float(extra[TIMEOUT_KEY])
        if role is KVConnectorRole.WORKER:
            self._guard_worker(self.worker_adapter)
        else:
            self.scheduler_adapter._mq_timeout = self._timeout_s
            self._guard_scheduler(self.scheduler_adapter)

    # In the workers

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        # LMCache has one timeout for a start on a busy machine and for every transfer.
        adapter = self.worker_adapter
        adapter._mq_timeout = self._timeout_s
        transfer = getattr(adapter.transfer_ctx, "_engine_driven_context", None)
        if transfer is not None:
            transfer.mq_timeout = self._timeout_s

    def _guard_worker(self, adapter: Any) -> None:
        store, retrieve = adapter.submit_store_request, adapter.submit_retrieve_request

        def guarded_store(request_id: str, op: Any, *args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            try:
                store(request_id, op, *args, **kwargs)
            except Exception as error:
                self._stats.add(num_failures=1)
                _mark(adapter._health_event, "a store", error)
            self._stats.add(store_s=time.perf_counter() - started)

        def guarded_retrieve(
            request_id: str, op: Any, *args: Any, **kwargs: Any
        ) -> None:
            started = time.perf_counter()
            try:
                retrieve(request_id, op, *args, **kwargs)
            except Exception as error:
                self._stats.add(num_failures=1)
                _mark(adapter._health_event, "a load", error)
                # As LMCache itself does with one that finds the server unhealthy.
                adapter.error_block_ids.update(op.flat_block_ids)
                adapter._failed_request_ids.add(request_id)
                adapter._dropped_retrieves.add(request_id)
            self._stats.add(copy_s=time.perf_counter() - started)

        adapter.submit_store_request = guarded_store
        adapter.submit_retrieve_request = guarded_retrieve

    # In the scheduler

    def _guard_scheduler(self, adapter: Any) -> None:
        def mark(what: str, error: Exception) -> None:
            for event in adapter._health_events.values():
                _mark(event, what, error)

        def guard(name: str, otherwise: Any) -> None:
            call: Callable[..., Any] = getattr(adapter, name)

            def guarded(*args: Any, **kwargs: Any) -> Any:
                try:
                    return call(*args, **kwargs)
                except Exception as error:
                    mark(name, error)
                    return otherwise

            setattr(adapter, name, guarded)

        guard("maybe_submit_lookup_request", None)
        guard("check_lookup_result", 0)
        guard("free_lookup_locks", None)
        guard("end_session", None)
        guard("reset_cache", False)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        request_id = request.request_id
        now = time.monotonic()
        since = self._lookups.setdefault(request_id, now)
        found, is_async = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        if found is None and now - since > self._timeout_s:
            _log.warning("the pool did not find %s in time", request_id)
            self._stats.add(num_failures=1)
            self.scheduler_adapter.cleanup_lookup_result(request_id)
            tracker = self.request_trackers[request_id]
            tracker.state = LMCacheMPRequestState.BYPASS_LMCACHE
            found, is_async = 0, False
        if found is not None:
            del self._lookups[request_id]
            if found:
                self._loads[request_id] = (since, found)
        return found, is_async

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        for request_id in connector_output.finished_recving or ():
            since, num_tokens = self._loads.pop(request_id, (0.0, 0))
            if num_tokens and not connector_output.invalid_block_ids:
                self._stats.add_load(num_tokens, time.monotonic() - since)

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        self._lookups.pop(request.request_id, None)
        self._loads.pop(request.request_id, None)
        return super().request_finished(request, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        told = [
            (r.req_id, r.num_computed_tokens)
            for r in scheduler_output.scheduled_new_reqs
        ]
        cached = scheduler_output.scheduled_cached_reqs
        told += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id, num_computed in told:
            tracker = self.request_trackers.get(request_id)
            if tracker is not None:
                tracker.num_scheduled_tokens = num_computed - max(
                    tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens
                )
        meta = super().build_connector_meta(scheduler_output)
        stored = sum(
            r.op.end - r.op.start for r in meta.requests if r.direction == "STORE"
        )
        if stored:
            self._stats.add(stored_tokens=stored)
        return meta

    def _report_block_allocation_deltas(self, scheduler_output: Any) -> None:
        pass

    # In both

    def get_kv_connector_stats(self) -> Stats | None:
        return self._stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> None:
        return None


def _mark(event: Any, what: str, error: Exception) -> None:
    """The server is unhealthy until the heartbeat says otherwise."""
    if event.is_set():
        _log.warning("the KV pool failed in %s: %s: %s", what, type(error), error)
    event.clear()
