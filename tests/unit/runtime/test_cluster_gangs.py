"""Nodes whose instances span two: put together as they come, and anew."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from msgspec import structs

from aseer.errors import InstanceStartError
from aseer.node.machine import Launch
from aseer.node.remote import RemoteNode
from aseer.runtime.cluster import Cluster, kind_of
from aseer.runtime.kv_pools import KvPools
from tests.unit.node.test_fetching import JOIN
from tests.unit.runtime.machine import config_of
from tests.waiting import until

if TYPE_CHECKING:
    from aseer.runtime.gang import Gang


def far(name: str) -> RemoteNode:
    node = RemoteNode(structs.replace(JOIN, name=name), lambda data: None)
    node.weights.said_address.set()
    return node


class Spanning:
    """A cluster whose instances span two nodes, and what runs there."""

    def __init__(self) -> None:
        router: Any = SimpleNamespace(endpoint="tcp://127.0.0.1:1")
        settings = {"num_instances": 0, "listen": router.endpoint, "min_nodes": 2}
        config = config_of(nodes_per_instance=2, **settings)
        self.cluster = Cluster(config, None, router)
        self.cluster._pool = cast("Any", self)
        self.cluster._kv_pools = KvPools(config)
        self.attended: list[Gang] = []
        self.up: set[Gang] = set()
        self.error: Exception | None = None

    def is_up(self, node: Any) -> bool:
        return node in self.up

    async def attend(self, gang: Gang, launches: list[Launch]) -> None:
        """As the pool does: until one of its nodes is gone, or it does not start."""
        assert launches == [gang.launch]
        self.attended.append(gang)
        while gang.lost_because is None:
            if self.error is not None:
                raise ExceptionGroup("of its instances", [self.error])
            await asyncio.sleep(0)

    def join(self, *nodes: RemoteNode) -> None:
        launch = Launch(
            instance_id=0, backend="sim", engine_args={}, env={}, share="a test"
        )
        for node in nodes:
            self.cluster._nodes[len(self.cluster._nodes) + id(node)] = node
            self.cluster._joined.put_nowait((node, [launch]))

    def lose(self, node: RemoteNode) -> None:
        (session,) = [s for s, n in self.cluster._nodes.items() if n is node]
        self.cluster._on_over(session, "a test")

    def names(self) -> list[str]:
        return ["".join(n.name for n in gang.nodes) for gang in self.attended]

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(10):
            await until(lambda: self.names() == list(names), 0)


async def test_nodes_form_gangs_anew_when_one_is_gone() -> None:
    spanning = Spanning()
    cluster = spanning.cluster
    a, b, c, d = (far(name) for name in "abcd")
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(cluster.work())
        spanning.join(a, b, c)
        await spanning.until("ab")
        assert [cluster._is_up(node) for node in (a, b, c)] == [False] * 3
        spanning.up.update(spanning.attended)
        assert all(cluster._is_up(node) for node in (a, b, c)), "c has nothing to do"
        spanning.lose(a)
        await spanning.until("ab", "bc")
        spanning.lose(c)
        spanning.join(d)
        await spanning.until("ab", "bc", "bd")
        working.cancel()


async def test_nodes_that_do_not_reach_each_other_run_with_others_until_they_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spanning = Spanning()
    cluster = spanning.cluster
    a, b, c = (far(name) for name in "abc")
    is_cut = False

    async def reaches(self: RemoteNode, other: RemoteNode) -> bool:
        return not (is_cut and {self.name, other.name} == {"a", "b"})

    monkeypatch.setattr(RemoteNode, "reaches", reaches)
    monkeypatch.setattr("aseer.runtime.gangs._MEETING_INTERVAL_S", 0.0)
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(cluster.work())
        spanning.join(a, b)
        await spanning.until("ab")
        is_cut = True
        await spanning.attended[0].look()  # as at the end of its engine
        await until(lambda: not cluster._gangs._gangs, 0)
        assert "nodes a and b do not reach each other" in caplog.text
        spanning.join(c)
        await spanning.until("ab", "ac")
        spanning.lose(c)
        await until(lambda: not cluster._gangs._gangs, 0)
        assert spanning.names() == ["ab", "ac"], "those that are left wait"
        is_cut = False
        await until(lambda: len(spanning.attended) == 3, 0)
        assert set(spanning.attended[2].nodes) == {a, b}
        assert cluster.nodes == [a, b], "none of them was let go"
        working.cancel()


async def test_nodes_that_never_reached_each_other_start_nothing_together(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node says where it listens a moment after it has joined."""
    spanning = Spanning()
    a, b = (far(name) for name in "ab")

    async def reaches(self: RemoteNode, other: RemoteNode) -> bool:
        return not other.weights.said_address.is_set()

    monkeypatch.setattr(RemoteNode, "reaches", reaches)
    b.weights.said_address.clear()
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(spanning.cluster.work())
        spanning.join(a, b)
        await until(lambda: spanning.cluster._gangs._gangs, 0)
        b.weights.said_address.set()
        await until(lambda: "do not reach each other" in caplog.text, 0)
        assert spanning.attended == []
        working.cancel()


async def test_nodes_whose_instance_does_not_start_are_both_let_go() -> None:
    spanning = Spanning()
    cluster = spanning.cluster
    closed: list[int] = []
    cluster._sessions.close = lambda session, _: closed.append(session)  # type: ignore[method-assign,assignment]
    spanning.error = InstanceStartError("no such model")
    a, b, c = (far(name) for name in "abc")
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(cluster.work())
        spanning.join(a, b, c)
        await until(lambda: len(closed) == 2, 0)
        assert cluster.nodes == [c]
        assert "no such model" in str(b.lost_because)
        with pytest.raises(InstanceStartError, match="no such model"):
            await cluster.wait_for_nodes()
        working.cancel()


def test_nodes_of_one_kind_have_the_same_vllm() -> None:
    packages = {"vllm": "0.32.0"}
    kinds = {
        kind_of(structs.replace(JOIN, packages=found))
        for found in (packages, dict(packages), {"vllm": "0.33.0"})
    }
    assert len(kinds) == 2
    gpu = replace(JOIN.machine, gpus=("0",), cpu_only=False)
    assert kind_of(structs.replace(JOIN, machine=gpu)) != kind_of(JOIN)
