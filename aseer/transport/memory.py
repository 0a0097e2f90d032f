"""A transport within one event loop, whose faults are chosen and repeatable.

For tests of what talks over a transport, without processes and sockets. Messages are
encoded and decoded as on a socket. Faults come from a seeded generator and are counted
in messages, not seconds, so that a failing run can be run again.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from aseer.transport.base import (
    MAX_BLOCKED_S,
    MAX_QUEUED,
    MAX_QUEUED_BYTES,
    QueueingRouter,
    Reader,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from aseer.transport.base import Message, Received, Sent

In = TypeVar("In")
T = TypeVar("T")

# As many as two ZeroMQ sockets keep between them.
CAPACITY = 2000


class Faults:
    """What happens to messages on their way; each probability is of one message.

    Args:
        drop: it is lost. repeat: it comes twice.
        delay: it, or its repetition, comes after up to `max_delay` later messages of
            its direction; it overtakes none of those that are not delayed.
    """

    def __init__(
        self,
        rng: Random,
        *,
        drop: float = 0.0,
        repeat: float = 0.0,
        delay: float = 0.0,
        max_delay: int = 4,
    ) -> None:
        self._rng = rng
        self._drop = drop
        self._repeat = repeat
        self._delay = delay
        self._max_delay = max_delay

    def delays(self) -> list[int]:
        """For each copy of the next message, how many later ones come before it."""
        rng = self._rng
        if rng.random() < self._drop:
            return []
        num_copies = 1 + (rng.random() < self._repeat)
        return [
            rng.randint(1, self._max_delay) if rng.random() < self._delay else 0
            for _ in range(num_copies)
        ]


class Wire:
    """One direction between two ends: `deliver` gets what survives, some of it late."""

    def __init__(self, deliver: Callable[[list[bytes]], None]) -> None:
        self._deliver = deliver
        self._num_carried = 0
        self._order = itertools.count()
        self._held: list[tuple[int, int, list[bytes]]] = []
        self.faults: Faults | None = None

    def carry(self, frames: list[bytes]) -> None:
        """Send a message on its way."""
        for delay in self.faults.delays() if self.faults else [0]:
            at = self._num_carried + delay
            heapq.heappush(self._held, (at, next(self._order), frames))
        self._num_carried += 1
        self._release(self._num_carried)

    def settle(self) -> None:
        """Deliver what is still delayed."""
        self._release(self._num_carried + 2**31)

    def _release(self, until: int) -> None:
        while self._held and self._held[0][0] < until:
            self._deliver(heapq.heappop(self._held)[2])


class MemoryRouter(QueueingRouter[In]):
    """A `Router`; what `connect` makes are its peers."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[In],
        *,
        capacity: int = CAPACITY,
        max_queued: int = MAX_QUEUED,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        max_blocked_s: float = MAX_BLOCKED_S,
    ) -> None:
        """Start with no peers.

        Args:
            capacity: messages that one end has not read before the other must wait.
            max_queued, max_queued_bytes, max_blocked_s: see `QueueingRouter`.
        """
        super().__init__(
            decoder,
            max_queued=max_queued,
            max_queued_bytes=max_queued_bytes,
            max_blocked_s=max_blocked_s,
        )
        self._capacity = capacity
        self._dealers: dict[bytes, MemoryDealer[Any]] = {}
        self._inbox: deque[list[bytes]] = deque()
        self._has_arrived = asyncio.Event()
        self._has_room = asyncio.Event()

    @contextmanager
    def connect(
        self, identity: bytes, decoder: msgspec.msgpack.Decoder[T]
    ) -> Iterator[MemoryDealer[T]]:
        """A `Dealer` of this router; it is gone at the end."""
        dealer = MemoryDealer(self, identity, decoder)
        self._dealers[identity] = dealer
        try:
            yield dealer
        finally:
            del self._dealers[identity]

    async def take(self, frames: list[bytes]) -> None:
        """Frames from a peer, its identity first; waits while too many are unread."""
        while len(self._inbox) >= self._capacity:
            self._has_room.clear()
            await self._has_room.wait()
        self._dealers[frames[0]].up.carry(frames)

    def deliver(self, frames: list[bytes]) -> None:
        """They have come through the wire."""
        self._inbox.append(frames)
        self._has_arrived.set()

    def _try_send(self, peer: bytes, data: bytes) -> Sent:
        dealer = self._dealers.get(peer)
        if dealer is None:
            return "gone"
        if dealer.num_unread >= self._capacity:
            return "full"
        dealer.down.carry([data])
        return "sent"

    def _try_receive(self) -> Received | None:
        if not self._inbox:
            return None
        self._has_room.set()
        peer, *frames = self._inbox.popleft()
        return peer, frames

    async def _arrival(self) -> None:
        self._has_arrived.clear()
        await self._has_arrived.wait()


class MemoryDealer(Generic[In]):
    """A `Dealer`; the two directions of its wire, `up` and `down`, take faults."""

    def __init__(
        self,
        router: MemoryRouter[Any],
        identity: bytes,
        decoder: msgspec.msgpack.Decoder[In],
    ) -> None:
        self._router = router
        self._identity = identity
        self._reader = Reader(decoder)
        self._encoder = msgspec.msgpack.Encoder()
        self._inbox: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.up = Wire(router.deliver)
        self.down = Wire(self._inbox.put_nowait)

    @property
    def num_unread(self) -> int:
        return self._inbox.qsize()

    async def send(self, message: Message) -> None:
        """See `Dealer`."""
        await self.send_frames([encode(self._encoder, message)])

    async def send_frames(self, frames: list[bytes]) -> None:
        """Send what need not be a message."""
        await self._router.take([self._identity, *frames])

    async def receive(self) -> In:
        """See `Dealer`."""
        while True:
            message = self._reader.read(await self._inbox.get(), b"the controller")
            if message is not None:
                return message
            await asyncio.sleep(0)
