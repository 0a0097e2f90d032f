"""No failure of LMCache's adapter reaches the engine, and no KV is kept that may be
another request's.

The adapter is a stand-in with the attributes that are used of LMCache's;
`tests/integration/test_kv_guard.py` has the real one.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.kv.guard import AllOf, Held, WorkerGuard, mark, pool_cause

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 5.0


class Key:
    """Of a store; LMCache hands the same object on."""


class Future:
    """LMCache's: it is done, or fails, once a test says so."""

    def __init__(self, *, done: bool = True, error: Exception | None = None) -> None:
        self.done = done
        self.error = error

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.done

    def result(self, timeout: float | None = None) -> bool:
        if not self.query():
            raise TimeoutError(timeout)
        return True


class Server:
    """The client through which a transfer prepares and commits its stores."""

    def __init__(self) -> None:
        self.mq_timeout = 0.0
        self.prepared: list[Any] = []
        self.committed: list[Any] = []

    def prepare_store(self, key: Any, instance_id: int) -> Any:
        self.prepared.append(key)
        return ["chunk"], ["slot"]

    def commit_store(self, key: Any, instance_id: int) -> bool:
        self.committed.append(key)
        return True


class Transfer:
    """A registration with the server."""

    def __init__(self) -> None:
        self._engine_driven_context = Server()
        self.submitted: list[str] = []
        self.unregister_error: Exception | None = None
        self.is_closed = False

    @property
    def server(self) -> Server:
        return self._engine_driven_context

    def submit_store(self, request_id: str, key: Any) -> Future:
        self.submitted.append(request_id)
        return Future()

    def unregister(self) -> Future:
        if self.unregister_error is not None:
            raise self.unregister_error
        return Future()

    def close(self) -> None:
        self.is_closed = True


class Adapter:
    """What the guard uses of LMCache's worker adapter."""

    def __init__(self) -> None:
        self.transfer_ctx: Transfer | None = None
        self.store_futures: dict[str, Any] = {}
        self.finished_stores: set[str] = set()
        self.error_block_ids: set[int] = set()
        self._failed_request_ids: set[str] = set()
        self._dropped_retrieves: set[str] = set()
        self._returned_finished: set[str] = set()
        self._health_event = threading.Event()
        self._health_event.set()
        self._mq_timeout = 1.0
        self.timeouts_seen: list[float] = []
        self.error: Exception | None = None
        self.loaded: list[str] = []
        self.next_future: Any = None

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def submit_store_request(self, request_id: str, op: Any) -> None:
        self._fail()
        self.store_futures[request_id] = self.next_future or Future()

    def submit_retrieve_request(self, request_id: str, op: Any) -> None:
        self._fail()
        self.loaded.append(request_id)

    def create_recorded_event(self) -> str:
        self._fail()
        return "event"

    def get_finished(self, request_ids: set[str]) -> tuple[set[str], set[str]]:
        """As LMCache: a failed future's error is its caller's, unless unhealthy."""
        if self._health_event.is_set():
            done = {i for i, f in self.store_futures.items() if f.query()}
        else:
            done = set(self.store_futures)
        for request_id in done:
            del self.store_futures[request_id]
        sent = done | request_ids
        self._returned_finished |= sent
        return sent, set()

    def _send_register_kv_caches_request(self, kv_caches: Any) -> None:
        self.timeouts_seen.append(self._mq_timeout)
        self._fail()
        self.transfer_ctx = Transfer()


class Worker:
    """An adapter under its guard."""

    def __init__(self, **settings: Any) -> None:
        self.counts: dict[str, float] = {}
        self.adapter = Adapter()
        self.guard = WorkerGuard(self.adapter, self.count, TIMEOUT_S, **settings)

    def count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.counts[name] = self.counts.get(name, 0) + amount

    def register(self, device: str = "cpu") -> None:
        caches = {"layer": SimpleNamespace(device=SimpleNamespace(type=device))}
        self.guard.register(
            lambda: self.adapter._send_register_kv_caches_request(caches)  # type: ignore[arg-type]
        )

    @property
    def transfer(self) -> Transfer:
        assert self.adapter.transfer_ctx is not None
        return self.adapter.transfer_ctx

    def begin(self, key: Any, request_id: str = "a") -> None:
        self.transfer.submit_store(request_id, key)

    def prepare(self, key: Any) -> bool:
        """Whether the server was asked for memory."""
        return self.transfer.server.prepare_store(key, 0) != ([], [])

    def commit(self, key: Any) -> bool:
        return self.transfer.server.commit_store(key, 0)

    def fail_with(self, error: Exception | None) -> None:
        self.adapter.error = error


@pytest.fixture
def worker() -> Worker:
    found = Worker()
    found.register()
    return found


def op_of(*blocks: int) -> Any:
    return SimpleNamespace(flat_block_ids=list(blocks))


def test_a_store_is_held_from_its_begin_until_all_are_abandoned() -> None:
    held, first, second = Held(), Key(), Key()
    assert not held.holds(first), "one that was never begun"
    held.begin(first)
    assert held.holds(first)
    held.abandon()
    assert not held.holds(first)
    held.begin(second)
    assert held.holds(second)
    assert not held.holds(first), "what was abandoned stays so"


def test_a_key_at_the_address_of_one_that_is_gone_is_not_held() -> None:
    held, key = Held(), Key()
    held.begin(key)
    name = id(key)
    del key
    assert name not in held._begun


def test_what_was_abandoned_is_neither_prepared_nor_committed(worker: Worker) -> None:
    key = Key()
    worker.begin(key)
    assert worker.prepare(key)
    worker.guard.handle_preemptions(need_flush_before_forward=False)
    assert worker.commit(key), "no block was taken away"
    worker.guard.handle_preemptions(need_flush_before_forward=True)
    assert not worker.commit(key)
    assert not worker.prepare(key)
    assert worker.transfer.server.committed == [key], "the server was asked once"
    assert worker.transfer.submitted == ["a"]


def test_a_store_reported_as_done_that_is_not_is_abandoned(worker: Worker) -> None:
    """As LMCache reports all stores while the server is unhealthy."""
    key = Key()
    worker.begin(key)
    worker.adapter.next_future = Future(done=False)
    worker.adapter.submit_store_request("a", op_of(1))
    worker.adapter.get_finished(set())
    assert worker.commit(key), "it is not done, and nothing was reported"
    worker.adapter._health_event.clear()
    assert worker.adapter.get_finished(set())[0] == {"a"}
    assert not worker.commit(key)


def test_stores_that_are_done_when_they_are_reported_abandon_no_other(
    worker: Worker,
) -> None:
    key = Key()
    worker.begin(key)
    worker.adapter.submit_store_request("done", op_of(1))
    assert worker.adapter.get_finished(set())[0] == {"done"}
    assert worker.commit(key)


def test_a_second_store_of_a_request_does_not_hide_that_the_first_runs(
    worker: Worker,
) -> None:
    first, second = Future(done=False), Future()
    for future in (first, second):
        worker.adapter.next_future = future
        worker.adapter.submit_store_request("a", op_of(1))
    both = worker.adapter.store_futures["a"]
    assert not both.query()
    with pytest.raises(TimeoutError):
        both.result(timeout=0)
    first.done = True
    assert both.query()
    assert both.result(timeout=0)
    # Once the first is done, a further store is alone.
    worker.adapter.submit_store_request("a", op_of(1))
    assert not isinstance(worker.adapter.store_futures["a"], AllOf) or both.query()


def test_a_request_whose_last_store_runs_is_not_finished_by_an_earlier_one(
    worker: Worker,
) -> None:
    worker.adapter.finished_stores = {"a", "b"}
    worker.adapter.next_future = Future(done=False)
    worker.adapter.submit_store_request("a", op_of(1))
    worker.adapter.get_finished(set())
    assert worker.adapter.finished_stores == {"b"}


def test_a_store_that_fails_is_forgotten_and_the_server_taken_for_unhealthy(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.fail_with(ConnectionError("the server is gone"))
    worker.adapter.submit_store_request("a", op_of(1))
    worker.adapter.submit_store_request("b", op_of(2))
    assert worker.adapter.store_futures == {}
    assert not worker.adapter._health_event.is_set()
    assert worker.counts["num_failures"] == 2
    assert worker.counts["store_s"] >= 0
    assert caplog.text.count("the KV pool failed in a store") == 1, "told once"


def test_a_load_that_fails_is_computed_again(worker: Worker) -> None:
    worker.fail_with(TimeoutError())
    worker.adapter.submit_retrieve_request("a", op_of(3, 4))
    assert worker.adapter.error_block_ids == {3, 4}
    assert worker.adapter._failed_request_ids == {"a"}
    assert worker.adapter._dropped_retrieves == {"a"}
    assert worker.counts["num_failures"] == 1
    worker.fail_with(None)
    worker.adapter.submit_retrieve_request("b", op_of(5))
    assert worker.adapter.loaded == ["b"]
    assert worker.adapter.error_block_ids == {3, 4}
    assert worker.counts["copy_s"] > 0


def test_no_step_waits_for_a_registration_that_is_being_made_anew(
    worker: Worker,
) -> None:
    """The heartbeat's thread has the transfer then, as long as the server takes."""
    with worker.guard._transfer:
        worker.adapter.submit_store_request("a", op_of(1))
        worker.adapter.submit_retrieve_request("b", op_of(2))
    assert worker.adapter.store_futures == {}
    assert worker.adapter.loaded == []
    assert worker.adapter.error_block_ids == {2}
    assert "num_failures" not in worker.counts, "nothing has failed"


@pytest.mark.parametrize(
    ("error", "is_for_good"),
    [
        (ConnectionError("refused"), False),
        (TimeoutError("no answer"), False),
        (ValueError("another layout"), True),
    ],
)
def test_an_engine_that_cannot_register_runs_without_the_pool(
    error: Exception, is_for_good: bool, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker()
    worker.fail_with(error)
    worker.register()
    assert worker.counts == {"num_failures": 1}
    assert not worker.adapter._health_event.is_set()
    assert ("until the pool answers" in caplog.text) is not is_for_good
    # The server is back, and what it refused for good is not tried again.
    worker.fail_with(None)
    worker.adapter._health_event.set()
    assert worker.adapter.create_recorded_event() == (None if is_for_good else "event")
    worker.adapter.submit_store_request("a", op_of(1))
    assert ("a" in worker.adapter.store_futures) is not is_for_good


def test_registering_has_the_time_it_needs_and_transfers_have_theirs() -> None:
    worker = Worker()
    worker.register()
    assert worker.adapter.timeouts_seen == [10.0]
    assert worker.adapter._mq_timeout == TIMEOUT_S
    assert worker.transfer.server.mq_timeout == TIMEOUT_S
    worker.fail_with(TimeoutError())
    worker.register()
    assert worker.adapter._mq_timeout == TIMEOUT_S, "also after one that failed"


def test_registering_anew_retires_the_last_registration_and_its_stores(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    first, key = worker.transfer, Key()
    worker.begin(key)
    worker.register()
    assert worker.transfer is not first
    assert first.is_closed
    assert not worker.guard._held.holds(key)
    worker.transfer.unregister_error = ConnectionError("it has died")
    second = worker.transfer
    worker.register()
    assert worker.transfer is not second, "whatever becomes of the last one"
    assert "a registration with the KV pool is left: it has died" in caplog.text
    assert "num_failures" not in worker.counts


def test_a_gpus_kv_is_registered_only_once_the_kernels_are_loaded() -> None:
    loads: list[str] = []
    worker = Worker(load_kernels=lambda: loads.append("loaded"))
    worker.register()
    assert loads == []
    worker.register("cuda")
    assert loads == ["loaded"]

    def fail() -> None:
        raise ImportError("undefined symbol")

    worker = Worker(load_kernels=fail)
    worker.register("cuda")
    assert worker.adapter.transfer_ctx is None
    assert worker.adapter.create_recorded_event() is None


def test_an_event_that_cannot_be_recorded_ends_no_step(worker: Worker) -> None:
    assert worker.adapter.create_recorded_event() == "event"
    worker.fail_with(RuntimeError("CUDA error"))
    assert worker.adapter.create_recorded_event() is None
    assert not worker.adapter._health_event.is_set()


def test_a_transfer_that_ended_with_an_error_is_reported_as_done(
    worker: Worker,
) -> None:
    key = Key()
    worker.begin(key)
    worker.adapter.next_future = Future(error=RuntimeError("the connection is gone"))
    worker.adapter.submit_store_request("a", op_of(1))
    assert worker.adapter.get_finished(set())[0] == {"a"}
    assert worker.counts["num_failures"] == 1
    assert worker.commit(key), "it has failed: nothing reads its blocks any more"


def test_only_the_latest_ids_of_finished_requests_are_kept(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aseer.kv.guard._KEPT_REPORTED", 3)
    for name in "abcde":
        worker.adapter.get_finished({name})
    assert worker.adapter._returned_finished == {"c", "d", "e"}


def test_a_transfer_without_a_server_of_its_own_is_left_as_it_is() -> None:
    transfer = SimpleNamespace(submit_store=print)
    Held().watch(transfer)
    assert transfer.submit_store is print
    Held().watch(None)


def test_the_servers_log_says_why_it_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "kv-pool-0.log"
    assert pool_cause(None) == ""
    assert pool_cause(log) == "", "there is no log yet"
    log.write_text("INFO fine\nModuleNotFoundError: No module named 'cupy'\n")
    assert pool_cause(log) == (
        f"; the KV pool's log ({log}) says: ModuleNotFoundError: No module named 'cupy'"
    )
    worker = Worker(pool_log=log)
    worker.fail_with(TimeoutError("no answer"))
    worker.register()
    assert "No module named 'cupy'" in caplog.text


def test_a_failure_of_a_server_that_is_unhealthy_already_is_not_told_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    event = threading.Event()
    mark(event, "a lookup", TimeoutError())
    assert caplog.text == ""
    event.set()
    mark(event, "a lookup", TimeoutError())
    assert "the KV pool failed in a lookup" in caplog.text
    assert not event.is_set()
