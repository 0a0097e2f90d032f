"""LMCache's own worker code under the guard, with a server that hangs and goes on.

Stores run in LMCache's threads, as on a GPU; the tensor that they copy from is this
machine's memory, and the server's answers come when a test says so.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import wait
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("lmcache")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they use and is deprecated
    import torch
    from lmcache.integration.vllm import vllm_multi_process_adapter as adapters
    from lmcache.integration.vllm.vllm_multi_process_adapter import (
        LMCacheMPWorkerAdapter,
        LoadStoreOp,
        ParallelStrategy,
    )
    from lmcache.v1.multiprocess.custom_types import PrepareStoreResponse
    from lmcache.v1.multiprocess.futures import MessagingFuture
    from lmcache.v1.multiprocess.transfer_context import (
        async_engine_driven,
        worker_transfer,
    )
    from lmcache.v1.multiprocess.transfer_context.pickle import (
        EngineDrivenContextPickle,
    )
    from lmcache.v1.multiprocess.transport.base import RequestClient

from aseer.kv.guard import WorkerGuard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK, CHUNK, SALT = 32, 128, "run-v0"
TIMEOUT_S = 20.0  # of what a test waits for; nothing waits that long


class FakeServer:
    """A client of a pool's server, which answers at once, or when it is told."""

    def __init__(self) -> None:
        self.prepared: dict[str, MessagingFuture[Any]] = {}
        self.asked: dict[str, threading.Event] = {}
        self.committed: dict[str, list[torch.Tensor]] = {}
        self.was_committed = threading.Event()
        self.unregistered: list[int] = []
        self.refuses: Exception | None = None

    def _now(self, value: Any) -> MessagingFuture[Any]:
        future: MessagingFuture[Any] = MessagingFuture()
        future.set_result(value)
        return future

    def get_chunk_size(self) -> Any:
        return self._now(CHUNK)

    def get_experimental(self) -> Any:
        return self._now([])

    def ping(self, instance_id: int) -> Any:
        return self._now(True)

    def register_kv_cache_engine_driven_context(self, payload: Any) -> Any:
        future = self._now(None)
        if self.refuses is not None:
            future = MessagingFuture()
            future.set_exception(self.refuses)
        return future

    def unregister_kv_cache_engine_driven_context(self, instance_id: int) -> Any:
        self.unregistered.append(instance_id)
        return self._now(None)

    def expect(self, request_id: str) -> None:
        """The server will hang over this request's store until `go_on`."""
        self.prepared[request_id] = MessagingFuture()
        self.asked[request_id] = threading.Event()

    def prepare_store(self, key: Any, instance_id: int) -> Any:
        if key.request_id not in self.prepared:
            return self._now(PrepareStoreResponse())
        self.asked[key.request_id].set()
        return self.prepared[key.request_id]

    def go_on(self, request_id: str) -> None:
        self.prepared[request_id].set_result(PrepareStoreResponse())

    def take(self, key: Any, chunks: list[torch.Tensor]) -> bool:
        self.committed.setdefault(key.request_id, []).extend(c.clone() for c in chunks)
        self.was_committed.set()
        return True

    def close(self) -> None: ...


class Worker:
    """An engine's worker as vLLM drives it: steps that store, and blocks given away."""

    def __init__(self, server: FakeServer, **settings: Any) -> None:
        self.server = server
        self.counts: dict[str, float] = {}
        self.adapter = LMCacheMPWorkerAdapter(
            server_url="tcp://127.0.0.1:1",
            context=None,
            model_name="m",
            vllm_block_size=BLOCK,
            parallel_strategy=ParallelStrategy(
                mla_only=False,
                vllm_world_size=1,
                vllm_worker_id=0,
                tp_size=1,
                pp_size=1,
                n_servers=1,
            ),
            extra_config={"lmcache.mp.mp_transfer_mode": "engine_driven"},
        )
        self.adapter._heartbeat = SimpleNamespace(stop_requested=False, stop=print)
        self.guard = WorkerGuard(self.adapter, self._count, TIMEOUT_S, **settings)
        self.memory = torch.zeros(16, BLOCK)  # [block, token]

    def _count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.counts[name] = self.counts.get(name, 0) + amount

    def register(self) -> None:
        caches = {"layer": self.memory}
        self.guard.register(lambda: self.adapter.register_kv_caches(caches, (), {}))

    def store(self, request_id: str, blocks: list[int], start: int = 0) -> None:
        tokens = list(range(start + CHUNK))
        op = LoadStoreOp(tokens, [blocks], start, start + CHUNK)
        event = self.adapter.create_recorded_event()
        self.adapter.submit_store_request(request_id, op, event, cache_salt=SALT)

    def finished(self, *request_ids: str) -> set[str]:
        sent, _ = self.adapter.get_finished(set(request_ids))
        return set(sent or ())

    def settle(self) -> None:
        """Wait until LMCache's threads have nothing left to do."""
        executor = self.adapter.transfer_ctx._commit_executor
        wait([executor.submit(lambda: None) for _ in range(4)], TIMEOUT_S)
        executor.shutdown(wait=True)


def copy_blocks(
    caches: dict[str, torch.Tensor],
    blocks: list[int],
    blocks_per_chunk: int,
    *,
    out: list[torch.Tensor],
    **_: Any,
) -> None:
    """What LMCache's kernel does: a chunk's blocks as they are when it gets there."""
    for i, chunk in enumerate(out):
        own = blocks[i * blocks_per_chunk : (i + 1) * blocks_per_chunk]
        chunk.copy_(caches["layer"][own].reshape(chunk.shape))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    found = FakeServer()
    shape = (BLOCK, 1, 1, "float32", None, 1)
    create = SimpleNamespace(create=lambda url, context: found)
    monkeypatch.setattr(adapters, "RequestClientFactory", create)
    monkeypatch.setattr(worker_transfer, "_supports_async_primitives", lambda: True)
    monkeypatch.setattr(worker_transfer, "compute_kv_layout", lambda *a, **k: shape)
    monkeypatch.setattr(
        EngineDrivenContextPickle,
        "commit_store",
        lambda self, key, instance_id, chunks: found.take(key, chunks),
    )
    monkeypatch.setattr(async_engine_driven, "gather_paged_kv_to_cpu", copy_blocks)
    return found


@pytest.fixture
def make_worker(server: FakeServer) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**settings: Any) -> Worker:
        made.append(Worker(server, **settings))
        made[-1].register()
        return made[-1]

    yield make
    for worker in made:
        if worker.adapter.transfer_ctx is not None:
            for future in server.prepared.values():
                if not future.query():
                    future.set_result(PrepareStoreResponse())
            worker.adapter.transfer_ctx.close()


def test_a_store_whose_blocks_were_given_away_is_not_committed(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker()
    server.expect("a")
    worker.store("a", [1, 2, 3, 4])
    assert server.asked["a"].wait(TIMEOUT_S)
    assert worker.finished("a") == set(), "its blocks are held for the store"
    worker.adapter._health_event.clear()  # the heartbeat had no answer
    assert worker.finished() == {"a"}, "nothing waits for a server that hangs"
    worker.memory[1:5] = 7  # another request's KV
    server.go_on("a")
    worker.settle()
    assert server.committed == {}


def test_a_store_that_waits_for_its_turn_is_abandoned_as_well(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker()
    names = [f"r{i}" for i in range(8)]  # twice as many as LMCache has threads
    for name in names:
        server.expect(name)
        worker.store(name, [1, 2, 3, 4])
    worker.adapter._health_event.clear()
    assert worker.finished(*names) == set(names)
    worker.adapter._health_event.set()
    worker.memory[1:5] = 7
    for name in names:
        server.go_on(name)
    worker.settle()
    assert server.committed == {}


def test_blocks_are_held_until_a_requests_last_store_is_done(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker()
    worker.store("a", [1, 2, 3, 4])
    worker.adapter.store_futures["a"].result(TIMEOUT_S)
    assert worker.finished() == set()
    server.expect("a")
    worker.memory[5:9] = 3
    worker.store("a", [5, 6, 7, 8], start=CHUNK)
    assert server.asked["a"].wait(TIMEOUT_S)
    assert worker.finished("a") == set(), "its last store is not done"
    server.go_on("a")
    worker.adapter.store_futures["a"].result(TIMEOUT_S)
    assert worker.finished() == {"a"}
    assert [float(chunk.mean()) for chunk in server.committed["a"]] == [0, 3]


def test_blocks_are_held_until_all_stores_of_a_request_are_done(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker()
    server.expect("a")
    worker.store("a", [1, 2, 3, 4])
    assert server.asked["a"].wait(TIMEOUT_S)
    first = server.prepared.pop("a")
    worker.store("a", [5, 6, 7, 8], start=CHUNK)  # is answered at once
    assert server.was_committed.wait(TIMEOUT_S)
    assert worker.finished("a") == set(), "its first store is not done"
    first.set_result(PrepareStoreResponse())
    worker.adapter.store_futures["a"].result(TIMEOUT_S)
    assert worker.finished() == {"a"}
    assert len(server.committed["a"]) == 2


def test_what_copies_blocks_that_are_taken_away_is_abandoned_without_a_wait(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker()
    server.expect("a")
    worker.store("a", [1, 2, 3, 4])
    assert server.asked["a"].wait(TIMEOUT_S)
    worker.adapter.handle_preemptions(need_flush_before_forward=False)
    worker.adapter.handle_preemptions(need_flush_before_forward=True)
    worker.memory[1:5] = 7
    server.go_on("a")
    worker.settle()
    assert server.committed == {}


def test_an_engine_that_cannot_register_runs_without_the_pool_and_says_why(
    server: FakeServer,
    make_worker: Callable[..., Worker],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = tmp_path / "kv-pool-0.log"
    log.write_text("INFO fine\nModuleNotFoundError: No module named 'cupy'\nINFO on\n")
    server.refuses = ValueError("the server's word")
    worker = make_worker(pool_log=log)
    assert "No module named 'cupy'" in caplog.text
    assert "runs without the KV pool: registering its KV failed" in caplog.text
    worker.store("a", [1, 2, 3, 4])
    worker.adapter.submit_retrieve_request(
        "b", LoadStoreOp(list(range(CHUNK)), [[9, 10, 11, 12]], 0, CHUNK), None
    )
    sent, received = worker.adapter.get_finished({"a"})
    assert (sent, received) == ({"a"}, {"b"}), "nothing waits for a pool"
    assert worker.adapter.get_block_ids_with_load_errors() == {9, 10, 11, 12}
    assert worker.counts["num_failures"] >= 1


def test_an_engine_registers_anew_and_has_what_it_left_discarded(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    server.refuses = TimeoutError()
    worker = make_worker()
    assert not worker.adapter.is_healthy
    server.refuses = None
    assert worker.adapter._reregister_kv_caches_callback()
    first = worker.adapter.transfer_ctx
    assert worker.adapter._reregister_kv_caches_callback()
    assert worker.adapter.transfer_ctx is not first
    assert first._is_closed()
    assert server.unregistered == [worker.adapter.instance_id] * 2
    worker.adapter._health_event.set()
    worker.memory[1:5] = 2
    worker.store("a", [1, 2, 3, 4])
    worker.adapter.store_futures["a"].result(TIMEOUT_S)
    assert float(server.committed["a"][0].mean()) == 2


def test_a_gpus_kv_is_not_copied_without_lmcaches_kernels(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> None:
        raise RuntimeError("undefined symbol: _ZN3c10")

    worker = Worker(server, load_kernels=load)
    worker.memory = SimpleNamespace(device=torch.device("cuda"))
    worker.register()
    assert "undefined symbol: _ZN3c10" in caplog.text
    assert worker.adapter.transfer_ctx is None
    assert worker.adapter.create_recorded_event() is None
    worker.store("a", [1])
    assert worker.finished("a") == {"a"}


def test_a_transfer_that_ends_with_an_error_ends_no_step(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker()
    failed: MessagingFuture[bool] = MessagingFuture()
    failed.set_exception(RuntimeError("the connection is gone"))
    worker.adapter.store_futures["a"] = failed
    assert worker.finished("a") == {"a"}
    assert not worker.adapter.is_healthy


def test_ids_of_requests_long_gone_are_forgotten(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aseer.kv.guard._KEPT_REPORTED", 10)
    worker = make_worker()
    for i in range(50):
        assert worker.finished(f"r{i}") == {f"r{i}"}
    assert worker.finished("r49") == set(), "vLLM may name one again"
    assert len(worker.adapter._returned_finished) == 10


def test_an_engine_rests_when_nothing_copies_from_its_kv_any_more(
    server: FakeServer,
    make_worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is about to sleep. vLLM has waited for the stores, but not for an abandoned
    one, which would read memory that is gone.
    """
    worker = make_worker()
    copying, go_on = threading.Event(), threading.Event()

    def copy_slowly(*args: Any, **kwargs: Any) -> None:
        copying.set()
        assert go_on.wait(TIMEOUT_S)
        assert len(worker.memory), "the engine sleeps"
        copy_blocks(*args, **kwargs)

    monkeypatch.setattr(async_engine_driven, "gather_paged_kv_to_cpu", copy_slowly)
    worker.store("a", [1, 2, 3, 4])
    assert copying.wait(TIMEOUT_S)
    worker.adapter._health_event.clear()
    assert worker.finished("a") == {"a"}, "vLLM knows of no store"
    resting = threading.Thread(target=worker.guard.rest)
    resting.start()
    resting.join(0.2)
    assert resting.is_alive()
    go_on.set()
    resting.join(TIMEOUT_S)
    assert not resting.is_alive()
    worker.memory = torch.zeros(0, BLOCK)
    worker.settle()
    assert server.committed == {}
    worker.guard.rest()  # there is nothing left


def test_an_engine_rests_though_waiting_for_its_stores_fails(
    make_worker: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error")

    worker = make_worker()
    worker.adapter.transfer_ctx.flush_inflight_stores = fail
    worker.guard.rest()
    assert "failed in the end of its stores" in caplog.text


def test_a_load_by_the_server_cannot_be_called_back_and_so_is_refused(
    server: FakeServer, make_worker: Callable[..., Worker]
) -> None:
    """Why `KvPoolConfig.transfer` is no choice: once this fails, look at it again.

    LMCache's adapter gives a load's blocks back to vLLM when the server is silent. Of
    loads that an engine copies itself none is under way then. One by the server goes
    on, nobody tells the server, and no message of LMCache's could.
    """
    worker = make_worker()
    told: list[str] = []
    for name in ("ping", "get_chunk_size", "get_experimental", "prepare_store"):
        setattr(server, name, lambda *_, name=name: told.append(name))
    copying: MessagingFuture[bool] = MessagingFuture()  # the server's, under way
    worker.adapter.retrieve_futures["a"] = (copying, [5, 6])
    worker.adapter._health_event.clear()
    _, received = LMCacheMPWorkerAdapter.get_finished(worker.adapter, set())
    assert received == {"a"}
    assert worker.adapter.get_block_ids_with_load_errors() == {5, 6}
    assert not copying.query()
    assert told == []
    messages = [name for name in dir(RequestClient) if not name.startswith("_")]
    assert "retrieve" in messages
    words = ("cancel", "abort", "fence", "flush", "drain", "stop")
    assert [m for m in messages if any(word in m for word in words)] == []
