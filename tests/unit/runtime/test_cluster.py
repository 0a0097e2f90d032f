"""Nodes are taken, refused, put to work and let go; what one does costs no other.

The sessions with nodes are a list of what is said; the pool is a list of what it hears.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import asynccontextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec import structs

from aseer.dgds.messages import FetchCst
from aseer.errors import ConfigError, EngineError, InstanceStartError, ProtocolError
from aseer.instance.messages import Failed
from aseer.node.fetching import digest_of
from aseer.node.messages import (
    GOODBYE,
    TO_NODE,
    AskDrafts,
    Block,
    Drafts,
    Ended,
    FetchFiles,
    FromPeer,
    GetBlock,
    Goodbye,
    Leave,
    PeerGone,
    PeerLost,
    Welcome,
    encode,
)
from aseer.node.network import reachable
from aseer.runtime.cluster import Cluster
from aseer.runtime.kv_pools import KvPools
from aseer.runtime.listening import listening
from aseer.transport.base import PROTOCOL_VERSION
from aseer.transport.keys import derive_keys
from aseer.version import __version__
from tests.unit.node.test_fetching import JOIN
from tests.unit.runtime.machine import config_of
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aseer.node.remote import RemoteNode

A_JOIN = structs.replace(
    JOIN, protocol=PROTOCOL_VERSION, version=__version__, num_instances=2
)
KEYS = derive_keys(b"of these tests alone")


class Sessions:
    """See `aseer.transport.sessions.Sessions`; what nodes say comes from the test."""

    made: Sessions

    def __init__(self, router: Any, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.said: dict[int, list[Any]] = {}
        self.goodbyes: dict[int, Goodbye] = {}
        self.runs = asyncio.Event()
        Sessions.made = self

    def put(self, session: int, message: bytes) -> None:
        self.said.setdefault(session, []).append(TO_NODE.decode(message))

    def close(self, session: int, reason: bytes) -> None:
        self.goodbyes[session] = GOODBYE.decode(reason)

    async def run(self, on_message: Any, on_over: Any) -> None:
        self.hear, self.lose = on_message, on_over
        self.runs.set()
        await asyncio.Event().wait()


class Pool:
    """See `InstancePool`: it has nodes' instances up as soon as it is given them."""

    def __init__(self) -> None:
        self.launches: dict[str, list[Any]] = {}
        self.up: set[str] = set()
        self.heard: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    async def attend(self, node: RemoteNode, launches: list[Any]) -> None:
        self.launches[node.name] = launches
        if self.error is not None:
            raise ExceptionGroup("of its instances", [self.error])
        self.up.add(node.name)
        while node.lost_because is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        self.up.remove(node.name)

    def is_up(self, node: RemoteNode) -> bool:
        return node.name in self.up

    def on_message(self, peer: bytes, message: Any) -> None:
        self.heard.append((peer, message))

    def on_lost(self, peer: bytes, why: str) -> None:
        self.heard.append((peer, "lost", why))

    def on_gone(self, peer: bytes) -> None:
        self.heard.append((peer, "gone"))


class Joined:
    """A cluster that talks and works."""

    def __init__(self, cluster: Cluster, pool: Pool) -> None:
        self.cluster = cluster
        self.pool = pool
        self.sessions = Sessions.made

    def say(self, session: int, message: msgspec.Struct) -> None:
        self.sessions.hear(session, encode(message))

    async def join(self, session: int = 1, **fields: Any) -> RemoteNode:
        """A node that joined and has its instances up."""
        join = structs.replace(A_JOIN, **fields)
        self.say(session, join)
        await until(lambda: join.name in self.pool.up)
        return next(n for n in self.cluster.nodes if n.name == join.name)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aseer.runtime.cluster.Sessions", Sessions)
    monkeypatch.setattr("aseer.runtime.cluster._LOOK_INTERVAL_S", 0.001)
    monkeypatch.setattr("aseer.runtime.cluster._GOODBYE_S", 0.0)


@asynccontextmanager
async def joined(
    launcher: Any = None, drafts: Any = None, **settings: Any
) -> AsyncIterator[Joined]:
    router: Any = SimpleNamespace(endpoint="tcp://0.0.0.0:5557")
    config = config_of(**{"listen": "tcp://0.0.0.0:5557", "min_nodes": 1} | settings)
    cluster = Cluster(config, None, router, launcher, KEYS if launcher else None)
    pool: Any = Pool()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(cluster.talk(pool, drafts, KvPools(config))),
            tasks.create_task(cluster.work()),
        ]
        await Sessions.made.runs.wait()
        try:
            yield Joined(cluster, pool)
        finally:
            for task in running:
                task.cancel()


async def test_a_node_is_welcomed_and_runs_what_it_is_planned_to() -> None:
    async with joined(node_timeout_s=12.0) as run:
        await run.join(num_instances=3)
        assert run.sessions.timeout_s == 12.0
        assert run.sessions.said[1] == [Welcome(12.0)]
        launches = run.pool.launches["far"]
        assert [launch.backend for launch in launches] == ["sim"] * 3
        assert all(launch.share.endswith("of node far") for launch in launches)
        await run.cluster.wait_for_nodes()


@pytest.mark.parametrize(
    "fields", [{"version": "0.0.9"}, {"protocol": PROTOCOL_VERSION - 1}]
)
async def test_a_node_of_another_release_is_refused_in_words_for_both_ends(
    fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with joined() as run:
        run.say(1, structs.replace(A_JOIN, **fields))
        goodbye = run.sessions.goodbyes[1]
        assert goodbye.is_refusal
        assert "install the same on both" in goodbye.why
        assert goodbye.why in caplog.text
        assert run.cluster.nodes == []
        assert 1 not in run.sessions.said, "it was never welcomed"


async def test_a_release_whose_join_has_other_fields_is_still_refused_by_its_version(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else nobody could say what to do about it."""
    async with joined() as run:
        old = {"type": "join", "protocol": 1, "version": "0.0.1", "name": "far"}
        run.sessions.hear(1, encode(old))  # type: ignore[arg-type]
        assert "runs aseer 0.0.1 (protocol 1)" in run.sessions.goodbyes[1].why
        run.sessions.hear(2, b"\xff nonsense")
        assert run.sessions.goodbyes[2].is_refusal
        assert run.cluster.nodes == []


async def test_a_node_is_known_to_be_refused_where_it_is_waited_for() -> None:
    async with joined(start_timeout_s=0.05) as run:
        run.say(1, structs.replace(A_JOIN, version="0.0.9"))
        with pytest.raises(EngineError) as raised:
            await run.cluster.wait_for_nodes()
    words = str(raised.value)
    assert words.startswith("after start_timeout_s=0.05 0 of min_nodes=1 nodes are up")
    assert "aseer node --controller tcp://" in words
    assert "one was refused: the controller refuses this node: node far" in words


async def test_a_node_that_leaves_is_let_go_at_once() -> None:
    async with joined() as run:
        node, other = await run.join(1), await run.join(2, name="near")
        run.say(1, Leave("it was told to end"))
        assert node.lost_because == "its node far is gone: it was told to end"
        assert run.sessions.goodbyes == {1: Goodbye("it was told to end")}
        assert run.cluster.nodes == [other]
        await until(lambda: run.pool.up == {"near"})


async def test_a_node_of_which_nothing_is_heard_is_lost_and_may_come_back() -> None:
    async with joined() as run:
        node = await run.join(1)
        process = await node.start(b"i0", "i0", b"", {})
        run.sessions.lose(1, "nothing was heard of it for 31 s")
        run.sessions.lose(7, "a session that never joined")
        assert await process.wait() == -9
        assert run.sessions.goodbyes == {}, "there is nobody to tell"
        await until(lambda: not run.pool.up)
        again = await run.join(2)
        assert run.cluster.nodes == [again]


async def test_what_instances_say_reaches_the_pool_and_nonsense_is_dropped() -> None:
    async with joined() as run:
        node = await run.join()
        process = await node.start(b"i0", "i0", b"", {})
        said = Failed("no memory")
        run.say(1, FromPeer(b"i0", msgspec.Raw(encode(said))))
        run.say(1, FromPeer(b"i0", msgspec.Raw(encode("nonsense"))))
        run.say(1, FromPeer(b"another's", msgspec.Raw(encode(said))))
        run.say(1, PeerLost(b"i0", "it reads nothing"))
        run.say(1, PeerGone(b"i0"))
        assert run.pool.heard == [
            (b"i0", said),
            (b"i0", "lost", "it reads nothing"),
            (b"i0", "gone"),
        ]
        run.say(1, Ended(b"i0", 13, cause="a bug"))
        assert (await process.wait(), process.cause()) == (13, "a bug")
        with pytest.raises(msgspec.DecodeError):  # which costs the node its session
            run.sessions.hear(1, b"\xff nonsense")


async def test_a_node_is_sent_the_blocks_that_it_asks_for_and_no_others(
    tmp_path: Path,
) -> None:
    async with joined() as run:
        node = await run.join()
        path = tmp_path / "weights"
        path.write_bytes(b"0123456789")
        coming = node.weights.fetch("a", [str(path)], lambda places: b"index")
        order = run.sessions.said[1][-1]
        assert isinstance(order, FetchFiles)
        run.say(1, GetBlock("99", 0, 0, 4))  # of a folder that it was never given
        run.say(1, GetBlock(order.folder, 0, 2, 5))
        await until(lambda: isinstance(run.sessions.said[1][-1], Block))
        block = run.sessions.said[1][-1]
        assert block.data == b"23456"
        assert block.digest == digest_of(order.key, 0, 2, b"23456")
        assert node.weights.num_wanted == 0
        assert sum(isinstance(m, Block) for m in run.sessions.said[1]) == 1
        with pytest.raises(ProtocolError, match="a block has at most"):
            run.say(1, GetBlock(order.folder, 0, 0, 1 << 40))
        node.lose("the test is over")
        with pytest.raises(EngineError, match="the test is over"):
            await coming


async def test_drafters_on_nodes_ask_the_one_server_and_hear_its_answer() -> None:
    asked: list[Any] = []

    def answer(question: Any, take: Any) -> None:
        """The server's thread answers."""
        asked.append(question)
        threading.Thread(target=take, args=(encode({"deltas": 1}),)).start()

    question = encode(FetchCst({}))
    async with joined(drafts=SimpleNamespace(ask=answer)) as run:
        await run.join()
        run.say(1, AskDrafts(b"d0", msgspec.Raw(encode("nonsense"))))
        run.say(1, AskDrafts(b"d0", msgspec.Raw(question)))
        await until(lambda: isinstance(run.sessions.said[1][-1], Drafts))
        assert len(asked) == 1
        drafts = run.sessions.said[1][-1]
        assert (drafts.client, bytes(drafts.message)) == (b"d0", encode({"deltas": 1}))
    async with joined(drafts=None) as run:
        await run.join()
        run.say(1, AskDrafts(b"d0", msgspec.Raw(question)))
        assert run.sessions.said[1] == [Welcome(30.0)], "there is no draft server"


@pytest.mark.parametrize(
    "error", [InstanceStartError("no memory"), RuntimeError("a fault of ours")]
)
async def test_a_node_whose_work_fails_is_lost_and_the_others_go_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with joined() as run:
        near = await run.join(2, name="near")
        run.pool.error = error
        run.say(1, A_JOIN)
        (node,) = (n for n in run.cluster.nodes if n.name == "far")
        await until(lambda: run.cluster.nodes == [near])
        assert str(error) in str(node.lost_because)
        assert str(error) in caplog.text
        assert run.sessions.goodbyes[1].is_refusal
        assert near.lost_because is None
        await run.cluster.wait_for_nodes()  # one is up, which is enough


async def test_an_engine_that_waits_for_a_node_hears_that_its_work_failed() -> None:
    async with joined() as run:
        run.pool.error = InstanceStartError("no memory")
        run.say(1, A_JOIN)
        with pytest.raises(InstanceStartError, match="no memory"):
            await run.cluster.wait_for_nodes()


async def test_a_cluster_that_is_dismissed_tells_all_nodes_and_keeps_none() -> None:
    async with joined() as run:
        nodes = [await run.join(i, name=f"n{i}") for i in range(3)]
        await run.cluster.dismiss("the engine was closed")
        assert run.sessions.goodbyes == dict.fromkeys(
            range(3), Goodbye("the engine was closed")
        )
        assert run.cluster.nodes == []
        assert all("the engine was closed" in str(n.lost_because) for n in nodes)


class Launcher:
    """See `aseer.runtime.launcher.Launcher`."""

    host = "head.lan"
    num_nodes = 2
    state = "1 of 2 nodes are placed"
    failure: Exception | None = None

    def __init__(self) -> None:
        self.ran: list[Any] = []

    async def run(self, address: str, keys: Any) -> None:
        self.ran.append((address, keys))

    async def close(self) -> None:
        self.ran.append("closed")


async def test_nodes_that_are_started_are_waited_for_by_their_number() -> None:
    launcher: Any = Launcher()
    async with joined(launcher, min_nodes=0, start_timeout_s=0.05) as run:
        await run.join(1)
        with pytest.raises(EngineError, match=r"1 of 2 nodes are up .* are placed"):
            await run.cluster.wait_for_nodes()
        assert launcher.ran == [("tcp://head.lan:5557", KEYS)]
        launcher.failure = EngineError("the cluster has no GPUs left")
        with pytest.raises(EngineError, match="no GPUs left"):
            await run.cluster.wait_for_nodes()
        await run.join(2, name="near")
        await run.cluster.wait_for_nodes()


def test_an_address_for_all_networks_is_given_to_others_by_this_hosts_name() -> None:
    assert reachable("tcp://10.0.0.1:5557") == "tcp://10.0.0.1:5557"
    assert reachable("tcp://0.0.0.0:5557", "head") == "tcp://head:5557"
    assert reachable("tcp://[::]:5557", "head") == "tcp://head:5557"
    assert not reachable("tcp://0.0.0.0:5557").startswith("tcp://0.0.0.0")


def test_an_engine_of_this_machine_alone_listens_nowhere() -> None:
    assert listening(config_of(), None) is nullcontext


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ASEER_KEY", "ASEER_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Addresses that were listened at, and with which keys."""
    found: list[tuple[str, Any]] = []

    @asynccontextmanager
    async def bind(address: str, decoder: Any, keys: Any) -> AsyncIterator[Any]:
        found.append((address, keys))
        yield SimpleNamespace(endpoint=address.replace("*", "4000"))

    monkeypatch.setattr("aseer.runtime.listening.bind_tcp", bind)
    return found


@pytest.mark.usefixtures("no_key")
def test_what_others_can_reach_is_not_opened_without_a_key() -> None:
    config = config_of(listen="tcp://0.0.0.0:5557")
    with pytest.raises(ConfigError, match="there is no key"):
        listening(config, None)


@pytest.mark.usefixtures("no_key")
async def test_the_controllers_file_is_there_whole_while_it_listens(
    tmp_path: Path, bound: list[tuple[str, Any]]
) -> None:
    path = tmp_path / "controller.json"
    config = config_of(listen="tcp://127.0.0.1:*", controller_file=path)
    async with listening(config, None)() as cluster:
        assert cluster.address == "tcp://127.0.0.1:4000"
        assert json.loads(path.read_text()) == {"address": "tcp://127.0.0.1:4000"}
        assert os.listdir(tmp_path) == [path.name]
    assert not path.exists()
    assert bound == [("tcp://127.0.0.1:*", None)]
    gone = config_of(listen="tcp://127.0.0.1:*", controller_file=tmp_path / "no" / "f")
    with pytest.raises(ConfigError, match="controller_file cannot be written"):
        async with listening(gone, None)():
            pass


@pytest.mark.usefixtures("no_key")
async def test_nodes_that_were_started_end_with_the_engine_and_have_a_key_of_its_own(
    bound: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher()
    monkeypatch.setattr("aseer.runtime.listening.launcher_of", lambda config: launcher)
    config = config_of(nodes="ray", num_instances=None)
    with pytest.raises(RuntimeError, match="in the block"):
        async with listening(config, None)():
            assert launcher.ran == []
            raise RuntimeError("in the block")
    assert launcher.ran == ["closed"]
    ((address, keys),) = bound
    assert address == "tcp://head.lan:*"
    assert keys is not None, "others on the network must not join"
