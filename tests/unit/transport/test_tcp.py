"""Who may connect, and in which words a connection that has ended says why.

The sockets are stand-ins; `tests/integration/test_tcp.py` has real ones.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq
from zmq.utils import z85

from aseer.errors import ConfigError
from aseer.transport.base import ConnectionLost, ConnectionRefused, HandshakeFailed
from aseer.transport.keys import derive_keys
from aseer.transport.sessions import FRAME, Frame
from aseer.transport.tcp import TcpDealer, TcpRouter, check_key_is_there

if TYPE_CHECKING:
    from aseer.transport.keys import Keys

KEYS = derive_keys(b"of these tests alone")
OTHERS = derive_keys(b"of some other cluster")
ENDPOINT = "tcp://10.1.2.3:5557"


class Zap:
    """Asks as ZeroMQ does for each connection (its ZAP protocol)."""

    def __init__(self, *asked: tuple[bytes, list[bytes]]) -> None:
        self._asked = list(asked)
        self.answers: list[list[bytes]] = []

    async def recv_multipart(self) -> list[bytes]:
        if not self._asked:
            raise asyncio.CancelledError  # the router ends
        mechanism, credentials = self._asked.pop(0)
        number = str(len(self._asked)).encode()
        head = [b"1.0", number, b"aseer", b"10.9.8.7", b"identity"]
        return [*head, mechanism, *credentials]

    async def send_multipart(self, answer: list[bytes]) -> None:
        self.answers.append(answer)


async def statuses(keys: Keys | None, *asked: tuple[bytes, list[bytes]]) -> list[bytes]:
    zap: Any = Zap(*asked)
    router: Any = TcpRouter.__new__(TcpRouter)
    router._zap, router._keys = zap, keys
    with pytest.raises(asyncio.CancelledError):
        await router._authenticate()
    for i, answer in enumerate(zap.answers):
        assert answer[:2] == [b"1.0", str(len(zap.answers) - 1 - i).encode()]
        assert len(answer) == 6, "or ZeroMQ takes it for no answer, and hangs"
    return [answer[2] for answer in zap.answers]


def curve(public: bytes) -> tuple[bytes, list[bytes]]:
    return b"CURVE", [z85.decode(public)]


async def test_only_the_key_of_our_nodes_is_let_in() -> None:
    found = await statuses(
        KEYS,
        curve(KEYS.node.public),
        curve(OTHERS.node.public),
        curve(KEYS.controller.public),  # which a node has, and is not a node's
        (b"NULL", []),
        (b"PLAIN", [b"user", b"password"]),
        (b"CURVE", []),
        curve(KEYS.node.public),
    )
    assert found == [b"200", *[b"400"] * 5, b"200"]


async def test_without_keys_only_plain_connections_are_let_in() -> None:
    found = await statuses(
        None, (b"NULL", []), curve(KEYS.node.public), (b"PLAIN", [b"u", b"p"])
    )
    assert found == [b"200", b"400", b"400"]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://[::1]:1"])
def test_this_machines_own_addresses_need_no_key(address: str) -> None:
    check_key_is_there("listen", address, None)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:1", "tcp://[::]:*", ENDPOINT])
def test_an_address_that_others_reach_needs_a_key(address: str) -> None:
    check_key_is_there("listen", address, KEYS)
    with pytest.raises(ConfigError, match=r"listen='tcp://.*no key.*`aseer key`"):
        check_key_is_there("listen", address, None)


class Socket:
    """A socket of the connecting end, and its monitor, as futures."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.monitor: Any = None
        self.is_monitored = True
        self.is_closed = False

    def get_monitor_socket(self, events: int) -> Socket:
        self.monitor = Socket()
        return self.monitor

    def recv_multipart(self) -> asyncio.Future[list[bytes]]:
        return asyncio.get_running_loop().create_task(self.coming.get())

    def disable_monitor(self) -> None:
        self.is_monitored = False

    def close(self, linger: int) -> None:
        self.is_closed = True

    def end(self, event: int) -> None:
        """The connection ends, as ZeroMQ's monitor says it."""
        self.monitor.coming.put_nowait([struct.pack("=HI", event, 0), ENDPOINT])


@pytest.fixture
async def socket() -> Socket:
    return Socket()


@pytest.fixture
def dealer(socket: Socket) -> Any:
    return TcpDealer(socket, FRAME, ENDPOINT)  # type: ignore[arg-type]


def greets(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> None:
    """Whoever takes connections at the address sends that first."""

    class Streams:
        async def read(self, num: int) -> bytes:
            return bytes(answer)[:num]  # type: ignore[arg-type]

        def close(self) -> None: ...

    async def connect(host: str, port: int) -> Any:
        assert (host, port) == ("10.1.2.3", 5557)
        if isinstance(answer, Exception):
            raise answer
        return Streams(), Streams()

    monkeypatch.setattr("aseer.transport.tcp.asyncio.open_connection", connect)


async def test_messages_come_and_what_is_none_is_passed_over(
    dealer: Any, socket: Socket
) -> None:
    frame = Frame(b"header", b"payload")
    socket.coming.put_nowait([b"\xff nonsense"])
    socket.coming.put_nowait([b"two", b"frames"])
    socket.coming.put_nowait([msgspec.msgpack.encode(frame)])
    assert await dealer.receive() == frame
    dealer.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("event", "error", "words"),
    [
        (zmq.EVENT_HANDSHAKE_FAILED_AUTH, ConnectionRefused, "different keys"),
        (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, HandshakeFailed, "different keys"),
        (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, HandshakeFailed, "different keys"),
        (zmq.EVENT_CLOSED, ConnectionLost, "nobody answers"),
        (zmq.EVENT_DISCONNECTED, ConnectionLost, "the connection broke"),
    ],
)
async def test_the_end_of_a_connection_is_told_with_its_cause(
    dealer: Any,
    socket: Socket,
    monkeypatch: pytest.MonkeyPatch,
    event: int,
    error: type[Exception],
    words: str,
) -> None:
    greets(monkeypatch, b"\xff\x00")
    socket.end(event)
    with pytest.raises(error, match=words) as raised:
        await dealer.receive()
    assert type(raised.value) is error
    assert ENDPOINT in str(raised.value)
    dealer.close()
    await asyncio.sleep(0)
    assert not socket.is_monitored
    assert socket.monitor.is_closed


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400", OSError("refused"), TimeoutError()]
)
async def test_what_ends_connections_and_speaks_no_zeromq_is_no_wrong_key(
    dealer: Any,
    socket: Socket,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes | Exception,
) -> None:
    """A proxy whose other side is gone looks so; the node must go on trying."""
    greets(monkeypatch, answer)
    socket.end(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
    with pytest.raises(ConnectionLost, match="is it a proxy") as raised:
        await dealer.receive()
    assert not isinstance(raised.value, HandshakeFailed)
    dealer.close()
    await asyncio.sleep(0)


async def test_what_came_before_the_end_is_still_received(
    dealer: Any, socket: Socket
) -> None:
    last = Frame(b"header", b"the last words")
    socket.coming.put_nowait([msgspec.msgpack.encode(last)])
    socket.end(zmq.EVENT_DISCONNECTED)
    assert await dealer.receive() == last
    with pytest.raises(ConnectionLost, match="the connection broke"):
        await dealer.receive()
    dealer.close()
    await asyncio.sleep(0)
