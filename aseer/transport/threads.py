"""ZeroMQ sockets for threads that have no event loop: the draft server's and clients'.

They carry what may be lost, so a send never waits: what a slow or dead peer has no room
for is dropped, and so is what is no message (`aseer.transport.base.Reader`). Messages
are msgspec structs in MessagePack. A socket belongs to the thread that uses it.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import zmq

from aseer.transport.base import MAX_MESSAGE_BYTES, Reader

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

_log = logging.getLogger("aseer")

In = TypeVar("In")

# A message answers a question that is asked a few times a second, and has 256 KB at
# most: what has waited longer than this many is not worth keeping.
HIGH_WATER_MARK = 100
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class LossySocket(Generic[In]):
    """A socket whose messages may be lost; a ROUTER tells peers apart by identity."""

    def __init__(
        self, socket: zmq.Socket[bytes], decoder: msgspec.msgpack.Decoder[In]
    ) -> None:
        self._socket = socket
        self._has_peers = socket.type == zmq.ROUTER
        self._reader = Reader(decoder)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: msgspec.Struct | bytes, peer: bytes | None = None) -> bool:
        """Send if there is room, bytes as they are; whether it left."""
        if not isinstance(message, bytes):
            message = self._encoder.encode(message)
        frames = [message]
        if peer is not None:
            frames.insert(0, peer)
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def receive(self, timeout_s: float) -> tuple[bytes, In] | None:
        """The next message with its sender (empty for a DEALER); None if none comes, or
        what comes is none.
        """
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:  # waiting costs several times as much as looking
            if not self._socket.poll(max(0, int(timeout_s * 1000))):
                return None
            frames = self._socket.recv_multipart()
        peer = frames.pop(0) if self._has_peers else b""
        message = self._reader.read(frames, peer)
        return None if message is None else (peer, message)


def run_again(
    serve: Callable[[], None], stop: threading.Event, what: str, cost: str
) -> None:
    """Run `serve` until it returns; whenever it fails, again after a growing pause.

    Args:
        stop: ends the pause, and with it the tries.
        what, cost: what fails and what that costs, for the log: a line for the first
            failure of a series.
    """
    pause_s = _FIRST_PAUSE_S
    while not stop.is_set():
        started = time.monotonic()
        try:
            serve()
        except Exception:
            if time.monotonic() - started > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            if pause_s == _FIRST_PAUSE_S:
                _log.exception("%s failed and is tried again; meanwhile %s", what, cost)
        else:
            return
        stop.wait(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


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
        socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            yield socket
        finally:
            socket.close(linger=0)
