"""The connector in an engine, with stand-ins for LMCache's and vLLM's classes.

`tests/integration/test_kv_connector.py` has it under vLLM's own schedulers.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.counts import LATENCY_BUCKETS_S
from aseer.kv.settings import CHUNK_KEY, TIMEOUT_KEY
from tests.unit.stand_ins import imported

MODULE = "aseer.kv.connector"
LMCACHE = "lmcache.integration.vllm"
VLLM = "vllm.distributed.kv_transfer.kv_connector.v1"
TIMEOUT_S = 5.0


class Role(Enum):
    SCHEDULER = 1
    WORKER = 2


class Status(Enum):
    FINISHED_STOPPED = 1
    FINISHED_LENGTH_CAPPED = 2
    FINISHED_ABORTED = 3


@dataclass
class Stats:
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tracker:
    """LMCache's count of a request."""

    num_scheduled_tokens: int = 999
    num_vllm_hit_tokens: int = 0
    num_lmcache_hit_tokens: int = 0
    state: str = "looks"


class Metadata:
    @staticmethod
    def GetStoreMetadata(
        tracker: Tracker, tokens_per_chunk: int, *_: Any, **__: Any
    ) -> Any:
        """Whole chunks of what LMCache believes to be computed."""
        computed = tracker.num_scheduled_tokens + max(
            tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens
        )
        end = computed // tokens_per_chunk * tokens_per_chunk
        return store(end) if end else None


def store(end: int, start: int = 0) -> Any:
    op = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        direction="STORE", request_id="r", op=op, cache_salt="s", request_configs=None
    )


class Scheduler:
    """LMCache's half of the scheduler: talks to the server, or fails to."""

    lmcache_tokens_per_chunk = 128

    def __init__(self) -> None:
        self._health_events = {"server": threading.Event()}
        self._health_events["server"].set()
        self.fails = False
        self.found: int | None = None
        self.given_up: list[str] = []

    def maybe_submit_lookup_request(self, request_id: str) -> str:
        return self._answer("submitted")

    def check_lookup_result(self, request_id: str) -> Any:
        return self._answer(self.found)

    def free_lookup_locks(self, request_id: str) -> str:
        return self._answer("freed")

    def end_session(self, request_id: str) -> str:
        return self._answer("ended")

    def cleanup_lookup_result(self, request_id: str) -> None:
        self.given_up.append(request_id)

    def _answer(self, answer: Any) -> Any:
        if self.fails:
            raise TimeoutError("no answer")
        return answer


class Worker:
    def __init__(self) -> None:
        self.submitted: list[tuple[Any, ...]] = []

    def create_recorded_event(self) -> str:
        return "event"

    def submit_store_request(self, *args: Any, **kwargs: Any) -> None:
        self.submitted.append((*args, kwargs))


class Connector:
    """LMCache's, as far as ours leans on it."""

    def __init__(self, vllm_config: Any, role: Role, _: Any) -> None:
        self.role = role
        self.scheduler_adapter, self.worker_adapter = Scheduler(), Worker()
        self.request_trackers: dict[str, Tracker] = {}
        self._can_store, self._save_decode_cache = True, True
        self._group_tokens_per_block = [16]
        self.meta: Any = SimpleNamespace(requests=[])
        self.seen: list[Any] = []

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        found = self.scheduler_adapter.check_lookup_result(request.request_id)
        return found, bool(found)

    def update_connector_output(self, output: Any) -> None:
        self.seen.append(output)

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        return bool(block_ids), None

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return self.meta

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.seen.append(forward_context)

    def _get_connector_metadata(self) -> Any:
        return self.meta


class Base:
    """vLLM's connector."""

    def __init__(self, vllm_config: Any, role: Role, kv_cache_config: Any) -> None:
        self.role = role


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def made(monkeypatch):
    """The module, and what makes a connector of a role."""
    state = SimpleNamespace(BYPASS_LMCACHE="bypasses")
    names = {
        f"{LMCACHE}.lmcache_mp_connector": {
            "LMCacheMPConnector": Connector,
            "get_group_tokens_per_block": lambda config, sizes: sizes,
        },
        f"{LMCACHE}.lmcache_mp_metadata": {
            "LMCacheMPRequestMetadata": Metadata,
            "LMCacheMPRequestState": state,
        },
        f"{VLLM}.base": {
            "KVConnectorRole": Role,
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": SimpleNamespace,
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        f"{VLLM}.metrics": {"KVConnectorStats": Stats},
        "vllm.v1.request": {"RequestStatus": Status},
    }
    module = imported(monkeypatch, MODULE, names, anew=["aseer.kv.idle"])
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module.patches, "apply", lambda process: [process])
    monkeypatch.setattr(module, "WorkerGuard", lambda *args: SimpleNamespace(args=args))

    def make(role: Role = Role.SCHEDULER, blocks: tuple[int, ...] = (16,)) -> Any:
        extra = {TIMEOUT_KEY: str(TIMEOUT_S), CHUNK_KEY: 128}
        transfer = SimpleNamespace(kv_connector_extra_config=extra)
        parallel = SimpleNamespace(world_size=2)
        config = SimpleNamespace(kv_transfer_config=transfer, parallel_config=parallel)
        return module.GuardedConnector(config, role, blocks)

    return SimpleNamespace(module=module, clock=clock, make=make)


def request(**fields: Any) -> Any:
    defaults = {
        "request_id": "r",
        "status": Status.FINISHED_LENGTH_CAPPED,
        "num_computed_tokens": 256,
        "num_tokens": 257,
    }
    return SimpleNamespace(**defaults | fields)


def scheduled(*new: tuple[str, int], cached: tuple[tuple[str, int], ...] = ()) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=n) for name, n in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in cached],
            num_computed_tokens=[n for _, n in cached],
        ),
    )


def test_a_server_that_fails_costs_what_it_would_have_found_and_no_engine(made):
    scheduler = made.make().scheduler_adapter
    healthy = scheduler._health_events["server"]
    assert scheduler.maybe_submit_lookup_request("r") == "submitted"
    scheduler.fails = True
    for name, otherwise in (
        ("maybe_submit_lookup_request", None),
        ("check_lookup_result", 0),
        ("free_lookup_locks", None),
        ("end_session", None),
    ):
        healthy.set()
        assert getattr(scheduler, name)("r") == otherwise
        assert not healthy.is_set()


def test_a_lookup_without_an_answer_is_given_up_after_its_time(made):
    connector = made.make()
    connector.request_trackers["r"] = tracker = Tracker()
    assert connector.get_num_new_matched_tokens(request(), 0) == (None, False)
    made.clock.now += TIMEOUT_S
    assert connector.get_num_new_matched_tokens(request(), 0) == (None, False)
    made.clock.now += 0.1
    assert connector.get_num_new_matched_tokens(request(), 0) == (0, False)
    assert connector.scheduler_adapter.given_up == ["r"]
    assert tracker.state == "bypasses"
    assert connector.get_kv_connector_stats().data == {"num_failures": 1}
    # Its time begins anew if the request is looked for again.
    assert connector.get_num_new_matched_tokens(request(), 0) == (None, False)


@pytest.mark.parametrize("invalid", [set(), {3}])
def test_a_load_counts_from_its_lookup_unless_part_of_it_failed(made, invalid):
    connector = made.make()
    assert connector.get_num_new_matched_tokens(request(), 0) == (None, False)
    made.clock.now += 0.5
    connector.scheduler_adapter.found = 256
    assert connector.get_num_new_matched_tokens(request(), 0) == (256, True)
    made.clock.now += 0.5
    done = SimpleNamespace(finished_recving={"r", "other"}, invalid_block_ids=invalid)
    for output in (done, SimpleNamespace(finished_recving=None, invalid_block_ids=())):
        connector.update_connector_output(output)
    bucket = sum(limit < 1.0 for limit in LATENCY_BUCKETS_S)
    stats = connector.get_kv_connector_stats()
    if invalid:
        assert stats is None
    else:
        assert stats.data == {
            "loaded_tokens": 256,
            "num_loads": 1,
            "load_s": 1.0,
            f"loads_in_bucket_{bucket}": 1,
        }


def test_a_request_that_ends_while_it_loads_is_forgotten(made):
    connector = made.make()
    connector.scheduler_adapter.found = 256
    connector.get_num_new_matched_tokens(request(), 0)
    assert connector.request_finished(request(), [1]) == (True, None)
    done = SimpleNamespace(finished_recving={"r"}, invalid_block_ids=())
    connector.update_connector_output(done)
    assert connector.get_kv_connector_stats() is None
    assert (connector._lookups, connector._loads) == ({}, {})


def test_computed_tokens_are_counted_as_vllm_does(made):
    connector = made.make()
    trackers = {
        "new": Tracker(num_vllm_hit_tokens=64),
        "old": Tracker(num_vllm_hit_tokens=32, num_lmcache_hit_tokens=128),
        "idle": Tracker(),
    }
    connector.request_trackers = trackers
    connector.build_connector_meta(
        scheduled(("new", 64), ("unknown", 1), cached=(("old", 200),))
    )
    counted = {name: t.num_scheduled_tokens for name, t in trackers.items()}
    assert counted == {"new": 0, "old": 72, "idle": 999}


@pytest.mark.parametrize(
    ("status", "num_computed", "stored"),
    [
        (Status.FINISHED_LENGTH_CAPPED, 256, 256),
        (Status.FINISHED_STOPPED, 256, 256),
        (Status.FINISHED_LENGTH_CAPPED, 400, 256),  # drafts were computed, too
        (Status.FINISHED_LENGTH_CAPPED, 255, 128),
        (Status.FINISHED_ABORTED, 256, None),
    ],
)
def test_what_no_step_stored_goes_with_the_step_after_the_end(
    made, status, num_computed, stored
):
    connector = made.make()
    connector.request_trackers["r"] = Tracker(num_vllm_hit_tokens=16)
    connector.request_finished(
        request(status=status, num_computed_tokens=num_computed), [1]
    )
    connector.meta.requests = [store(128, 64), SimpleNamespace(direction="RETRIEVE")]
    meta = connector.build_connector_meta(scheduled())
    late = getattr(meta, made.module.LATE_STORES)
    assert [each.op.end for each in late] == ([] if stored is None else [stored])
    assert connector.get_kv_connector_stats().data == {
        "stored_tokens": 64 + (stored or 0)
    }
    later = connector.build_connector_meta(scheduled())
    assert getattr(later, made.module.LATE_STORES) == []


def test_nothing_is_stored_late_of_a_request_that_the_pool_does_not_know(made):
    connector = made.make()
    connector.request_finished(request(), [1])
    connector.request_trackers["r"] = Tracker()
    connector._can_store = False
    connector.request_finished(request(), [1])
    assert connector._late_stores == []


def test_a_worker_stores_what_is_late_after_one_event_of_its_own(made):
    connector = made.make(Role.WORKER)
    setattr(connector.meta, made.module.LATE_STORES, [store(128), store(256)])
    connector.start_load_kv("context")
    assert connector.seen == ["context"]
    op = connector.worker_adapter.submitted
    assert [(args[0], args[1].end, args[2]) for args in op] == [
        ("r", 128, "event"),
        ("r", 256, "event"),
    ]
    assert op[0][3] == {"cache_salt": "s", "request_configs": None}


def test_an_engine_that_empties_its_cache_leaves_the_pool_as_it_is(made):
    assert made.make(Role.SCHEDULER).reset_cache() is True
    assert made.make(Role.WORKER).reset_cache() is None


def test_workers_count_together_what_one_would_have(made):
    total = made.module.TransferStats({})
    for _ in range(2):
        worker = made.make(Role.WORKER)
        (_, add, timeout_s, log, _) = worker._guard.args
        assert (timeout_s, log) == (TIMEOUT_S, None)
        add(store_s=3.0, num_failures=1)
        total.aggregate(worker.get_kv_connector_stats())
        assert worker.get_kv_connector_stats() is None
    assert total.reduce() == {"store_s": 3.0, "num_failures": 2}
    assert made.module.GuardedConnector.build_kv_connector_stats(None).is_empty()


@pytest.mark.parametrize("blocks", [(16, 32), (96,)], ids=["two groups", "no multiple"])
def test_an_engine_whose_kv_does_not_fit_runs_without_its_pool(made, caplog, blocks):
    idle = made.make(blocks=blocks)
    assert not isinstance(idle, made.module.GuardedConnector)
    assert f"without its KV pool: {idle.why_no_pool}" in caplog.text
    assert idle.get_num_new_matched_tokens(request(), 0) == (0, False)
    assert idle.request_finished_all_groups(request(), [[1]]) == (False, None)
    assert not idle.requires_kv_delivery
    assert vars(idle.build_connector_meta(scheduled())) == {}
    assert isinstance(made.make(blocks=(32,)), made.module.GuardedConnector)


def test_kernels_that_cannot_be_loaded_are_named(made):
    with pytest.raises(RuntimeError, match=r"kernels cannot be loaded: .*cuda_ops"):
        made.module._load_kernels()
