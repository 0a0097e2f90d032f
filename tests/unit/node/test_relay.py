"""Weights from node to node: the controller sends them once; faults fail no update."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from aseer.errors import EngineError
from aseer.node import chain, fetching, relay
from aseer.node.fetching import block_of
from aseer.node.messages import (
    FROM_NEIGHBOUR,
    TO_NEIGHBOUR,
    TO_NODE,
    Block,
    FetchRest,
    GetBlock,
    Gives,
    NotYet,
    encode,
)
from aseer.node.metrics import AgentFigures
from aseer.node.relay import Relay
from aseer.node.remote import RemoteNode
from aseer.transport.base import ConnectionLost
from aseer.transport.memory import MemoryRouter
from tests.unit.node.test_delta import changed
from tests.unit.node.test_fetching import JOIN
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

BLOCK = 100
NUM_BLOCKS = 200
# A machine that has much else to do may stall for half a second.
PATIENCE_S = 1.0

Fault = Any
"""Of a connection: from the count of blocks and a message to what comes instead."""


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(relay, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(relay, "BEAT_S", PATIENCE_S / 4)
    monkeypatch.setattr(chain, "_LATE_S", 0.1)


class Connection:
    """A dealer with a fault."""

    def __init__(self, dealer: Any, fault: Fault) -> None:
        self._dealer = dealer
        self._fault = fault
        self._num_blocks = 0

    async def send(self, message: Any) -> None:
        await self._dealer.send(message)

    async def receive(self) -> Any:
        message = await self._dealer.receive()
        self._num_blocks += isinstance(message, Block)
        return await self._fault(self._num_blocks, message)


class Host:
    """A node and what the controller knows of it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self.folder = cluster.folder / name
        self.address = f"tcp://{name}:1"
        self.router = MemoryRouter(TO_NEIGHBOUR)
        self.figures = AgentFigures()
        join = structs.replace(JOIN, name=name, weights_dir=str(self.folder))
        self.told: list[Any] = []
        self.remote = RemoteNode(join, self._on_told, cluster.chains)
        self.relay = Relay(
            self.folder, self._say, self.figures, cluster.tasks, None, cluster.connect
        )
        self._giving = cluster.tasks.create_task(self.relay.give(self.router))
        self._say(Gives(self.address))

    def has_all(self, folder: str = "1") -> bool:
        return [
            (self.folder / folder / str(i)).read_bytes()
            for i in range(len(self._cluster.paths))
        ] == self._cluster.files

    def close(self) -> None:
        self._giving.cancel()
        self.relay.close()

    def _on_told(self, data: bytes) -> None:
        order: Any = TO_NODE.decode(data)
        self.told.append(order)
        asyncio.get_running_loop().call_soon(self.relay.take, order)

    def _say(self, message: Any) -> None:
        asyncio.get_running_loop().call_soon(self._cluster.hear, self, message)


class Cluster:
    def __init__(
        self, folder: Path, tasks: asyncio.TaskGroup, *, has_bases: bool = False
    ) -> None:
        self.folder = folder
        self.tasks = tasks
        self.chains = chain.Chains(has_bases=has_bases)
        self.hosts: list[Host] = []
        self.faults: dict[str, Fault] = {}
        self.num_sent = 0  # blocks, by the controller's host
        rng = random.Random(7)
        self.files = [rng.randbytes(BLOCK * (NUM_BLOCKS - 1) - 30), b"", b"last"]
        self.write("a")
        self.block_of = block_of
        self.when_sent: Callable[[int], object] = lambda num: None

    def write(self, update: str) -> None:
        self.update = update
        self.paths = [f"{self.folder}/{update}{i}" for i in range(len(self.files))]
        for path, data in zip(self.paths, self.files, strict=True):
            Path(path).write_bytes(data)

    def change(self, share: float) -> None:
        """The next update, in which some numbers of the first file are others."""
        self.files = [changed(self.files[0], share, seed=3), *self.files[1:]]
        self.write("b")

    async def add(self, num: int) -> list[Host]:
        new = [Host(self, f"n{len(self.hosts) + i}") for i in range(num)]
        self.hosts += new
        await asyncio.sleep(0)  # the controller hears of them
        return new

    def fetch_each(self, hosts: list[Host]) -> list[asyncio.Future[str]]:
        return [
            h.remote.weights.fetch(self.update, self.paths, lambda _: b"")
            for h in hosts
        ]

    def fetch(self, hosts: list[Host]) -> Awaitable[list[str]]:
        return asyncio.gather(*self.fetch_each(hosts))

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[Any]:
        host = next((each for each in self.hosts if each.address == address), None)
        if host is None:
            raise ConnectionLost("nobody answers")
        identity = random.randbytes(8)
        with host.router.connect(identity, FROM_NEIGHBOUR) as dealer:
            fault = self.faults.get(address)
            yield dealer if fault is None else Connection(dealer, fault)

    def hear(self, host: Host, message: Any) -> None:
        if isinstance(message, GetBlock):
            found = host.remote.weights.find(message)
            if found is not None:
                self.num_sent += 1
                host._on_told(encode(self.block_of(message, *found)))
                self.when_sent(self.num_sent)
        else:
            nothing: Any = None
            host.remote.take(message, nothing, nothing, nothing)


@asynccontextmanager
async def cluster_in(
    folder: Path, *, has_bases: bool = False
) -> AsyncIterator[Cluster]:
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        cluster = Cluster(folder, tasks, has_bases=has_bases)
        try:
            yield cluster
        finally:
            for host in cluster.hosts:
                host.close()


def gave_up(hosts: list[Host]) -> list[bool]:
    """By host, whether another gave it up just now."""
    return [host.remote.weights._giver.num_given_up > 0 for host in hosts]


async def test_the_controller_sends_once_what_all_nodes_fetch(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster:
        hosts = await cluster.add(4)
        found = await cluster.fetch(hosts)
        assert found == [f"{host.folder}/1/index.json" for host in hosts]
        assert all(host.has_all() for host in hosts)
        assert cluster.num_sent == NUM_BLOCKS
        size = sum(map(len, cluster.files))
        assert [host.figures.given_bytes for host in hosts] == [size] * 3 + [0]
        assert [host.figures.fetched_bytes for host in hosts] == [size] * 4
        (late,) = await cluster.add(1)
        await cluster.fetch([late])
        assert late.has_all()
        assert cluster.num_sent == NUM_BLOCKS
        assert hosts[3].figures.given_bytes == size
        for host in cluster.hosts:
            host.remote.weights.drop("a")
        await until(lambda: not any((h.folder / "1").exists() for h in cluster.hosts))
        assert cluster.chains == {}


async def test_a_block_goes_on_as_soon_as_it_is_there(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster:
        hosts = await cluster.add(3)
        last_had: list[int] = []
        cluster.when_sent = lambda num: last_had.append(hosts[2].figures.fetched_bytes)
        await cluster.fetch(hosts)
        assert last_had[-1] > 0, "the last node has some before the first has all"


async def dies(num: int, message: Any) -> Any:
    if num > 20:
        raise ConnectionLost("the connection broke")
    return message


async def gives_wrong_bytes(num: int, message: Any) -> Any:
    if num == 20:
        return structs.replace(message, data=message.data[:-1] + b"?")
    return message


async def gives_the_wrong_block(num: int, message: Any) -> Any:
    if num == 20:
        return structs.replace(message, offset=message.offset + BLOCK)
    return message


async def hangs(num: int, message: Any) -> Any:
    if num > 20:
        await asyncio.sleep(100)
    return message


async def hangs_at_once(num: int, message: Any) -> Any:
    await asyncio.sleep(100)


async def is_slow(num: int, message: Any) -> Any:
    await asyncio.sleep(0.2)
    return message


FAULTS = [dies, gives_wrong_bytes, gives_the_wrong_block, hangs, hangs_at_once, is_slow]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_neighbour_of_no_use_is_replaced_at_once(
    tmp_path: Path, fault: Fault
) -> None:
    """The others go on as they were: the node behind it has all of it from it."""
    async with cluster_in(tmp_path) as cluster:
        hosts = await cluster.add(4)
        cluster.faults[hosts[1].address] = fault
        began = asyncio.get_running_loop().time()
        await cluster.fetch(hosts)
        took_s = asyncio.get_running_loop().time() - began
        assert all(host.has_all() for host in hosts)
        assert NUM_BLOCKS < cluster.num_sent <= 2 * NUM_BLOCKS
        assert gave_up(hosts) == [False, True, False, False]
        assert hosts[2].figures.given_bytes == sum(map(len, cluster.files))
        assert took_s < 4 * PATIENCE_S


async def test_a_node_that_is_lost_takes_nobodys_weights_along(tmp_path: Path) -> None:
    """The node behind it hears nothing; the controller hears of it later."""
    async with cluster_in(tmp_path) as cluster:
        hosts = await cluster.add(4)

        def lose_the_second(num: int) -> None:
            if hosts[2].figures.fetched_bytes > 10 * BLOCK:
                hosts[1].close()

        cluster.when_sent = lose_the_second
        coming = cluster.fetch_each(hosts)
        await asyncio.gather(coming[0], *coming[2:])
        assert hosts[2].has_all()
        assert hosts[3].has_all()
        assert not coming[1].done()
        hosts[1].remote.lose("the power")
        with pytest.raises(EngineError, match="the power"):
            await coming[1]
        assert NUM_BLOCKS < cluster.num_sent < 2 * NUM_BLOCKS
        (late,) = await cluster.add(1)
        await cluster.fetch([late])
        assert hosts[1].figures.given_bytes < hosts[2].figures.given_bytes


async def test_a_node_without_room_fails_and_those_behind_it_do_not(
    tmp_path: Path,
) -> None:
    async with cluster_in(tmp_path) as cluster:
        hosts = await cluster.add(3)
        (hosts[1].folder / "1").mkdir(parents=True)  # where its files are to be
        first, second, third = cluster.fetch_each(hosts)
        with pytest.raises(EngineError, match="FileExistsError"):
            await second
        await asyncio.gather(first, third)
        assert hosts[2].has_all()
        assert cluster.num_sent == 2 * NUM_BLOCKS


async def test_wrong_bytes_of_the_controllers_host_fail_the_fetch(
    tmp_path: Path,
) -> None:
    def broken(wanted: GetBlock, path: str, key: bytes, _: str | None) -> Block:
        return structs.replace(block_of(wanted, path, key), digest=b"")

    async with cluster_in(tmp_path) as cluster:
        cluster.block_of = broken
        hosts = await cluster.add(2)
        coming = cluster.fetch_each(hosts)
        for each in coming:
            with pytest.raises(EngineError, match="not what it was"):
                await each


async def test_what_has_changed_is_told_from_node_to_node(tmp_path: Path) -> None:
    async with cluster_in(tmp_path, has_bases=True) as cluster:
        hosts = await cluster.add(3)
        await cluster.fetch(hosts)
        size = sum(map(len, cluster.files))
        before = [host.figures.fetched_bytes for host in hosts]
        assert before == [size] * 3
        cluster.change(0.03)
        await cluster.fetch(hosts)
        assert all(host.has_all("2") for host in hosts)
        for host in hosts:
            assert host.figures.fetched_bytes - size < 0.4 * size
        assert cluster.num_sent == 2 * NUM_BLOCKS
        (late,) = await cluster.add(1)
        await cluster.fetch([late])
        assert late.has_all()
        assert late.figures.fetched_bytes == size
        for host in hosts:
            host.remote.weights.drop("a")
            assert host.relay._fetches["2"]._deltas
        await until(lambda: not any(h.relay._fetches["2"]._deltas for h in hosts))


async def test_what_has_changed_much_comes_as_a_whole(tmp_path: Path) -> None:
    async with cluster_in(tmp_path, has_bases=True) as cluster:
        hosts = await cluster.add(2)
        await cluster.fetch(hosts)
        cluster.change(0.9)
        await cluster.fetch(hosts)
        assert all(host.has_all("2") for host in hosts)
        assert hosts[1].figures.fetched_bytes >= 1.9 * sum(map(len, cluster.files))


@pytest.mark.parametrize("where", ["the trainer", "a node", "nowhere"])
@pytest.mark.parametrize("how", ["changed", "cut"])
async def test_a_base_that_is_another_changes_no_byte(
    tmp_path: Path, where: str, how: str
) -> None:
    """As that of a checkpoint which somebody wrote over."""
    async with cluster_in(tmp_path, has_bases=True) as cluster:
        hosts = await cluster.add(3)
        await cluster.fetch(hosts)
        base = Path(cluster.paths[0])
        if where == "a node":
            base = hosts[1].folder / "1" / "0"
        if where == "nowhere":
            base.unlink()
        else:
            data = base.read_bytes()
            base.write_bytes(data[:-40] if how == "cut" else changed(data, 0.01, 9))
        cluster.change(0.03)
        await cluster.fetch(hosts)
        assert all(host.has_all("2") for host in hosts)
        assert gave_up(hosts) == [False] * 3


class Asking:
    """Somebody with the key who asks a node."""

    def __init__(self, dealer: Any) -> None:
        self.dealer = dealer

    async def ask(self, folder: str, num: int = 1) -> None:
        for _ in range(num):
            await self.dealer.send(GetBlock(folder, 0, 0, BLOCK))

    async def hear(self, kind: type[Any]) -> Any:
        while not isinstance(message := await self.dealer.receive(), kind):
            pass
        return message


async def test_who_asks_too_early_waits_and_who_asks_for_nothing_is_told(
    tmp_path: Path,
) -> None:
    async with cluster_in(tmp_path) as cluster:
        (host,) = await cluster.add(1)
        async with cluster.connect(host.address) as dealer:
            asking = Asking(dealer)
            await asking.ask("1")
            await asyncio.sleep(PATIENCE_S / 2)
            await cluster.fetch([host])
            assert (await asking.hear(Block)).data == cluster.files[0][:BLOCK]
            await asking.ask("7")
            assert "no such files" in (await asking.hear(Block)).error
            await dealer.send(GetBlock("1", -3, 1 << 62, -1))
            assert "no such block" in (await asking.hear(Block)).error
            assert host.relay._wanted == []


async def test_what_waits_at_a_node_is_bounded_and_goes_with_who_asked(
    tmp_path: Path,
) -> None:
    async with cluster_in(tmp_path) as cluster:
        (host,) = await cluster.add(1)
        async with cluster.connect(host.address) as dealer:
            asking = Asking(dealer)
            await asking.ask("7", num=relay._MAX_WANTED + 50)
            assert "too many" in (await asking.hear(Block)).error
            assert len(host.relay._wanted) == relay._MAX_WANTED
        await until(lambda: not host.relay._wanted)


async def test_a_node_that_waits_itself_says_so(tmp_path: Path) -> None:
    """Its neighbour keeps it, however long its own source takes."""
    async with cluster_in(tmp_path) as cluster:
        hosts = await cluster.add(2)
        held: list[Any] = []
        first, take = hosts[0].relay, hosts[0].relay.take
        first.take = lambda order: (  # type: ignore[method-assign]
            held.append(order) if isinstance(order, Block) else take(order)
        )
        coming = cluster.fetch(hosts)
        async with cluster.connect(hosts[0].address) as dealer:
            asking = Asking(dealer)
            await asking.ask("1")
            for _ in range(3):
                await asking.hear(NotYet)
        await asyncio.sleep(3 * PATIENCE_S)
        first.take = take  # type: ignore[method-assign]
        for order in held:
            take(order)
        await coming
        assert cluster.num_sent == NUM_BLOCKS
        assert not any(isinstance(order, FetchRest) for h in hosts for order in h.told)
