"""Whatever connections do, sessions bring every message once and in order."""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aseer.transport.base import ConnectionLost, HandshakeFailed
from aseer.transport.memory import Faults, MemoryRouter
from aseer.transport.session import Session, SessionLost
from aseer.transport.sessions import FRAME, Frame, Sessions
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.transport.memory import MemoryDealer

HEARTBEAT_S = 0.01
PATIENCE_S = 20.0


class Cluster:
    """A router's end, and nodes that connect to it over wires with faults."""

    def __init__(self, tasks: asyncio.TaskGroup, timeout_s: float = 60.0) -> None:
        self._tasks = tasks
        self.router: MemoryRouter[Frame] = MemoryRouter(FRAME)
        self.sessions = Sessions(
            self.router, timeout_s=timeout_s, heartbeat_s=HEARTBEAT_S
        )
        self.came: dict[int, list[bytes]] = {}
        self.over: dict[int, str] = {}
        self.running = tasks.create_task(
            self.sessions.run(self._take, self.over.__setitem__)
        )

    def _take(self, session: int, message: bytes) -> None:
        self.came.setdefault(session, []).append(message)


class Node:
    """A connecting end."""

    def __init__(
        self, cluster: Cluster, rng: random.Random, timeout_s: float = 60.0
    ) -> None:
        self._cluster = cluster
        self.rng = rng
        self.faults: Faults | None = None
        self.is_cut = False
        self.cut_error = ConnectionLost("the network is cut")
        self.came: list[bytes] = []
        self.dealer: MemoryDealer[Frame] | None = None
        self.session = Session(
            self._connect, timeout_s=timeout_s, heartbeat_s=HEARTBEAT_S, rng=rng
        )

    @asynccontextmanager
    async def _connect(self, identity: bytes) -> AsyncIterator[Any]:
        if self.is_cut:
            raise self.cut_error
        with self._cluster.router.connect(identity, FRAME) as dealer:
            self.dealer = dealer
            dealer.up.faults = dealer.down.faults = self.faults
            yield dealer

    def cut(self) -> None:
        """What is on its way is lost, and nothing comes through any more."""
        self.is_cut = True
        if self.dealer is not None:
            lost = Faults(self.rng, drop=1.0)
            self.dealer.up.faults = self.dealer.down.faults = lost

    @property
    def id(self) -> int:
        return self.session._link.session

    async def run(self) -> None:
        await self.session.run(self.came.append)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aseer.transport.session._FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("aseer.transport.session._LONGEST_PAUSE_S", 0.01)


@given(
    seed=st.integers(0, 2**32),
    chances=st.tuples(*[st.sampled_from([0.0, 0.0, 0.1])] * 3),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["up", "down", "cut", "heal", "wait"]), st.booleans()
        ),
        max_size=30,
    ),
)
@settings(max_examples=settings.default.max_examples // 2)
def test_all_arrives_once_and_in_order_over_cuts_and_faults(
    seed: int, chances: tuple[float, ...], steps: list[tuple[str, bool]]
) -> None:
    asyncio.run(_talk(seed, chances, steps))


async def _talk(
    seed: int, chances: tuple[float, ...], steps: list[tuple[str, bool]]
) -> None:
    rng = random.Random(seed)
    drop, repeat, delay = chances
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        cluster = Cluster(tasks)
        nodes = [Node(cluster, random.Random(rng.random())) for _ in range(2)]
        running = [tasks.create_task(node.run()) for node in nodes]
        for node in nodes:
            node.faults = Faults(rng, drop=drop, repeat=repeat, delay=delay)
            node.session.put(b"hello")
        up: list[list[bytes]] = [[b"hello"], [b"hello"]]
        down: list[list[bytes]] = [[], []]
        await until(lambda: len(cluster.came) == 2)
        for number, (what, which) in enumerate(steps):
            node, message = nodes[which], b"%d" % number
            if what == "up":
                node.session.put(message)
                up[which].append(message)
            elif what == "down":
                cluster.sessions.put(node.id, message)
                down[which].append(message)
            elif what == "cut":
                node.cut()
            elif what == "heal":
                node.is_cut = False
            else:
                await asyncio.sleep(rng.choice([0, 0.002, 0.05]))
        for node in nodes:
            node.is_cut, node.faults = False, None
        for node, sent, received in zip(nodes, up, down, strict=True):
            while cluster.came[node.id] != sent or node.came != received:
                assert cluster.came[node.id] == sent[: len(cluster.came[node.id])]
                assert node.came == received[: len(node.came)]
                await asyncio.sleep(0.002)
        assert cluster.over == {}
        for task in [cluster.running, *running]:
            task.cancel()


async def test_a_session_that_is_silent_for_too_long_is_over_at_both_ends() -> None:
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        cluster = Cluster(tasks, timeout_s=0.3)
        node = Node(cluster, random.Random(1), timeout_s=0.3)
        node.session.put(b"hello")
        running = tasks.create_task(_outcome(node))
        await until(lambda: node.id in cluster.came)
        node.cut()
        assert isinstance(await running, SessionLost)
        await until(lambda: node.id in cluster.over)
        assert "nothing was heard" in cluster.over[node.id]
        cluster.running.cancel()


async def test_who_comes_back_to_a_session_that_is_over_is_told_so() -> None:
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        cluster = Cluster(tasks)
        node = Node(cluster, random.Random(1))
        node.session.put(b"hello")
        running = tasks.create_task(_outcome(node))
        await until(lambda: node.session.is_acknowledged)
        node.cut()
        cluster.sessions.close(node.id, b"not seen")
        node.session.put(b"late")
        node.is_cut = False
        error: Any = await running
        assert (type(error).__name__, error.reason) == ("SessionOver", b"")
        assert cluster.came == {node.id: [b"hello"]}
        cluster.running.cancel()


async def test_handshakes_that_fail_are_the_networks_once_the_key_was_right() -> None:
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        cluster = Cluster(tasks)
        node, stranger = (Node(cluster, random.Random(i)) for i in (1, 2))
        node.session.put(b"hello")
        running = tasks.create_task(node.run())
        await until(lambda: node.session.is_acknowledged)
        for each in (node, stranger):
            each.cut_error = HandshakeFailed("the handshake was broken off")
            each.cut()
        outcome: Any = await _outcome(stranger)
        assert type(outcome).__name__ == "ConnectionRefused"
        before = node.session.num_connections
        await until(lambda: node.session.num_connections > before + 5)
        node.session.put(b"again")
        node.is_cut = False
        await until(lambda: cluster.came[node.id] == [b"hello", b"again"])
        for task in (running, cluster.running):
            task.cancel()


async def test_the_reason_of_an_end_comes_with_it() -> None:
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        cluster = Cluster(tasks)
        node = Node(cluster, random.Random(1))
        node.session.put(b"hello")
        running = tasks.create_task(_outcome(node))
        await until(lambda: node.id in cluster.came)
        cluster.sessions.close(node.id, b"that was all")
        error: Any = await running
        assert error.reason == b"that was all"

        leaver = Node(cluster, random.Random(2))
        leaver.session.put(b"hello")
        talking = tasks.create_task(leaver.run())
        await until(lambda: leaver.session.is_acknowledged)
        talking.cancel()
        await asyncio.wait([talking])
        await leaver.session.close("it has other plans", 5.0)
        await until(lambda: leaver.id in cluster.over)
        assert cluster.over == {leaver.id: "it has other plans"}
        cluster.running.cancel()


async def test_a_shorter_time_out_makes_both_ends_hear_of_each_other_more_often() -> (
    None
):
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        cluster = Cluster(tasks, timeout_s=0.4)
        node = Node(cluster, random.Random(1))
        node.session._heartbeat_s = 2.0
        node.session.timeout_s = 0.4
        node.session.put(b"hello")
        running = tasks.create_task(node.run())
        await until(lambda: node.id in cluster.came)
        await asyncio.sleep(1.5)
        assert cluster.over == {}
        assert node.session.num_connections == 1
        for task in (cluster.running, running):
            task.cancel()


async def test_nonsense_of_one_that_has_the_key_costs_no_other_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aseer.transport.sessions.MAX_SESSIONS", 50)
    rng = random.Random(7)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        cluster = Cluster(tasks)
        node = Node(cluster, rng)
        node.session.put(b"hello")
        running = tasks.create_task(node.run())
        await until(lambda: node.id in cluster.came)
        sessions = [node.id, *range(100)]
        with cluster.router.connect(b"stranger", FRAME) as stranger:
            for i in range(8_000):
                numbers = [rng.choice([0, 1, 2, 2**64 - 1]) for _ in range(2)]
                header = struct.pack("<QQQ", rng.choice(sessions), *numbers)
                header = rng.choice([header, header, header, rng.randbytes(24), b"?"])
                payload = rng.choice([b"", b"N", b"H", b"W", b"A", b"X", b"?", b"xyz"])
                if header[:8] == node.id.to_bytes(8, "little") and payload in b"NHX":
                    continue  # it could end a session whose number it knew
                await stranger.send(Frame(header, payload))
                if not i % 100:
                    await asyncio.sleep(0)
            assert len(cluster.sessions._open) <= 50
        node.session.put(b"still here")
        await until(lambda: cluster.came[node.id] == [b"hello", b"still here"])
        assert node.id not in cluster.over
        for task in (cluster.running, running):
            task.cancel()


async def _outcome(node: Node) -> BaseException | None:
    try:
        await node.run()
    except Exception as error:
        return error
    return None
