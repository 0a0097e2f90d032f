"""ZeroMQ sockets for threads that have no event loop: the draft server's and clients'.

They carry what may be lost, so a send never waits: what a slow or dead peer has no room
for is dropped. Messages are msgspec structs in MessagePack. A socket belongs to the
thread that uses it.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import zmq

if TYPE_CHECKING:
    from collections.abc import Iterator

In = TypeVar("In")

HIGH_WATER_MARK = 1000


class LossySocket(Generic[In]):
    """A socket whose messages may be lost; a ROUTER tells peers apart by identity."""

    def __init__(
        self, socket: zmq.Socket[bytes], decoder: msgspec.msgpack.Decoder[In]
    ) -> None:
        self._socket = socket
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: msgspec.Struct, peer: bytes | None = None) -> bool:
        """Send if there is room; whether it left."""
        frames = [self._encoder.encode(message)]
        if peer is not None:
            frames.insert(0, peer)
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def receive(self, timeout_s: float) -> tuple[bytes, In] | None:
        """The next message with its sender (empty for a DEALER); None if none comes.

        What does not decode is dropped.
        """
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        frames = self._socket.recv_multipart()
        with suppress(msgspec.DecodeError):
            return (frames[0] if len(frames) > 1 else b""), self._decoder.decode(
                frames[-1]
            )
        return None


@contextmanager
def lossy_router(
    endpoint: str, decoder: msgspec.msgpack.Decoder[In]
) -> Iterator[LossySocket[In]]:
    """A ROUTER bound to `endpoint`, for the calling thread."""
    with _socket(zmq.ROUTER) as socket:
        socket.bind(endpoint)
        yield LossySocket(socket, decoder)


@contextmanager
def lossy_dealer(
    endpoint: str, identity: bytes, decoder: msgspec.msgpack.Decoder[In]
) -> Iterator[LossySocket[In]]:
    """A DEALER connected to `endpoint`, for the calling thread."""
    with _socket(zmq.DEALER) as socket:
        socket.set(zmq.IDENTITY, identity)
        socket.connect(endpoint)
        yield LossySocket(socket, decoder)


@contextmanager
def _socket(kind: int) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context:
        socket: zmq.Socket[bytes] = context.socket(kind)
        socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        try:
            yield socket
        finally:
            socket.close(linger=0)
