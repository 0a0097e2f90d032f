"""The contract of a transport, and what all implementations of it share.

A `Router` talks with many peers, told apart by identity; a `Dealer` with one router.
Messages are msgspec structs in MessagePack; nothing is ever unpickled. What always
holds:

- Nobody waits for a peer: each has a queue of its own, bounded in messages and bytes,
  and order to a peer is kept. A peer that lets its queue fill, or takes nothing from it
  for long, is lost: its queue is dropped, and the router's owner is told.
- A message that is not one of ours (other frames, too large, not decodable) is logged,
  at most every few seconds, and dropped.
- An exception in handling a peer's message is that peer's loss, and nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

import msgspec

from aseer.errors import AseerError, ProtocolError, describe
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger("aseer")

In = TypeVar("In")
In_co = TypeVar("In_co", covariant=True)

# Of the messages between the controller and its instances (`instance/messages.py`), and
# of how they are packed.
PROTOCOL_VERSION = 4
# An instance may be sent a chunk for each request that it can run, and an abort for
# each of those, before any is read. Engines run a thousand requests at once by default,
# and are seldom told to run ten times as many.
MAX_QUEUED = 100_000
# Chunks carry tokens that fit into an engine's KV together, and siblings' each carries
# their prompt. For ten million tokens, 4 bytes each, and sixteen siblings: 640 MB.
MAX_QUEUED_BYTES = 2 << 30
# A chunk of a request of a million tokens has 4 MB; reports are cut at about as many.
MAX_MESSAGE_BYTES = 128 << 20
# A peer that says nothing either is its owner's to judge, and sooner; this is for one
# that reports and does not read.
MAX_BLOCKED_S = 600.0
# A socket does not tell when one of its peers has room again, so it is tried.
_RETRY_S = 0.01
# Messages from or to one peer before the others, and other tasks, have their turn.
_BURST = 64
_COMPLAINT_INTERVAL_S = 10.0

Sent = Literal["sent", "full", "gone"]


# What is sent: a message, or one that was received as bytes and is passed on unread.
Message = msgspec.Struct | msgspec.Raw
# A message that has come: its sender and its frames.
Received = tuple[bytes, "Sequence[bytes | memoryview]"]


class ConnectionLost(AseerError):
    """A connection brings nothing any more, or cannot be had now; a new one may."""


class HandshakeFailed(ConnectionLost):
    """The other end broke the handshake off, as it does for a wrong key.

    It may also have ended just then; if the next handshakes fail, too, it is the key.
    """


class ConnectionRefused(AseerError):
    """The other end does not talk with us, and will not the next time."""


class Router(Protocol[In_co]):
    """The controller's end: many peers, told apart by identity."""

    def send(self, peer: bytes, message: Message) -> None:
        """Queue a message; never waits or fails. A peer that is gone loses it."""
        ...

    def forget(self, peer: bytes) -> None:
        """Nothing more will be sent to a peer: drop what waits for it."""
        ...

    async def run(
        self,
        on_message: Callable[[bytes, In_co], None],
        on_lost: Callable[[bytes, str], None] | None = None,
        on_gone: Callable[[bytes], None] | None = None,
    ) -> None:
        """Send and receive until cancelled.

        Args:
            on_message: called with (peer, message) for each that comes.
            on_lost: called with (peer, why) for a peer that is no use any more. Until
                it is forgotten, what is sent to it is dropped.
            on_gone: called with a peer that has no connection, and so lost what was
                sent to it. It may come back.
        """
        ...


class Dealer(Protocol[In_co]):
    """An instance's end: one peer, the controller."""

    async def send(self, message: Message) -> None:
        """Send a message; waits while the controller is not reading.

        Raises:
            ProtocolError: it is larger than any receiver takes.
        """
        ...

    async def receive(self) -> In_co:
        """The next message. One task only may wait here, and never under a timeout.

        Raises:
            ConnectionLost: there will be none, on a connection that is not made again.
            ConnectionRefused: nor on another.
        """
        ...


class Reader(Generic[In]):
    """Decodes what peers send."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[In]) -> None:
        self._decoder = decoder
        self._next_complaint_s = 0.0
        self._num_untold = 0

    def read(self, frames: Sequence[bytes | memoryview], sender: bytes) -> In | None:
        """The message in these frames; None, and a line in the log, if it is none."""
        if len(frames) != 1:
            why = f"it has {len(frames)} frames instead of one"
        elif len(frames[0]) > MAX_MESSAGE_BYTES:
            why = f"its {len(frames[0])} bytes are more than {MAX_MESSAGE_BYTES}"
        else:
            try:
                return self._decoder.decode(frames[0])
            except Exception as error:  # of bad UTF-8 and deep nesting: not msgspec's
                why = describe(error)
        self._complain(sender, why)
        return None

    def _complain(self, sender: bytes, why: str) -> None:
        now = time.monotonic()
        if now < self._next_complaint_s:
            self._num_untold += 1
            return
        _log.warning(
            "dropped a message from %r: %s (and %d more since the last such line)",
            sender,
            why,
            self._num_untold,
        )
        self._next_complaint_s = now + _COMPLAINT_INTERVAL_S
        self._num_untold = 0


def encode(encoder: msgspec.msgpack.Encoder, message: Message) -> bytes:
    """A message's bytes.

    Raises:
        ProtocolError: they are more than a receiver takes.
    """
    data = encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(data)} bytes is too large: a receiver "
            f"takes at most {MAX_MESSAGE_BYTES}"
        )
    return data


class _Queue:
    """What waits for a peer."""

    __slots__ = ("blocked", "is_lost", "messages", "num_bytes")

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.num_bytes = 0
        self.blocked: WakingClock | None = None  # since then
        self.is_lost = False


class QueueingRouter(ABC, Generic[In]):
    """A `Router` but for its wire: `_try_send`, `_try_receive` and `_arrival`."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[In],
        *,
        max_queued: int = MAX_QUEUED,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        max_blocked_s: float = MAX_BLOCKED_S,
    ) -> None:
        """Start with no peers; the bounds are of what waits for one peer."""
        self._reader = Reader(decoder)
        self._encoder = msgspec.msgpack.Encoder()
        self._max_queued = max_queued
        self._max_queued_bytes = max_queued_bytes
        self._max_blocked_s = max_blocked_s
        # Of peers with messages that wait, or lost ones that are not forgotten yet.
        self._queues: dict[bytes, _Queue] = {}
        self._losses: list[tuple[bytes, str]] = []  # to be told; one a lost peer
        self._changed = asyncio.Event()

    @abstractmethod
    def _try_send(self, peer: bytes, data: bytes) -> Sent:
        """Send a message if the peer has room for it."""

    @abstractmethod
    def _try_receive(self) -> Received | None:
        """The next message that has come; None if there is none."""

    @abstractmethod
    async def _arrival(self) -> None:
        """Wait until something may have come since `_try_receive` found nothing."""

    def send(self, peer: bytes, message: Message) -> None:
        """See `Router`."""
        queue = self._queues.get(peer)
        if queue is not None and queue.is_lost:
            return
        try:
            data = encode(self._encoder, message)
        except ProtocolError as error:
            self._lose(peer, self._queues.setdefault(peer, _Queue()), str(error))
            return
        if queue is None:
            if self._is_sent(peer, data):
                return
            queue = self._queues[peer] = _Queue()
        num, num_bytes = len(queue.messages) + 1, queue.num_bytes + len(data)
        if num > self._max_queued or num_bytes > self._max_queued_bytes:
            self._lose(
                peer, queue, f"it does not read: {num} messages ({num_bytes} B) wait"
            )
            return
        queue.messages.append(data)
        queue.num_bytes = num_bytes
        self._changed.set()

    def forget(self, peer: bytes) -> None:
        """See `Router`."""
        self._queues.pop(peer, None)

    def _is_sent(self, peer: bytes, data: bytes) -> bool:
        """Send at once, past the queue; what fails is met again by who empties it."""
        try:
            return self._try_send(peer, data) == "sent"
        except Exception:
            return False

    async def run(
        self,
        on_message: Callable[[bytes, In], None],
        on_lost: Callable[[bytes, str], None] | None = None,
        on_gone: Callable[[bytes], None] | None = None,
    ) -> None:
        """See `Router`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_all(on_lost, on_gone))
            tasks.create_task(self._receive_all(on_message, on_lost))

    async def _send_all(
        self,
        on_lost: Callable[[bytes, str], None] | None,
        on_gone: Callable[[bytes], None] | None,
    ) -> None:
        while True:
            self._changed.clear()
            is_blocked = has_more = False
            for peer, queue in list(self._queues.items()):
                is_gone = not self._send_some(peer, queue)
                if is_gone and on_gone is not None:
                    on_gone(peer)
                if queue.messages:
                    is_blocked |= queue.blocked is not None
                    has_more |= queue.blocked is None
            losses, self._losses = self._losses, []
            for peer, why in losses:
                _tell(on_lost, peer, why)
            if has_more:
                await asyncio.sleep(0)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S if is_blocked else None):
                        await self._changed.wait()

    def _send_some(self, peer: bytes, queue: _Queue) -> bool:
        """Send what there is room for, up to a burst; False if the peer is gone."""
        is_there = True
        for _ in range(min(_BURST, len(queue.messages))):
            sent = self._try_send(peer, queue.messages[0])
            if sent == "full":
                self._note_blocked(peer, queue)
                return True
            queue.blocked = None
            if sent == "gone":
                queue.messages.clear()
                queue.num_bytes = 0
                is_there = False
                break
            queue.num_bytes -= len(queue.messages.popleft())
        if not (queue.messages or queue.is_lost):
            self._queues.pop(peer, None)
        return is_there

    def _note_blocked(self, peer: bytes, queue: _Queue) -> None:
        if queue.blocked is None:
            queue.blocked = WakingClock()
        blocked_s = queue.blocked.read()
        if blocked_s > self._max_blocked_s:
            num = len(queue.messages)
            why = f"it read none of {num} messages for {blocked_s:.0f} s"
            self._lose(peer, queue, why)

    def _lose(self, peer: bytes, queue: _Queue, why: str) -> None:
        queue.is_lost = True
        queue.messages.clear()
        queue.num_bytes = 0
        queue.blocked = None
        self._losses.append((peer, why))
        self._changed.set()

    async def _receive_all(
        self,
        on_message: Callable[[bytes, In], None],
        on_lost: Callable[[bytes, str], None] | None,
    ) -> None:
        while True:
            for _ in range(_BURST):
                received = self._try_receive()
                if received is None:
                    await self._arrival()
                    break
                peer, frames = received
                message = self._reader.read(frames, peer)
                if message is None:
                    continue
                try:
                    on_message(peer, message)
                except Exception as error:
                    _log.exception("a message from %r could not be handled", peer)
                    why = f"its message could not be handled: {describe(error)}"
                    _tell(on_lost, peer, why)
            else:
                await asyncio.sleep(0)  # others have their turn before the rest


def _tell(on_lost: Callable[[bytes, str], None] | None, peer: bytes, why: str) -> None:
    """Tell the owner of a loss; what goes wrong there must not end the others."""
    _log.warning("peer %r is lost: %s", peer, why)
    if on_lost is None:
        return
    try:
        on_lost(peer, why)
    except Exception:
        _log.exception("the loss of %r could not be handled", peer)
