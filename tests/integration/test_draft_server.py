"""The draft server and clients over real sockets: they converge, and survive."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from aseer.dgds.client import DraftClient
from aseer.dgds.messages import DraftingSpec
from aseer.dgds.replica import Replica, RequestKey
from aseer.dgds.server import DraftServer
from aseer.inputs.speculation import SpeculationConfig
from aseer.transport import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT = np.array([1, 2, 3], np.int32)
NOTHING = np.empty(0, np.int32)
INTERVAL_S = 0.01


@pytest.fixture
def spec() -> Iterator[DraftingSpec]:
    with tempfile.TemporaryDirectory() as folder:
        yield DraftingSpec(
            settings=SpeculationConfig(),
            endpoint=f"ipc://{Path(folder) / 'dgds'}",
            fetch_interval_s=INTERVAL_S,
        )


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(INTERVAL_S)


def client_of(spec: DraftingSpec, name: str) -> tuple[Replica, DraftClient]:
    replica = Replica(ttl_s=600.0)
    return replica, DraftClient(replica, spec.endpoint, name.encode(), INTERVAL_S)


def report(server: DraftServer, request: str, start: int, *tokens: int) -> None:
    server.update_cst("g", request, start, np.array(tokens, np.int32).tobytes())


def text(replica: Replica, request: str) -> list[int]:
    try:
        return replica.text(RequestKey("g", request)).tolist()
    except KeyError:
        return []


def test_siblings_tokens_reach_every_engine(spec):
    with DraftServer(spec) as server:
        clients = [client_of(spec, name) for name in ("one", "two")]
        try:
            for i, (replica, _) in enumerate(clients):
                replica.begin(RequestKey("g", f"own{i}"), PROMPT, NOTHING, 0.0)
            report(server, "elsewhere", 0, 7, 8, 9)
            report(server, "elsewhere", 3, 10)
            for replica, _ in clients:
                eventually(lambda r=replica: text(r, "elsewhere") == [7, 8, 9, 10])
        finally:
            for _, client in clients:
                client.close()


def test_a_finished_group_is_freed_everywhere(spec):
    with DraftServer(spec) as server:
        replica, client = client_of(spec, "one")
        try:
            key = RequestKey("g", "own")
            replica.begin(key, PROMPT, NOTHING, 0.0)
            report(server, "own", 0, 1)
            replica.end(key, time.monotonic())
            server.finish_group("g")
            eventually(lambda: replica.forest.num_groups == 0)
            assert replica.forest.num_tokens == 0
        finally:
            client.close()


def test_a_dead_server_leaves_stale_drafts_and_a_new_one_is_found(spec):
    replica, client = client_of(spec, "one")
    try:
        with DraftServer(spec) as server:
            replica.begin(RequestKey("g", "own"), PROMPT, NOTHING, 0.0)
            report(server, "elsewhere", 0, 7)
            eventually(lambda: text(replica, "elsewhere") == [7])
        assert text(replica, "elsewhere") == [7]
        with DraftServer(spec) as server:
            report(server, "elsewhere", 0, 7, 8)
            eventually(lambda: text(replica, "elsewhere") == [7, 8])
    finally:
        client.close()


def test_a_server_and_a_client_that_fail_are_tried_again(spec, monkeypatch, caplog):
    """Neither's endpoint can be used before there is a folder for it."""
    monkeypatch.setattr(threads, "_FIRST_PAUSE_S", INTERVAL_S)
    monkeypatch.setattr(threads, "_LONGEST_PAUSE_S", INTERVAL_S)
    applied = []
    apply = Replica.apply

    def fail_once(self, deltas):
        applied.append(deltas)
        if len(applied) == 1:
            raise ZeroDivisionError
        apply(self, deltas)

    monkeypatch.setattr(Replica, "apply", fail_once)
    folder = Path(spec.endpoint.removeprefix("ipc://")).parent
    folder.rmdir()
    with DraftServer(spec) as server:
        eventually(lambda: "the draft server failed" in caplog.text)
        report(server, "elsewhere", 0, 7)
        folder.mkdir()
        replica, client = client_of(spec, "one")
        try:
            replica.begin(RequestKey("g", "own"), PROMPT, NOTHING, 0.0)
            eventually(lambda: text(replica, "elsewhere") == [7])
        finally:
            client.close()
    assert "the draft client failed" in caplog.text


def test_without_a_server_trees_are_freed_and_what_it_is_told_is_bounded(
    spec, monkeypatch
):
    monkeypatch.setattr("aseer.dgds.server.MAX_TOLD", 100)
    server = DraftServer(spec)  # it never starts
    for i in range(200):
        report(server, "r", i, 1)
    server.set_weight_version(1)
    assert len(server._told) == 101
    replica = Replica(ttl_s=0.05)
    client = DraftClient(replica, spec.endpoint, b"one", INTERVAL_S)
    try:
        key = RequestKey("g", "own")
        replica.begin(key, PROMPT, NOTHING, time.monotonic())
        replica.end(key, time.monotonic())
        eventually(lambda: replica.forest.num_groups == 0)
    finally:
        client.close()


def test_telling_the_server_never_waits(spec):
    with DraftServer(spec) as server:
        tokens = np.arange(64, dtype=np.int32).tobytes()
        since = time.perf_counter()
        for i in range(10_000):
            server.update_cst("g", "r", 64 * i, tokens)
        assert time.perf_counter() - since < 1.0
