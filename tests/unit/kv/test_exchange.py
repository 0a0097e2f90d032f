"""A pool server's exchange with those of other nodes, without sockets or threads."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.kv import exchange
from aseer.kv.exchange import Exchange
from aseer.kv.links import MAX_PULLS
from aseer.kv.messages import PeerSpec, Pull, Pulled
from aseer.transport.keys import new_keys
from tests.waiting import until

SPEC = PeerSpec("tcp://10.0.0.1:*", new_keys())
STORE: Any = object()


def order(number: int) -> Pull:
    return Pull(number, 0, "tcp://10.0.0.2:1", "m", 1, "salt", b"", 2.0)


class Network:
    """Where servers listen, and whom they take from."""

    def __init__(self) -> None:
        self.is_listening = False
        self.refuses: Exception | None = None
        self.breaks = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.begun: list[int] = []

    @asynccontextmanager
    async def bind(self, address: str, kind: Any, keys: Any, *, max_queued: int) -> Any:
        assert (address, keys) == (SPEC.bind, SPEC.keys)
        if self.refuses is not None:
            raise self.refuses
        self.is_listening = True
        try:
            yield SimpleNamespace(endpoint="tcp://10.0.0.1:4711")
        finally:
            self.is_listening = False

    def source(self, store: Any, router: Any) -> Any:
        assert store is STORE

        async def run() -> None:
            await self.breaks.wait()
            raise OSError("the network is gone")

        return SimpleNamespace(run=run)

    async def pull(
        self, store: Any, order: Pull, connect: Any, turns: Any, tokens_each: int
    ) -> Pulled:
        assert (store, tokens_each) == (STORE, 128)
        async with turns:
            self.begun.append(order.pull)
            await self.goes_on.wait()
        return Pulled(order.pull, error="late" if order.pull == 1 else "")


@pytest.fixture
def network(monkeypatch):
    network = Network()
    monkeypatch.setattr(exchange, "bind_tcp", network.bind)
    monkeypatch.setattr(exchange, "Source", network.source)
    monkeypatch.setattr(exchange, "pull", network.pull)
    return network


@asynccontextmanager
async def running(told: list[Pulled]) -> Any:
    """An exchange at work on this loop."""
    exchange = Exchange(SPEC, STORE, 128, told.append)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(exchange.run())
        await until(exchange._is_ready.is_set)
        yield exchange
        assert not task.done()  # or its loop would end, and take nothing any more
        task.cancel()


async def test_it_is_found_where_it_listens_as_long_as_it_runs(network):
    async with running([]) as exchange:
        assert exchange.address == "tcp://10.0.0.1:4711"
        assert network.is_listening
    assert not network.is_listening


async def test_pulls_take_turns_and_each_ends_with_a_word(network, caplog):
    told: list[Pulled] = []
    orders = range(MAX_PULLS + 2)
    async with running(told) as exchange:
        for number in orders:
            exchange.pull(order(number))
        await until(lambda: len(network.begun) == MAX_PULLS)
        assert told == []
        network.goes_on.set()
        await until(lambda: len(told) == len(orders))
        assert exchange._tasks == set()
    assert sorted(done.pull for done in told) == [*orders]
    assert [r.getMessage() for r in caplog.records] == [
        "KV was not pulled from tcp://10.0.0.2:1: late"
    ]


async def test_a_server_that_cannot_listen_takes_all_the_same(network, caplog):
    network.refuses = OSError("the address is in use")
    network.goes_on.set()
    told: list[Pulled] = []
    async with running(told) as exchange:
        assert exchange.address == ""
        assert "gives no KV to others: OSError: the address is in" in caplog.text
        exchange.pull(order(5))
        await until(lambda: told)
    assert told == [Pulled(5)]


async def test_a_server_that_gives_no_more_takes_all_the_same(network, caplog):
    network.goes_on.set()
    told: list[Pulled] = []
    async with running(told) as exchange:
        network.breaks.set()
        await until(lambda: not network.is_listening)
        exchange.pull(order(5))
        await until(lambda: told)
    assert "the network is gone" in caplog.text
