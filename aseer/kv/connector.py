"""LMCache's connector in an engine, guarded: a pool that fails costs recomputation.

Loaded by vLLM by name, in the scheduler's and the workers' processes. An exception out
of a connector kills the engine, and LMCache lets several through when its server dies
or hangs. Guarded are exactly the calls that talk to the server; a failed one marks the
server unhealthy, whereupon LMCache's own heartbeat waits for its return and registers
the engine anew. A lookup that takes too long is given up. Further:

- What a request's last steps computed, and none of them stored, is stored at its end.
- LMCache counts a request's computed tokens by adding up what is scheduled. After a
  load that failed in part, and with drafts that were rejected, that is too many, and it
  would store memory that is not computed yet. Here the count is vLLM's, at every step.
- Telemetry of block allocations, which copies every token id again and again, is off.

What is stored and loaded, and how long that takes, is counted as `KvCounts` and sent
along vLLM's statistics.
"""

from __future__ import annotations

import importlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.integration.vllm.lmcache_mp_connector import (
    LMCacheMPConnector,
    get_group_tokens_per_block,
)
from lmcache.integration.vllm.lmcache_mp_metadata import (
    LMCacheMPRequestMetadata,
    LMCacheMPRequestState,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.request import RequestStatus

from aseer.counts import LATENCY_BUCKETS_S
from aseer.kv import patches
from aseer.kv.guard import WorkerGuard, mark
from aseer.kv.idle import IdleConnector
from aseer.kv.settings import CHUNK_KEY, POOL_LOG_KEY, TIMEOUT_KEY, misfit

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("aseer.kv")

LATE_STORES = "aseer_late_stores"  # of a step's metadata, beside LMCache's own
# Requests that may go on elsewhere: chunks at their end, and turns of a conversation.
_RESUMED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class TransferStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped to us
    """Sums since the last report: the fields of `KvCounts`."""

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.data[name] = self.data.get(name, 0) + amount

    def add_of_worker(self, num_workers: int, **amounts: float) -> None:
        """Add what one of several workers counted, its share of the engine's times."""
        for name, amount in amounts.items():
            self.add(**{name: amount / num_workers if name.endswith("_s") else amount})

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

    def take(self) -> TransferStats | None:
        taken = TransferStats(self.data)
        self.reset()
        return None if taken.is_empty() else taken


class GuardedConnector(LMCacheMPConnector):  # type: ignore[misc]  # untyped, too
    """See the module; where KV does not fit the pool, it is an `IdleConnector`."""

    def __new__(cls, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> Any:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        sizes = get_group_tokens_per_block(vllm_config, kv_cache_config)
        why = misfit([size for size in sizes if size], extra[CHUNK_KEY])
        if why:
            return IdleConnector(vllm_config, role, kv_cache_config, why)
        return super().__new__(cls)

    def __init__(
        self, vllm_config: Any, role: Any, kv_cache_config: Any = None
    ) -> None:
        patches.apply("engine")
        super().__init__(vllm_config, role, kv_cache_config)
        self._stats = TransferStats()
        self._lookups: dict[str, float] = {}
        self._loads: dict[str, tuple[float, int]] = {}
        self._late_stores: list[Any] = []
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._timeout_s = float(extra[TIMEOUT_KEY])
        if role is KVConnectorRole.WORKER:
            log = extra.get(POOL_LOG_KEY)
            # All workers transfer at once, and vLLM adds up what they count.
            num_workers = vllm_config.parallel_config.world_size
            self._guard = WorkerGuard(
                self.worker_adapter,
                partial(self._stats.add_of_worker, num_workers),
                self._timeout_s,
                Path(log) if log else None,
                _load_kernels,
            )
        else:
            self.scheduler_adapter._mq_timeout = self._timeout_s
            self._guard_scheduler(self.scheduler_adapter)

    # In the workers

    def register_kv_caches(self, kv_caches: Any) -> None:
        self._guard.register(partial(super().register_kv_caches, kv_caches))

    def rest_kv(self) -> None:
        """Have nothing copy from the engine's KV any more, before it sleeps."""
        self._guard.rest()

    def unregister_kv_caches(self) -> None:
        """What vLLM calls from 0.33 on before an engine sleeps, or gives up its KV.

        There is nothing to undo, nor to restore afterwards: the server knows an
        engine's KV by its shape, and not by its addresses.
        """
        self.rest_kv()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        # Not with the other stores: in a step that computes nothing, such as the one
        # after the last request's end, vLLM up to 0.30 does not come to them.
        late = getattr(self._get_connector_metadata(), LATE_STORES, ())
        if late:
            event = self.worker_adapter.create_recorded_event()
            for store in late:
                self.worker_adapter.submit_store_request(
                    store.request_id,
                    store.op,
                    event,
                    cache_salt=store.cache_salt,
                    request_configs=store.request_configs,
                )

    # In the scheduler

    def _guard_scheduler(self, adapter: Any) -> None:
        def mark_all(what: str, error: Exception) -> None:
            for event in adapter._health_events.values():
                mark(event, what, error)

        def guard(name: str, otherwise: Any) -> None:
            call: Callable[..., Any] = getattr(adapter, name)

            def guarded(*args: Any, **kwargs: Any) -> Any:
                try:
                    return call(*args, **kwargs)
                except Exception as error:
                    mark_all(name, error)
                    return otherwise

            setattr(adapter, name, guarded)

        guard("maybe_submit_lookup_request", None)
        guard("check_lookup_result", 0)
        guard("free_lookup_locks", None)
        guard("end_session", None)

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
        self._store_rest(request)
        return super().request_finished(request, block_ids)

    def _store_rest(self, request: Any) -> None:
        """Store, with the next step, what no step of the request's did.

        Each step stores what the scheduler knows to be computed. Under asynchronous
        scheduling, and after drafts were accepted, that is less than is computed when
        the request ends: without this a chunk that moves computes 129 tokens, not one.
        Its blocks are held until the worker has reported the request's stores as done.
        """
        tracker = self.request_trackers.get(request.request_id)
        if tracker is None or not self._can_store or request.status not in _RESUMED:
            return
        # The last token was sampled, and its KV is not computed.
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        _set_computed(tracker, computed)
        store = LMCacheMPRequestMetadata.GetStoreMetadata(
            tracker,
            self.scheduler_adapter.lmcache_tokens_per_chunk,
            self._group_tokens_per_block,
            save_decode_cache=self._save_decode_cache,
        )
        if store is not None:
            self._late_stores.append(store)

    def reset_cache(self) -> bool | None:
        """Leave the pool as it is.

        LMCache would empty it for all engines when one of them sleeps or resets its
        prefix cache. What is out of date is not found: the weight version is in the
        salt of every key, and the controller has it freed.
        """
        return True if self.role is KVConnectorRole.SCHEDULER else None

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
                _set_computed(tracker, num_computed)
        meta = super().build_connector_meta(scheduler_output)
        late, self._late_stores = self._late_stores, []
        setattr(meta, LATE_STORES, late)
        stores = [r for r in meta.requests if r.direction == "STORE"] + late
        stored = sum(store.op.end - store.op.start for store in stores)
        if stored:
            self._stats.add(stored_tokens=stored)
        return meta

    def _report_block_allocation_deltas(self, scheduler_output: Any) -> None:
        pass

    # In both

    def get_kv_connector_stats(self) -> TransferStats | None:
        return self._stats.take()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> TransferStats:
        return TransferStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> None:
        return None


def _set_computed(tracker: Any, num_tokens: int) -> None:
    """Tell LMCache how many of a request's tokens are computed."""
    tracker.num_scheduled_tokens = num_tokens - max(
        tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens
    )


def _load_kernels() -> None:
    """Load what copies KV on GPUs; LMCache goes on without, and says so in its log."""
    try:
        importlib.import_module("lmcache.cuda_ops")
    except ImportError as error:
        raise RuntimeError(
            f"LMCache's CUDA kernels cannot be loaded: {error}"
        ) from None
