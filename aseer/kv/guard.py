"""Guards for LMCache's adapter in a worker: no failure of its ends the engine, and no
KV is kept that may have been read from blocks of another request.

vLLM keeps a finished request's blocks until its last store is reported as done. On a
GPU stores run in threads of the worker, in three parts: the server gives memory
(prepare), the blocks are copied there, and the server publishes it (commit). Whenever
LMCache reports a store as done that is not, the blocks may be another request's while
they are copied. Such a store is abandoned: it is not committed, and the server discards
its memory when the worker registers anew. LMCache does so

- for all stores when the server is unhealthy,
- when vLLM takes blocks away from a running request (preemption),
- when a request's earlier store is done and its last one is not.

Nothing here imports LMCache or vLLM; `Adapter` is what is used of LMCache's class.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from aseer.node.logs import Log, cause_from_log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Adapter = Any  # LMCacheMPWorkerAdapter, which is untyped to us
    Transfer = Any  # EngineDrivenTransferContext

_log = logging.getLogger("aseer.kv")

# A registration is a message and its answer; the server is up before engines start.
_REGISTER_TIMEOUT_S = 10.0
# LMCache keeps the id of every request that it reported, for ever, since vLLM may name
# one again a step or two later. A step names at most a batch of them.
_KEPT_REPORTED = 16_384


class Held:
    """Which stores' blocks are still held for them; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._era = 0
        # By the identity of a store's key: LMCache hands the same object on.
        self._begun: dict[int, tuple[weakref.ref[Any], int]] = {}

    def abandon(self) -> None:
        """The blocks of all stores so far are given away."""
        with self._lock:
            self._era += 1
            self._begun.clear()

    def begin(self, key: Any) -> None:
        """The blocks of a store are held from now on."""
        name = id(key)
        forget = weakref.ref(key, lambda _: self._begun.pop(name, None))
        with self._lock:
            self._begun[name] = (forget, self._era)

    def holds(self, key: Any) -> bool:
        """Whether they have been since."""
        with self._lock:
            return self._begun.get(id(key), (None, -1))[1] == self._era

    def watch(self, transfer: Transfer) -> None:
        """Let a transfer context prepare and commit only stores that are held."""
        server = getattr(transfer, "_engine_driven_context", None)
        if server is None:
            return
        submit, prepare = transfer.submit_store, server.prepare_store
        commit = server.commit_store

        def submit_store(request_id: str, key: Any, *args: Any, **kwargs: Any) -> Any:
            self.begin(key)
            return submit(request_id, key, *args, **kwargs)

        def prepare_store(key: Any, *args: Any) -> Any:
            if not self.holds(key):
                return [], []  # LMCache's word for "nothing to store"
            return prepare(key, *args)

        def commit_store(key: Any, *args: Any) -> bool:
            return self.holds(key) and bool(commit(key, *args))

        transfer.submit_store = submit_store
        server.prepare_store = prepare_store
        server.commit_store = commit_store


class AllOf:
    """Several stores of one request as one of LMCache's futures.

    LMCache keeps one future a request. A second store would take the first one's place,
    and the blocks would be free before it is done.
    """

    def __init__(self, *futures: Any) -> None:
        self._futures = futures

    def query(self) -> bool:
        return all(future.query() for future in self._futures)

    def result(self, timeout: float | None = None) -> bool:
        results = [future.result(timeout=timeout) for future in self._futures]
        return all(results)


class WorkerGuard:
    """Takes the place of the methods of an adapter that talk to the server."""

    def __init__(
        self,
        adapter: Adapter,
        count: Callable[..., None],
        timeout_s: float,
        pool_log: Path | None = None,
        load_kernels: Callable[[], object] = lambda: None,
    ) -> None:
        """Guard an adapter.

        Args:
            count: adds to `KvCounts`, by name.
            timeout_s: of every transfer, once registered.
            pool_log: the server's, for the cause of a failed registration.
            load_kernels: raises if LMCache cannot copy from a GPU as it should.
        """
        self._adapter = adapter
        self._count = count
        self._timeout_s = timeout_s
        self._pool_log = pool_log
        self._load_kernels = load_kernels
        self._held = Held()
        self._reported: deque[str] = deque()
        self._is_off = False
        # Whoever has it may use the transfer context: the engine, a store or load at a
        # time, or the heartbeat's thread, which replaces it when the server is back.
        self._transfer = threading.Lock()
        self._store = adapter.submit_store_request
        self._retrieve = adapter.submit_retrieve_request
        self._finish = adapter.get_finished
        self._record = adapter.create_recorded_event
        self._send = adapter._send_register_kv_caches_request
        adapter.submit_store_request = self.store
        adapter.submit_retrieve_request = self.retrieve
        adapter.get_finished = self.get_finished
        adapter.create_recorded_event = self.create_recorded_event
        adapter.handle_preemptions = self.handle_preemptions
        adapter._send_register_kv_caches_request = self.send_registration

    def register(self, register: Callable[[], None]) -> None:
        """Register the engine's KV; an engine that cannot runs without the pool."""
        try:
            register()
        except Exception as error:
            self._count(num_failures=1)
            # The server may come back; what is refused will be refused again.
            self._is_off = not isinstance(error, ConnectionError | TimeoutError)
            self._adapter._health_event.clear()
            for_good = "" if self._is_off else " until the pool answers"
            _log.error(
                "this engine runs without the KV pool%s: registering its KV failed: "
                "%s%s",
                for_good,
                error,
                pool_cause(self._pool_log),
            )

    def send_registration(self, kv_caches: dict[str, Any]) -> None:
        """Register, or register anew at a server that came back."""
        if _is_on_gpu(kv_caches):
            self._load_kernels()
        adapter = self._adapter
        self._held.abandon()
        with self._transfer:
            if adapter.transfer_ctx is not None:
                self._retire(adapter.transfer_ctx)
            adapter._mq_timeout = max(_REGISTER_TIMEOUT_S, self._timeout_s)
            try:
                self._send(kv_caches)
            finally:
                adapter._mq_timeout = self._timeout_s
            server = getattr(adapter.transfer_ctx, "_engine_driven_context", None)
            if server is not None:
                server.mq_timeout = self._timeout_s
            self._held.watch(adapter.transfer_ctx)

    def _retire(self, transfer: Transfer) -> None:
        """Let the server discard what it reserved for us, and unmap its memory."""
        try:
            unregistered = transfer.unregister()
            if unregistered is not None:
                unregistered.result(timeout=self._timeout_s)
            transfer.close()
        except Exception as error:
            _log.warning("a registration with the KV pool is left: %s", error)

    def store(self, request_id: str, op: Any, *args: Any, **kwargs: Any) -> None:
        """See LMCache; a store that fails is forgotten."""
        started = time.perf_counter()
        futures = self._adapter.store_futures
        before = futures.get(request_id)
        try:
            self._use(self._store, request_id, op, *args, **kwargs)
        except Exception as error:
            self._failed("a store", error)
        latest = futures.get(request_id)
        if before is not None and latest is not before and not before.query():
            futures[request_id] = AllOf(before, latest)
        self._count(store_s=time.perf_counter() - started)

    def retrieve(self, request_id: str, op: Any, *args: Any, **kwargs: Any) -> None:
        """See LMCache; a load that fails is recomputed."""
        started = time.perf_counter()
        try:
            if not self._use(self._retrieve, request_id, op, *args, **kwargs):
                self._refuse_load(request_id, op)
        except Exception as error:
            self._failed("a load", error)
            self._refuse_load(request_id, op)
        self._count(copy_s=time.perf_counter() - started)

    def _use(self, transfer: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
        """Transfer if the pool can be used; whether it can."""
        if self._is_off or not self._transfer.acquire(blocking=False):
            return False
        try:
            transfer(*args, **kwargs)
        finally:
            self._transfer.release()
        return True

    def _refuse_load(self, request_id: str, op: Any) -> None:
        # As LMCache itself does with one that finds the server unhealthy.
        self._adapter.error_block_ids.update(op.flat_block_ids)
        self._adapter._failed_request_ids.add(request_id)
        self._adapter._dropped_retrieves.add(request_id)

    def create_recorded_event(self) -> Any:
        """See LMCache; None if nothing will be transferred."""
        try:
            return None if self._is_off else self._record()
        except Exception as error:
            self._failed("an event", error)
            return None

    def get_finished(self, request_ids: set[str]) -> tuple[Any, Any]:
        """See LMCache; a request's stores are done when the last one is."""
        adapter = self._adapter
        tracked = adapter.store_futures
        adapter.finished_stores.difference_update(tracked)
        before = list(tracked.values())
        try:
            sent, received = self._finish(request_ids)
        except Exception as error:  # a future's own: LMCache asks it and does not catch
            self._failed("what was stored or loaded", error)
            sent, received = self._finish(request_ids)  # unhealthy: asks no future
        kept = {id(future) for future in tracked.values()}
        if any(id(future) not in kept and not _is_done(future) for future in before):
            self._held.abandon()
        self._reported.extend(sent or ())
        while len(self._reported) > _KEPT_REPORTED:
            adapter._returned_finished.discard(self._reported.popleft())
        return sent, received

    def handle_preemptions(self, need_flush_before_forward: bool) -> None:
        """Blocks are taken away in the next step: what copies them is abandoned.

        LMCache waits for it, as long as the server takes to answer.
        """
        if need_flush_before_forward:
            self._held.abandon()

    def rest(self) -> None:
        """Wait until nothing copies from the engine's KV, whose memory is taken away.

        vLLM waits for all stores before, and an abandoned one may go on. It waits for
        the server no longer than `timeout_s`.
        """
        transfer = self._adapter.transfer_ctx
        try:
            # On CPUs, where stores are no threads, there is nothing to wait for.
            getattr(transfer, "flush_inflight_stores", lambda: None)()
        except Exception as error:
            self._failed("the end of its stores", error)

    def _failed(self, what: str, error: Exception) -> None:
        self._count(num_failures=1)
        mark(self._adapter._health_event, what, error)


def pool_cause(log: Path | None) -> str:
    """What a pool server's log gives as its last error, to be added to another's."""
    cause = cause_from_log(Log(log, 0).text()) if log else None
    return f"; the KV pool's log ({log}) says: {cause}" if cause else ""


def mark(event: Any, what: str, error: Exception) -> None:
    """The server is unhealthy until the heartbeat says otherwise."""
    if event.is_set():
        _log.warning("the KV pool failed in %s: %s: %s", what, type(error), error)
    event.clear()


def _is_done(future: Any) -> bool:
    try:
        return bool(future.query())
    except Exception:
        return True  # it failed: nothing reads its blocks any more


def _is_on_gpu(kv_caches: dict[str, Any]) -> bool:
    devices = (getattr(cache, "device", None) for cache in kv_caches.values())
    return any(getattr(device, "type", "cpu") == "cuda" for device in devices)
