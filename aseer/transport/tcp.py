"""ZeroMQ sockets between machines: TCP, encrypted and authenticated both ways (CURVE).

A connection is made once: when it breaks, its `receive` says so, and whoever wants
another makes a new one, under a new identity. (ZeroMQ's own reconnecting loses what was
on its way without a word.) Heartbeats find peers and networks that are gone; a message
that is too large costs its connection.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from aseer.errors import ConfigError, EngineError
from aseer.inputs.addresses import host_of, is_loopback
from aseer.transport.base import (
    MAX_QUEUED,
    ConnectionLost,
    ConnectionRefused,
    HandshakeFailed,
)
from aseer.transport.keys import HOW_TO
from aseer.transport.zeromq import (
    HIGH_WATER_MARK,
    ZmqDealer,
    ZmqRouter,
    set_bounds,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import msgspec

    from aseer.transport.base import Message
    from aseer.transport.keys import Keys

In = TypeVar("In")

# ZeroMQ takes every client's key if a server has no domain, or does not insist on it.
_DOMAIN = b"aseer"
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
# A peer is pinged that often, and dropped if it does not answer for so long. ZeroMQ
# answers by itself, so this finds dead machines and networks, not busy processes.
_PING_INTERVAL_MS = 2_000
_PING_TIMEOUT_MS = 10_000
# A handshake takes milliseconds, but waits for the event loop, which may be busy.
_HANDSHAKE_MS = 10_000
# ZeroMQ's ends send a byte as soon as they are connected.
_GREETING = b"\xff"
_GREETING_S = 5.0
# For what was sent last to leave.
_LINGER_MS = 500
_CLOSED_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_WRONG_KEY = (
    "the controller and this node have different keys, or one of them has none; "
    + HOW_TO
)


def check_key_is_there(name: str, address: str, keys: Keys | None) -> None:
    """Refuse what others could reach, and read along.

    Raises:
        ConfigError: the address is not of this machine alone, and there is no key.
    """
    if keys is None and not is_loopback(address):
        raise ConfigError(
            f"{name}={address!r} can be reached from other machines, and there is no "
            f"key, without which nobody may connect; {HOW_TO}"
        )


class TcpRouter(ZmqRouter[In]):
    """A `Router` whose peers are authenticated while it runs."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        decoder: msgspec.msgpack.Decoder[In],
        zap: zmq.asyncio.Socket,
        keys: Keys | None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        super().__init__(socket, decoder, max_queued)
        self._zap = zap
        self._keys = keys

    @property
    def endpoint(self) -> str:
        """Where it listens, with the port that was chosen if that was to be any."""
        return cast("bytes", self._socket.get(zmq.LAST_ENDPOINT)).decode()

    async def run(
        self,
        on_message: Callable[[bytes, In], None],
        on_lost: Callable[[bytes, str], None] | None = None,
        on_gone: Callable[[bytes], None] | None = None,
    ) -> None:
        """See `Router`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._authenticate())
            tasks.create_task(super().run(on_message, on_lost, on_gone))

    async def _authenticate(self) -> None:
        """Answer ZeroMQ's question for each connection: only our nodes' key is good."""
        key = None if self._keys is None else z85.decode(self._keys.node.public)
        while True:
            question = await self._zap.recv_multipart()
            version, request_id = question[:2]
            mechanism, credentials = question[5], question[6:]
            wanted = (b"CURVE", [key]) if key is not None else (b"NULL", [])
            if (mechanism, credentials) == wanted:
                answer = [b"200", b"OK", b"node", b""]
            else:
                answer = [b"400", b"this key is not known here", b"", b""]
            await self._zap.send_multipart([version, request_id, *answer])


class TcpDealer(ZmqDealer[In]):
    """A `Dealer` over one connection; `send` and `receive` fail when that has ended."""

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        decoder: msgspec.msgpack.Decoder[In],
        endpoint: str,
    ) -> None:
        super().__init__(socket, decoder)
        self._endpoint = endpoint
        self._monitor = socket.get_monitor_socket(_CLOSED_EVENTS)
        self._receiving: asyncio.Future[list[bytes]] | None = None
        self._ending: asyncio.Future[list[bytes]] | None = None

    async def send(self, message: Message) -> None:
        """See `Dealer`.

        Raises:
            ConnectionLost, ConnectionRefused: as `receive`. What ZeroMQ has room for is
                taken, and lost; for more it would wait for ever.
        """
        sending = self._put(message)
        try:
            if not sending.done():
                ending = self._watch_end()
                both: list[asyncio.Future[Any]] = [sending, ending]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    raise await self._why_ended(ending)
            await sending
        finally:
            sending.cancel()

    async def receive(self) -> In:
        """See `Dealer`."""
        while True:
            receiving = self._receiving = self._receiving or _next(self._socket)
            ending = self._watch_end()
            await asyncio.wait([receiving, ending], return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                raise await self._why_ended(ending)
            self._receiving = None
            message = self._reader.read(receiving.result(), b"the controller")
            if message is not None:
                return message
            await asyncio.sleep(0)  # what has come already is read without waiting

    def close(self) -> None:
        """Close the connection."""
        for future in (self._receiving, self._ending):
            if future is not None:
                future.cancel()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    def _watch_end(self) -> asyncio.Future[list[bytes]]:
        """The event that ends the connection; once it has come, it stays."""
        self._ending = self._ending or _next(self._monitor)
        return self._ending

    async def _why_ended(
        self, ending: asyncio.Future[list[bytes]]
    ) -> ConnectionLost | ConnectionRefused:
        """Why the connection has ended."""
        why = self._why(parse_monitor_message(ending.result()))
        if isinstance(why, HandshakeFailed) and not await _greets(self._endpoint):
            return ConnectionLost(
                f"{self._endpoint}: connections are taken and ended at once; "
                "is it a proxy, and the controller behind it running?"
            )
        return why

    def _why(self, event: Any) -> ConnectionLost | ConnectionRefused:
        kind = event["event"]
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return ConnectionRefused(f"{self._endpoint}: {_WRONG_KEY}")
        if kind in (
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
        ):
            return HandshakeFailed(f"{self._endpoint}: {_WRONG_KEY}")
        if kind == zmq.EVENT_CLOSED:
            why = "nobody answers; is the controller running, and its port open?"
        else:
            why = "the connection broke"
        return ConnectionLost(f"{self._endpoint}: {why}")


async def _greets(endpoint: str) -> bool:
    """Whether whoever takes connections there speaks ZeroMQ.

    A proxy whose other side is gone does not; an end with another key does.
    """
    port = int(endpoint.rpartition(":")[2])
    try:
        async with asyncio.timeout(_GREETING_S):
            reader, writer = await asyncio.open_connection(host_of(endpoint), port)
            try:
                return await reader.read(1) == _GREETING
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _next(socket: zmq.asyncio.Socket) -> asyncio.Future[list[bytes]]:
    return cast("asyncio.Future[list[bytes]]", socket.recv_multipart())


@asynccontextmanager
async def bind_tcp(
    endpoint: str,
    decoder: msgspec.msgpack.Decoder[In],
    keys: Keys | None,
    *,
    max_queued: int = MAX_QUEUED,
) -> AsyncIterator[TcpRouter[In]]:
    """A ROUTER bound to `endpoint`, where only nodes with our keys are heard.

    Args:
        keys: None = connections are not encrypted; for this machine's own addresses.
        max_queued: messages that wait for one of them, here and in ZeroMQ.
    Raises:
        ConfigError: others could reach it, and there are no keys.
        EngineError: the address cannot be had.
    """
    check_key_is_there("listen", endpoint, keys)
    with zmq.asyncio.Context() as context:
        zap = context.socket(zmq.REP)
        socket: zmq.Socket[bytes] = zmq.Context.shadow(context).socket(zmq.ROUTER)
        try:
            zap.bind(_ZAP_ENDPOINT)
            socket.set(zmq.ROUTER_MANDATORY, 1)  # say who is full, and who is gone
            socket.set(zmq.ROUTER_HANDOVER, 1)
            set_bounds(socket)
            socket.set(zmq.SNDHWM, min(max_queued, HIGH_WATER_MARK))
            _set_network(socket, endpoint)
            socket.set(zmq.ZAP_DOMAIN, _DOMAIN)
            socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
            if keys is not None:
                socket.set(zmq.CURVE_SERVER, 1)
                socket.set(zmq.CURVE_PUBLICKEY, keys.controller.public)
                socket.set(zmq.CURVE_SECRETKEY, keys.controller.secret)
            try:
                socket.bind(endpoint)
            except zmq.ZMQError as error:
                raise EngineError(
                    f"listen={endpoint!r} cannot be used: {error}; give an address of "
                    "this machine and a port that is free"
                ) from None
            with TcpRouter(socket, decoder, zap, keys, max_queued) as router:
                yield router
        finally:
            socket.close(linger=_LINGER_MS)
            zap.close(linger=0)


@asynccontextmanager
async def connect_tcp(
    endpoint: str,
    identity: bytes,
    decoder: msgspec.msgpack.Decoder[In],
    keys: Keys | None,
    *,
    max_queued: int = HIGH_WATER_MARK,
) -> AsyncIterator[TcpDealer[In]]:
    """A DEALER with one connection to `endpoint`, never made again.

    Args:
        max_queued: messages that have come and are not yet received.
    Raises:
        ConfigError: the address is not of this machine, and there are no keys.
        ConnectionLost: the address cannot be connected to.
    """
    check_key_is_there("controller", endpoint, keys)
    with zmq.asyncio.Context() as context:
        socket = context.socket(zmq.DEALER)
        dealer: TcpDealer[In] | None = None
        linger_ms = 0
        try:
            socket.set(zmq.IDENTITY, identity)
            socket.set(zmq.RECONNECT_IVL, -1)
            set_bounds(socket)
            socket.set(zmq.RCVHWM, max_queued)
            _set_network(socket, endpoint)
            if keys is not None:
                socket.set(zmq.CURVE_SERVERKEY, keys.controller.public)
                socket.set(zmq.CURVE_PUBLICKEY, keys.node.public)
                socket.set(zmq.CURVE_SECRETKEY, keys.node.secret)
            dealer = TcpDealer(socket, decoder, endpoint)
            try:
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                raise ConnectionLost(f"{endpoint}: {error}") from None
            yield dealer
            linger_ms = _LINGER_MS  # what was sent last may still be on its way
        finally:
            if dealer is not None:
                with suppress(zmq.ZMQError):
                    dealer.close()
            socket.close(linger=linger_ms)


def _set_network(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, endpoint: str) -> None:
    # From the start: ZeroMQ ends a connection whose handshake failed with what is set
    # then, and by default waits for ever for what was to be sent over it.
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.HEARTBEAT_IVL, _PING_INTERVAL_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, _PING_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, _PING_TIMEOUT_MS)
    socket.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    if ":" in host_of(endpoint):
        socket.set(zmq.IPV6, 1)
