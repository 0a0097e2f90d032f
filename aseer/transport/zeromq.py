"""ZeroMQ sockets: one ROUTER in the controller, one DEALER in each instance.

Messages are msgspec structs in MessagePack; nothing is ever unpickled. One task a
socket receives, and one sends from a bounded queue, so that callers never wait on a
peer and nothing is cancelled inside a `recv`. A peer that stops reading fills the
queue; that is an error its owner hears of (`PeerTooSlow`), never a silent loss.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from aseer.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

In = TypeVar("In")
_Outgoing = tuple[bytes, msgspec.Struct]

HIGH_WATER_MARK = 10_000
MAX_QUEUED = 1_000_000
_LONGEST_NAME = 36  # of a socket: a UUID, vLLM's


class PeerTooSlow(ProtocolError):
    """More messages wait for a peer than it could ever need."""


def make_socket_dir() -> Path:
    """Make a directory for sockets, where temporary files go.

    A socket's path has at most 107 bytes. Where `TMPDIR` is too long for that, as some
    clusters' is, the directory is in /tmp.
    """
    folder = Path(tempfile.mkdtemp(prefix="aseer-"))  # 0700
    longest = os.fsencode(folder / ("x" * _LONGEST_NAME))
    if len(longest) <= zmq.IPC_PATH_MAX_LEN:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="aseer-", dir="/tmp"))


class Router(Generic[In]):
    """The controller's end: many peers, told apart by identity."""

    def __init__(
        self, socket: zmq.asyncio.Socket, decoder: msgspec.msgpack.Decoder[In]
    ) -> None:
        self._socket = socket
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._out: asyncio.Queue[_Outgoing] = asyncio.Queue(MAX_QUEUED)

    def send(self, peer: bytes, message: msgspec.Struct) -> None:
        """Queue a message; order to a peer is kept. A peer that is gone loses it.

        Raises:
            PeerTooSlow: the queue is full.
        """
        try:
            self._out.put_nowait((peer, message))
        except asyncio.QueueFull:
            raise PeerTooSlow(f"{MAX_QUEUED} messages wait to be sent") from None

    async def run(self, on_message: Callable[[bytes, In], None]) -> None:
        """Send and receive until cancelled.

        Args:
            on_message: called with (peer, message) for each that comes.
        Raises:
            ProtocolError: a message that does not decode.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_all())
            tasks.create_task(self._receive_all(on_message))

    async def _send_all(self) -> None:
        while True:
            peer, message = await self._out.get()
            try:
                await self._socket.send_multipart([peer, self._encoder.encode(message)])
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:  # the peer died; its owner knows
                    raise

    async def _receive_all(self, on_message: Callable[[bytes, In], None]) -> None:
        while True:
            peer, data = await self._socket.recv_multipart()
            on_message(peer, _decode(self._decoder, data))


class Dealer(Generic[In]):
    """An instance's end: one peer, the controller."""

    def __init__(
        self, socket: zmq.asyncio.Socket, decoder: msgspec.msgpack.Decoder[In]
    ) -> None:
        self._socket = socket
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()

    async def send(self, message: msgspec.Struct) -> None:
        """Send a message; waits while the controller is not reading."""
        await self._socket.send(self._encoder.encode(message))

    async def receive(self) -> In:
        """The next message. One task only may wait here, and never under a timeout.

        Raises:
            ProtocolError: it does not decode.
        """
        return _decode(self._decoder, await self._socket.recv())


@asynccontextmanager
async def bind_router(
    endpoint: str, decoder: msgspec.msgpack.Decoder[In]
) -> AsyncIterator[Router[In]]:
    """A ROUTER bound to `endpoint`; closed, without lingering, at the end."""
    with zmq.asyncio.Context() as context:
        socket = context.socket(zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        _set_bounds(socket)
        try:
            socket.bind(endpoint)
            yield Router(socket, decoder)
        finally:
            socket.close(linger=0)


@asynccontextmanager
async def connect_dealer(
    endpoint: str,
    identity: bytes,
    decoder: msgspec.msgpack.Decoder[In],
    *,
    linger_ms: int = 1000,
) -> AsyncIterator[Dealer[In]]:
    """A DEALER connected to `endpoint`; what was sent last has `linger_ms` to leave."""
    with zmq.asyncio.Context() as context:
        socket = context.socket(zmq.DEALER)
        socket.set(zmq.IDENTITY, identity)
        _set_bounds(socket)
        try:
            socket.connect(endpoint)
            yield Dealer(socket, decoder)
        finally:
            socket.close(linger=linger_ms)


def _set_bounds(socket: zmq.asyncio.Socket) -> None:
    socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.set(zmq.RCVHWM, HIGH_WATER_MARK)


def _decode(decoder: msgspec.msgpack.Decoder[In], data: bytes) -> In:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise ProtocolError(
            f"a message of {len(data)} bytes is not ours: {error}"
        ) from (error)
