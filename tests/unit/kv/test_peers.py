"""What a server takes of another, whatever that one answers."""

from __future__ import annotations

import asyncio
import zlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aseer.kv.messages import Pull
from aseer.kv.peers import (
    PART_BYTES,
    Done,
    GetPart,
    Have,
    Part,
    Refused,
    Source,
    Want,
    pull,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SIZE = PART_BYTES + 10  # two parts
NUM = 4


class Memory:
    """A server's memory: pieces are known by their numbers."""

    def __init__(self, here: dict[int, bytes], *, has_room: bool = True) -> None:
        self.here = here
        self.has_room = has_room
        self.reserved: dict[int, bytearray] = {}
        self.lent: list[int] = []

    def layout(self, model: str, world_size: int) -> str | None:
        return f"{model} {world_size}" if model == "m" else None

    def keys(self, what: Any) -> list[int]:
        return list(range(NUM))

    def missing(self, keys: Any) -> list[int]:
        return [i for i, key in enumerate(keys) if key not in self.here]

    def lend(self, keys: Any) -> dict[int, memoryview]:
        self.lent += [key for key in keys if key in self.here]
        return {
            i: memoryview(self.here[k]) for i, k in enumerate(keys) if k in self.here
        }

    def take_back(self, keys: Any) -> None:
        for key in keys:
            self.lent.remove(key)

    def reserve(self, order: Pull, keys: Any) -> dict[int, memoryview]:
        if not self.has_room:
            return {}
        assert not self.reserved
        self.reserved = {key: bytearray(SIZE) for key in keys}
        return {i: memoryview(self.reserved[key]) for i, key in enumerate(keys)}

    def settle(self, order: Pull, here: Any, failed: Any) -> None:
        assert sorted([*here, *failed]) == sorted(self.reserved)
        self.here |= {key: bytes(self.reserved[key]) for key in here}
        self.reserved = {}


def piece(number: int) -> bytes:
    return bytes([number + 1]) * SIZE


class Router:
    """Carries messages to one target."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.on_message: Callable[[bytes, Any], None]
        self.forgotten: list[bytes] = []

    async def run(self, on_message: Any, on_lost: Any, on_gone: Any) -> None:
        self.on_message = on_message
        await asyncio.Event().wait()

    def send(self, peer: bytes, message: Any) -> None:
        self.sent.put_nowait(message)

    def forget(self, peer: bytes) -> None:
        self.forgotten.append(peer)


class Dealer:
    """A target's end; what is received may be changed on its way."""

    def __init__(self, router: Router, change: Callable[[Any], Any]) -> None:
        self.router = router
        self.change = change
        self.num_asked = 0

    async def send(self, message: Any) -> None:
        self.num_asked += isinstance(message, GetPart)
        self.router.on_message(b"t", message)

    async def receive(self) -> Any:
        message = self.change(await self.router.sent.get())
        if message is None:
            await asyncio.Event().wait()
        return message


class Pulls:
    """A source and a target."""

    def __init__(
        self, there: Memory, here: Memory, change: Callable[[Any], Any] = lambda m: m
    ) -> None:
        self.there, self.here = there, here
        self.router = Router()
        self.dealer = Dealer(self.router, change)

    async def run(self, model: str = "m", timeout_s: float = 1.0) -> Any:
        @asynccontextmanager
        async def connect(address: str) -> AsyncIterator[Any]:
            assert address == "tcp://there:1"
            yield self.dealer

        order = Pull(7, 0, "tcp://there:1", model, 1, "s", b"", timeout_s)
        fakes: Any = self.there, self.router
        here: Any = self.here
        async with asyncio.TaskGroup() as tasks:
            giving = tasks.create_task(Source(*fakes).run())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            done = await pull(here, order, connect, asyncio.Semaphore(1), 64)
            giving.cancel()
        assert done.pull == 7
        assert self.here.reserved == {}
        return done


async def test_what_is_missing_comes_up_to_the_first_piece_that_is_nowhere():
    there = Memory({0: piece(0), 1: piece(1), 3: piece(3)})
    pulls = Pulls(there, Memory({0: piece(0)}))
    done = await pulls.run()
    assert (done.num_tokens, done.num_bytes, done.error) == (64, SIZE, "")
    assert pulls.here.here == {0: piece(0), 1: piece(1)}
    assert pulls.dealer.num_asked == 2
    assert there.lent == []


async def test_a_source_is_given_a_moment_to_store_the_last_of_it():
    there = Memory({i: piece(i) for i in range(3)})
    pulls = Pulls(there, Memory({}))
    asyncio.get_running_loop().call_later(0.1, there.here.update, {3: piece(3)})
    done = await pulls.run()
    assert (done.num_tokens, done.error) == (4 * 64, "")


async def test_a_source_is_not_even_asked_for_what_is_here():
    pulls = Pulls(Memory({}), Memory({i: piece(i) for i in range(NUM)}))
    done = await pulls.run()
    assert (done.num_tokens, done.error, pulls.there.lent) == (0, "", [])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda part: Part(part.piece, part.offset, part.data, 1), "changed"),
        (lambda part: Part(part.piece, part.offset, b"x", zlib.crc32(b"x")), "changed"),
        (lambda part: Part(9, 0, part.data, part.checksum), "not asked for"),
        (lambda part: Have([]), "nonsense"),
        (lambda part: Refused("it ends"), "it ends"),
        (lambda part: None, "longer than 0.5 s"),
    ],
)
async def test_what_came_before_a_source_failed_is_kept_and_nothing_else(change, told):
    def late(message: Any) -> Any:
        is_late = isinstance(message, Part) and message.piece == 2
        return change(message) if is_late else message

    pulls = Pulls(Memory({i: piece(i) for i in range(NUM)}), Memory({}), late)
    done = await pulls.run(timeout_s=0.5)
    assert told in done.error
    assert done.num_tokens == 2 * 64
    assert pulls.here.here == {0: piece(0), 1: piece(1)}


@pytest.mark.parametrize(
    "sizes", [[], [1] * NUM, [SIZE + 1] * NUM, [SIZE] * (NUM + 1), [-1] * NUM]
)
async def test_a_source_that_says_nonsense_of_what_it_has_gives_nothing(sizes):
    def lie(message: Any) -> Any:
        return Have(sizes) if isinstance(message, Have) else message

    pulls = Pulls(Memory({i: piece(i) for i in range(NUM)}), Memory({}), lie)
    done = await pulls.run()
    assert done.error
    assert (done.num_tokens, pulls.here.here) == (0, {})


async def test_without_room_or_an_engine_nothing_is_taken():
    there = {i: piece(i) for i in range(NUM)}
    done = await Pulls(Memory(there), Memory({}, has_room=False)).run()
    assert "no room" in done.error
    assert "no engine" in (await Pulls(Memory(there), Memory({})).run("other")).error


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([GetPart(0, 0)], "no such piece"),
        ([Want("m", 1, "s", b"", "another")], "layout"),
        ([Want("m", 1, "s", b"", "m 1"), GetPart(0, SIZE)], "no such piece"),
        ([Want("m", 1, "s", b"", "m 1"), GetPart(0, -1)], "no such piece"),
        ([Want("m", 1, "s", b"", "m 1"), GetPart(9, 0)], "no such piece"),
        ([Want("m", 1, "s", b"", "m 1")] * 2, "at once"),
    ],
)
async def test_a_target_that_asks_for_nonsense_is_refused(asked, told):
    router = Router()
    there = Memory({i: piece(i) for i in range(NUM)})
    fakes: Any = there, router
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        giving = tasks.create_task(Source(*fakes).run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for message in asked:
            router.on_message(b"t", message)
            await asyncio.sleep(0.01)
        answers = []
        while not router.sent.empty():
            answers.append(router.sent.get_nowait())
        assert any(isinstance(a, Refused) and told in a.why for a in answers)
        router.on_message(b"t", Done())
        assert there.lent == []
        giving.cancel()
