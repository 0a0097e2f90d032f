"""The transport over ZeroMQ keeps the contract."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aseer.instance.messages import FROM_INSTANCE, TO_INSTANCE
from aseer.transport.keys import derive_keys
from aseer.transport.tcp import bind_tcp, connect_tcp
from aseer.transport.zeromq import bind_router, connect_dealer, make_socket_dir
from tests.unit.transport.contract import MAX_QUEUED, Contract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.instance.messages import FromInstance, ToInstance
    from aseer.transport.zeromq import ZmqDealer, ZmqRouter


KEYS = derive_keys(b"of these tests alone")


class ZmqEnds:
    """See `Ends`."""

    def __init__(self, router: ZmqRouter[FromInstance], endpoint: str) -> None:
        self.router = router
        self._endpoint = endpoint

    @asynccontextmanager
    async def connect(self, identity: bytes) -> AsyncIterator[ZmqDealer[ToInstance]]:
        async with connect_dealer(
            self._endpoint, identity, TO_INSTANCE, linger_ms=0
        ) as dealer:
            yield dealer

    async def send_frames(self, dealer: Any, frames: list[bytes]) -> None:
        # A DEALER cannot send no frame at all.
        await dealer._socket.send_multipart(frames or [b"", b""])

    async def send_to(self, identity: bytes, dealer: Any, frames: list[bytes]) -> None:
        del dealer
        socket: Any = self.router._socket  # type: ignore[attr-defined]
        socket.send_multipart([identity, *(frames or [b"", b""])])


class TestZeroMq(Contract):
    @pytest.fixture
    async def ends(self) -> AsyncIterator[ZmqEnds]:
        folder = make_socket_dir()
        endpoint = f"ipc://{folder}/s"
        try:
            async with bind_router(
                endpoint, FROM_INSTANCE, max_queued=MAX_QUEUED
            ) as router:
                yield ZmqEnds(router, endpoint)
        finally:
            shutil.rmtree(folder)


class TcpEnds(ZmqEnds):
    """The same, over TCP and encrypted."""

    @asynccontextmanager
    async def connect(self, identity: bytes) -> AsyncIterator[ZmqDealer[ToInstance]]:
        async with connect_tcp(self._endpoint, identity, TO_INSTANCE, KEYS) as dealer:
            yield dealer


class TestTcp(Contract):
    @pytest.fixture
    async def ends(self) -> AsyncIterator[TcpEnds]:
        async with bind_tcp("tcp://127.0.0.1:*", FROM_INSTANCE, KEYS) as router:
            router._max_queued = MAX_QUEUED
            yield TcpEnds(router, router.endpoint)
