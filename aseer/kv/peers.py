"""KV that goes from one node's pool server to another's, when it is asked for.

    target's server                                source's server
      Want, the tokens of a request --------------->  keeps what it has of them
                               <----------------------  Have, how large each piece is
      GetPart, some at a time ---------------------->
                               <----------------------  Part, with its checksum
      Done ----------------------------------------->  keeps it no longer

One connection a pull (`aseer.transport.tcp`: encrypted, under the cluster's keys).
Whatever fails, and whatever is not here in time, is missing: the engine computes it.

Both servers make keys of the tokens themselves, each as it stores under. A piece is
what LMCache keeps under one key.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import zlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec

from aseer.errors import AseerError, describe
from aseer.kv.messages import Pulled
from aseer.transport.tcp import connect_tcp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from aseer.kv.messages import Pull
    from aseer.transport.base import Dealer, Router
    from aseer.transport.keys import Keys

    Connect = Callable[[str], AbstractAsyncContextManager[Dealer["FromSource"]]]

_log = logging.getLogger("aseer.kv")

# As much as is encrypted in a millisecond or two.
PART_BYTES = 1 << 20
# On their way at once: more than a round trip takes, on a fast network.
_MAX_ASKED = 16
MAX_QUEUED = 4 * _MAX_ASKED
# Of one server at once.
_MAX_LOANS = 64
# An engine says that a chunk has ended a little before the last of its KV is stored.
# It is looked for so often.
_LOOKS = 30
_LOOK_S = 0.01
# A target that takes nothing for so long has given up, or is cut off.
_LOAN_S = 5.0
_MAX_PIECES = 1 << 16


class Want(msgspec.Struct, tag="want", frozen=True):
    """Keep what there is of some KV, until `Done`.

    Attributes:
        layout: of the target's memory, in words; only the same is given.
    """

    model: str
    world_size: int
    salt: str
    tokens: bytes
    layout: str


class Have(msgspec.Struct, tag="have", frozen=True):
    """The bytes of each piece, in the tokens' order; 0 = it is not there."""

    sizes: Annotated[list[int], msgspec.Meta(max_length=_MAX_PIECES)]


class GetPart(msgspec.Struct, tag="get", frozen=True):
    """Ask for a part of a piece, by the piece's number."""

    piece: int
    offset: int


class Done(msgspec.Struct, tag="done", frozen=True):
    """Nothing more is asked for."""


class Part(msgspec.Struct, tag="part", frozen=True):
    """It, with its CRC-32."""

    piece: int
    offset: int
    data: bytes
    checksum: int


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Nothing is given."""

    why: str


FromSource = Have | Part | Refused
FROM_SOURCE: msgspec.msgpack.Decoder[FromSource] = msgspec.msgpack.Decoder(FromSource)
FromTarget = Want | GetPart | Done
FROM_TARGET: msgspec.msgpack.Decoder[FromTarget] = msgspec.msgpack.Decoder(FromTarget)


class PullFailed(AseerError):
    """A source does not give what it was asked for."""


class Store(Protocol):
    """The memory of a server, as far as it is needed here (`aseer.kv.lending`).

    A piece is known by its key, which is the server's own business.
    """

    def layout(self, model: str, world_size: int) -> str | None:
        """Of the memory of pieces, in words; None = no engine here has such KV."""
        ...

    def keys(self, what: Pull | Want) -> list[Any]:
        """Of all whole pieces of some tokens' KV, in their order."""
        ...

    def missing(self, keys: Sequence[Any]) -> list[int]:
        """Which of them, by their numbers, are not here."""
        ...

    def lend(self, keys: Sequence[Any]) -> dict[int, memoryview]:
        """The pieces that are here, by their numbers, kept as they are until
        `take_back`.
        """
        ...

    def take_back(self, keys: Sequence[Any]) -> None:
        """Pieces that were lent are read no more."""
        ...

    def reserve(self, order: Pull, keys: Sequence[Any]) -> dict[int, memoryview]:
        """Memory for pieces, by their numbers, which nobody sees yet; of none that is
        here by now, and empty if there is no room.
        """
        ...

    def settle(self, order: Pull, here: Sequence[Any], failed: Sequence[Any]) -> None:
        """Of what was reserved, pieces that are here now, and those that are not."""
        ...


@dataclass(slots=True)
class _Loan:
    keys: list[Any]
    pieces: dict[int, memoryview]
    at_s: float


class Source:
    """Gives a server's KV to the servers of other nodes."""

    def __init__(self, store: Store, router: Router[FromTarget]) -> None:
        self._store = store
        self._router = router
        self._loans: dict[bytes, _Loan] = {}
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Give to whoever asks, until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(
                self._router.run(self._on_message, self._on_lost, self._on_gone)
            )
            self._tasks.create_task(self._expire())

    def _on_message(self, peer: bytes, message: FromTarget) -> None:
        if isinstance(message, GetPart):
            self._give(peer, message)
        elif isinstance(message, Done):
            self._on_lost(peer, "")
        elif peer in self._loans or len(self._loans) >= _MAX_LOANS:
            self._router.send(peer, Refused("too much is asked for at once"))
        else:
            loan = self._loans[peer] = _Loan([], {}, time.monotonic())
            self._tasks.create_task(self._lend(peer, loan, message))

    async def _lend(self, peer: bytes, loan: _Loan, want: Want) -> None:
        """Tell what there is, once the last of it had time to be stored."""
        answer: Have | Refused
        try:
            if want.layout != self._store.layout(want.model, want.world_size):
                raise PullFailed("it has no such KV, or of another layout")
            loan.keys = self._store.keys(want)
            for _ in range(_LOOKS):
                if not self._store.missing(loan.keys):
                    break
                await asyncio.sleep(_LOOK_S)
            if self._loans.get(peer) is not loan:
                return
            loan.pieces = pieces = self._store.lend(loan.keys)
            numbers = range(len(loan.keys))
            answer = Have([len(pieces[i]) if i in pieces else 0 for i in numbers])
        except Exception as error:  # of this target alone
            answer = Refused(describe(error))
        self._router.send(peer, answer)

    def _give(self, peer: bytes, asked: GetPart) -> None:
        loan = self._loans.get(peer)
        memory = None if loan is None else loan.pieces.get(asked.piece)
        if loan is None or memory is None or not 0 <= asked.offset < len(memory):
            self._router.send(peer, Refused("it has no such piece"))
            return
        loan.at_s = time.monotonic()
        data = bytes(memory[asked.offset : asked.offset + PART_BYTES])
        part = Part(asked.piece, asked.offset, data, zlib.crc32(data))
        self._router.send(peer, part)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_LOAN_S / 5)
            old_s = time.monotonic() - _LOAN_S
            for peer in [p for p, loan in self._loans.items() if loan.at_s < old_s]:
                self._on_lost(peer, "")

    def _on_lost(self, peer: bytes, why: str) -> None:
        del why
        self._on_gone(peer)
        self._router.forget(peer)

    def _on_gone(self, peer: bytes) -> None:
        loan = self._loans.pop(peer, None)
        if loan is not None:
            self._store.take_back([loan.keys[i] for i in loan.pieces])


class _Taking:
    """The pieces of one pull, on their way into memory."""

    def __init__(self, keys: list[Any], memories: dict[int, memoryview]) -> None:
        self._keys = keys
        self._memories = memories
        self._left = {i: len(memory) for i, memory in memories.items()}
        self._to_ask = deque(
            GetPart(i, offset)
            for i, memory in memories.items()
            for offset in range(0, len(memory), PART_BYTES)
        )
        self._asked: set[tuple[int, int]] = set()

    @property
    def is_over(self) -> bool:
        return not (self._to_ask or self._asked)

    def to_ask(self) -> list[GetPart]:
        """What is to be asked for now."""
        num = min(_MAX_ASKED - len(self._asked), len(self._to_ask))
        parts = [self._to_ask.popleft() for _ in range(num)]
        self._asked.update((part.piece, part.offset) for part in parts)
        return parts

    def take(self, part: Part) -> None:
        """Write a part.

        Raises:
            PullFailed: it is none that was asked for, or not as it was sent.
        """
        place = part.piece, part.offset
        if place not in self._asked:
            raise PullFailed("it gives what it was not asked for")
        memory = self._memories[part.piece]
        size = min(PART_BYTES, len(memory) - part.offset)
        if len(part.data) != size or zlib.crc32(part.data) != part.checksum:
            raise PullFailed("what it gives has changed on its way")
        memory[part.offset : part.offset + size] = part.data
        self._asked.remove(place)
        self._left[part.piece] -= size

    def here(self) -> list[int]:
        """Pieces that are complete."""
        return [i for i, left in self._left.items() if not left]

    def sorted_out(self) -> tuple[list[Any], list[Any]]:
        """Keys of the complete pieces, and of the others."""
        here = set(self.here())
        return (
            [self._keys[i] for i in self._memories if i in here],
            [self._keys[i] for i in self._memories if i not in here],
        )


async def pull(
    store: Store,
    order: Pull,
    connect: Connect,
    turns: asyncio.Semaphore,
    tokens_each: int,
) -> Pulled:
    """Take from another server what is missing here of some KV; how that went.

    Args:
        connect: makes a connection to the source's address.
        turns: of the pulls of this server.
        tokens_each: of a piece.
    """
    began_s = time.monotonic()
    sizes: list[int] = []
    here: list[int] = []
    error = ""
    try:
        async with asyncio.timeout(order.timeout_s), turns:
            keys = store.keys(order)
            missing = store.missing(keys)
            if missing:
                await _pull(store, order, connect, keys, missing, here, sizes)
    except TimeoutError:
        error = f"it took longer than {order.timeout_s:g} s"
    except Exception as failure:  # of this pull alone
        error = str(failure) if isinstance(failure, AseerError) else describe(failure)
    num_bytes = sum(sizes[i] for i in here)
    num_tokens = len(here) * tokens_each // order.world_size
    return Pulled(order.pull, num_tokens, num_bytes, time.monotonic() - began_s, error)


async def _pull(
    store: Store,
    order: Pull,
    connect: Connect,
    keys: list[Any],
    missing: list[int],
    here: list[int],
    sizes: list[int],
) -> None:
    """Take the pieces that are missing, up to the first that is nowhere.

    Args:
        here: gets the pieces that came, also if the rest does not.
        sizes: get what the source has.
    Raises:
        AseerError, OSError: the source gives no more.
    """
    layout = store.layout(order.model, order.world_size)
    if layout is None:
        raise PullFailed("no engine here has such KV")
    async with connect(order.source) as dealer:
        await dealer.send(
            Want(order.model, order.world_size, order.salt, order.tokens, layout)
        )
        have = await dealer.receive()
        if not isinstance(have, Have) or len(have.sizes) != len(keys):
            raise PullFailed(_why(have))
        sizes += have.sizes
        end = next((i for i in missing if not sizes[i]), len(keys))
        wanted = [i for i in missing if i < end]
        found = store.reserve(order, [keys[i] for i in wanted])
        if wanted and not found:
            raise PullFailed("there is no room here")
        memories = {wanted[k]: memory for k, memory in found.items()}
        taking = _Taking(keys, memories)
        try:
            if any(len(memory) != sizes[i] for i, memory in memories.items()):
                raise PullFailed("its pieces have another size")
            while not taking.is_over:
                for part in taking.to_ask():
                    await dealer.send(part)
                message = await dealer.receive()
                if not isinstance(message, Part):
                    raise PullFailed(_why(message))
                taking.take(message)
            await dealer.send(Done())
        finally:
            store.settle(order, *taking.sorted_out())
            here += taking.here()


def _why(message: FromSource) -> str:
    return message.why if isinstance(message, Refused) else "it answers nonsense"


def connect_to(
    keys: Keys, address: str
) -> AbstractAsyncContextManager[Dealer[FromSource]]:
    """A connection to a source."""
    name = b"k" + secrets.token_bytes(8)
    return connect_tcp(address, name, FROM_SOURCE, keys, max_queued=MAX_QUEUED)
