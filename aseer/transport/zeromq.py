"""ZeroMQ sockets: one ROUTER in the controller, one DEALER in each instance.

See `aseer.transport.base` for what holds. A peer's queue is in front of ZeroMQ's own,
which is kept short, since nobody sees into it and it counts no bytes.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import msgspec
import zmq
import zmq.asyncio

from aseer.transport.base import (
    MAX_MESSAGE_BYTES,
    MAX_QUEUED,
    QueueingRouter,
    Reader,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

    from aseer.transport.base import Message, Received, Sent

In = TypeVar("In")

# Of messages in ZeroMQ's own queue at either end of a connection: enough to keep both
# busy between two turns of their event loops.
HIGH_WATER_MARK = 1000
# ZeroMQ closes a connection that brings a larger one. Twice what is ever taken, so that
# what is a little too large is dropped and named instead.
_MAX_FRAME_BYTES = 2 * MAX_MESSAGE_BYTES
_NOBLOCK_MORE = zmq.NOBLOCK | zmq.SNDMORE
_LONGEST_NAME = 36  # of a socket: a UUID, vLLM's


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


class ZmqRouter(QueueingRouter[In]):
    """A `Router` over a ROUTER socket, which the loop watches between `with` and its
    end.

    No call on the socket waits: one full peer would keep all others waiting. All that
    has come is read before the loop is asked for more, which is most of what a small
    message would cost.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        decoder: msgspec.msgpack.Decoder[In],
        max_queued: int = MAX_QUEUED,
    ) -> None:
        super().__init__(decoder, max_queued=max_queued)
        self._socket = socket
        self._has_arrived = asyncio.Event()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._has_arrived.set)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())

    def _try_send(self, peer: bytes, data: bytes) -> Sent:
        # The socket's file tells once of what has come, and any call may take the note.
        self._has_arrived.set()
        try:
            self._socket.send(peer, _NOBLOCK_MORE)
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return "gone"
            raise
        return "sent"

    def _try_receive(self) -> Received | None:
        self._has_arrived.clear()
        try:
            peer = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        frames: list[memoryview] = []
        has_more = True  # every message has a sender, and something after it
        while has_more:
            # Reports are long, and are read where they are.
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            frames.append(frame.buffer)
            has_more = frame.more
        return peer, frames

    async def _arrival(self) -> None:
        await self._has_arrived.wait()


class ZmqDealer(Generic[In]):
    """A `Dealer` over a DEALER socket."""

    def __init__(
        self, socket: zmq.asyncio.Socket, decoder: msgspec.msgpack.Decoder[In]
    ) -> None:
        self._socket = socket
        self._reader = Reader(decoder)
        self._encoder = msgspec.msgpack.Encoder()

    async def send(self, message: Message) -> None:
        """See `Dealer`."""
        await self._put(message)

    def _put(self, message: Message) -> asyncio.Future[object]:
        sent = self._socket.send(encode(self._encoder, message))
        return cast("asyncio.Future[object]", sent)

    async def receive(self) -> In:
        """See `Dealer`."""
        while True:
            frames = await self._socket.recv_multipart()
            message = self._reader.read(frames, b"the controller")
            if message is not None:
                return message
            await asyncio.sleep(0)  # what has come already is read without waiting


@asynccontextmanager
async def bind_router(
    endpoint: str,
    decoder: msgspec.msgpack.Decoder[In],
    *,
    max_queued: int = MAX_QUEUED,
) -> AsyncIterator[ZmqRouter[In]]:
    """A ROUTER bound to `endpoint`; closed, without lingering, at the end."""
    with zmq.Context() as context:
        socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)  # say who is full, and who is gone
        # A peer whose connection was closed on it comes back under its name.
        socket.set(zmq.ROUTER_HANDOVER, 1)
        set_bounds(socket)
        try:
            socket.bind(endpoint)
            with ZmqRouter(socket, decoder, max_queued) as router:
                yield router
        finally:
            socket.close(linger=0)


@asynccontextmanager
async def connect_dealer(
    endpoint: str,
    identity: bytes,
    decoder: msgspec.msgpack.Decoder[In],
    *,
    linger_ms: int = 1000,
) -> AsyncIterator[ZmqDealer[In]]:
    """A DEALER connected to `endpoint`; what was sent last has `linger_ms` to leave."""
    with zmq.asyncio.Context() as context:
        socket = context.socket(zmq.DEALER)
        socket.set(zmq.IDENTITY, identity)
        set_bounds(socket)
        try:
            socket.connect(endpoint)
            yield ZmqDealer(socket, decoder)
        finally:
            socket.close(linger=linger_ms)


def set_bounds(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    """Bound what a socket keeps, and what it takes."""
    socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.set(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
