"""What every transport must do; each kind's test file has a subclass of `Contract`."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from aseer.errors import ProtocolError
from aseer.instance.messages import (
    AbortChunks,
    Answer,
    FromInstance,
    ToInstance,
)
from aseer.transport import base

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from aseer.transport.base import Dealer, Router

MANY = 1000
MAX_QUEUED = 5000  # of the routers in these tests
# More than a peer's queue and all that a transport keeps on the way, the system's own
# buffers among it.
TOO_MANY = MAX_QUEUED + 5000
LARGE = [1 << 40] * 2000
GARBAGE = {
    "no frame": [],
    "an empty frame": [b""],
    "no MessagePack": [b"\xc1"],
    "another message": [b"\x81\xa4type\xa4nope"],
    "half a message": [b"\x83\xa4type\xa6answer\xa6ask_id"],
    "bad UTF-8": [b"\x83\xa4type\xa6answer\xa6ask_id\x01\xa5value\xa2\xff\xff"],
    "a deep nest": [b"\x83\xa4type\xa6answer\xa6ask_id\x01\xa5value" + b"\x91" * 10**5],
    "a false length": [
        b"\x83\xa4type\xa6answer\xa6ask_id\x01\xa5value\xdd" + b"\xff" * 4
    ],
    "two frames": [b"\x80", b"\x80"],
}


class Ends(Protocol):
    """A transport whose two ends a test holds."""

    router: Router[FromInstance]

    def connect(
        self, identity: bytes
    ) -> AbstractAsyncContextManager[Dealer[ToInstance]]:
        """A peer."""
        ...

    async def send_frames(self, dealer: Any, frames: list[bytes]) -> None:
        """Send what need not be a message from a peer."""
        ...

    async def send_to(self, identity: bytes, dealer: Any, frames: list[bytes]) -> None:
        """Send what need not be a message to a peer."""
        ...


class Heard:
    """What a router's owner heard, and a way to wait for it."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, FromInstance]] = []
        self.lost: list[tuple[bytes, str]] = []
        self._changed = asyncio.Event()

    def on_message(self, peer: bytes, message: FromInstance) -> None:
        self.messages.append((peer, message))
        self._changed.set()

    def on_lost(self, peer: bytes, why: str) -> None:
        self.lost.append((peer, why))
        self._changed.set()

    async def until(self, *, messages: int = 0, lost: int = 0) -> None:
        while len(self.messages) < messages or len(self.lost) < lost:
            self._changed.clear()
            await self._changed.wait()

    def ids_from(self, peer: bytes) -> list[int]:
        return [m.ask_id for p, m in self.messages if p == peer]  # type: ignore[union-attr]


@asynccontextmanager
async def running(router: Router[FromInstance], heard: Heard) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(router.run(heard.on_message, heard.on_lost))
        yield
        assert not task.done()
        task.cancel()


async def received(dealer: Dealer[ToInstance]) -> int:
    message = await dealer.receive()
    assert isinstance(message, AbortChunks)
    return message.chunk_ids[0]


class Contract:
    """The tests; `ends` is the subclass's fixture."""

    async def test_all_arrives_in_order_in_both_directions(self, ends: Ends) -> None:
        heard = Heard()
        async with (
            running(ends.router, heard),
            ends.connect(b"a") as a,
            ends.connect(b"b") as b,
        ):
            for dealer in (a, b):
                await dealer.send(Answer(-1))
            await heard.until(messages=2)
            for i in range(MANY):
                for peer in (b"a", b"b"):
                    ends.router.send(peer, AbortChunks([i]))
            for i in range(MANY):
                for dealer in (a, b):
                    await dealer.send(Answer(i))
                    assert await received(dealer) == i
            await heard.until(messages=2 * MANY + 2)
        assert heard.ids_from(b"a") == heard.ids_from(b"b") == [-1, *range(MANY)]
        assert heard.lost == []

    async def test_what_comes_while_an_answer_leaves_is_heard(self, ends: Ends) -> None:
        heard = Heard()

        def answer(peer: bytes, message: FromInstance) -> None:
            heard.on_message(peer, message)
            ends.router.send(peer, AbortChunks([heard.ids_from(peer)[-1]]))

        async with (
            ends.connect(b"a") as a,
            ends.connect(b"b") as b,
            asyncio.TaskGroup() as tasks,
        ):
            task = tasks.create_task(ends.router.run(answer))
            for i in range(MANY // 4):  # each waits for the last answer
                for dealer in (a, b):
                    await dealer.send(Answer(i))
                assert [await received(a), await received(b)] == [i, i]
            task.cancel()

    async def test_a_peer_that_reads_nothing_costs_only_itself(
        self, ends: Ends
    ) -> None:
        heard = Heard()
        async with (
            running(ends.router, heard),
            ends.connect(b"slow") as slow,
            ends.connect(b"quick") as quick,
        ):
            for dealer in (slow, quick):
                await dealer.send(Answer(-1))
            await heard.until(messages=2)
            for i in range(TOO_MANY):
                ends.router.send(b"slow", AbortChunks([i, *LARGE]))
                if i % 1000 == 0:
                    ends.router.send(b"quick", AbortChunks([i]))
                    assert await received(quick) == i
            await heard.until(lost=1)
            ends.router.send(b"slow", AbortChunks([-1]))  # it is dropped
            ends.router.send(b"quick", AbortChunks([-2]))
            assert await received(quick) == -2
            read = [await received(slow)]
            ends.router.forget(b"slow")
            ends.router.send(b"slow", AbortChunks([-3]))
            while read[-1] >= 0:
                read.append(await received(slow))
        assert [peer for peer, _ in heard.lost] == [b"slow"]
        assert "it does not read" in heard.lost[0][1]
        assert read == [*range(len(read) - 1), -3], "in order, with no hole before"

    async def test_what_is_no_message_is_logged_and_dropped(
        self, ends: Ends, caplog: pytest.LogCaptureFixture
    ) -> None:
        heard = Heard()
        async with running(ends.router, heard), ends.connect(b"a") as a:
            for i in range(3):
                for frames in GARBAGE.values():
                    await ends.send_frames(a, frames)
                await a.send(Answer(i))
            await heard.until(messages=3)
            for frames in GARBAGE.values():
                await ends.send_to(b"a", a, frames)
            ends.router.send(b"a", AbortChunks([7]))
            assert await received(a) == 7
        assert heard.ids_from(b"a") == [0, 1, 2]
        assert heard.lost == []
        told = [r for r in caplog.records if "dropped a message from" in r.getMessage()]
        assert len(told) == 2, "one line each end, however many there are"

    async def test_what_a_handler_raises_is_its_peers_loss(self, ends: Ends) -> None:
        heard = Heard()

        def on_message(peer: bytes, message: FromInstance) -> None:
            heard.on_message(peer, message)
            if peer == b"odd":
                raise KeyError("no such question")

        def on_lost(peer: bytes, why: str) -> None:
            heard.on_lost(peer, why)
            raise ZeroDivisionError

        async with (
            asyncio.TaskGroup() as tasks,
            ends.connect(b"odd") as odd,
            ends.connect(b"even") as even,
        ):
            task = tasks.create_task(ends.router.run(on_message, on_lost))
            await odd.send(Answer(1))
            await heard.until(lost=1)
            await even.send(Answer(2))
            await heard.until(messages=2)
            task.cancel()
        ((peer, why),) = heard.lost
        assert (peer, why.endswith("KeyError: 'no such question'")) == (b"odd", True)

    async def test_what_is_sent_to_nobody_is_dropped(self, ends: Ends) -> None:
        heard = Heard()
        async with running(ends.router, heard), ends.connect(b"a") as a:
            for i in range(100):
                ends.router.send(b"nobody", AbortChunks([i]))
            await a.send(Answer(1))
            await heard.until(messages=1)
            ends.router.send(b"a", AbortChunks([1]))
            assert await received(a) == 1
        assert heard.lost == []

    async def test_whose_messages_are_lost_for_want_of_a_connection_is_told(
        self, ends: Ends
    ) -> None:
        heard, gone = Heard(), asyncio.Queue[bytes]()
        async with asyncio.TaskGroup() as tasks, ends.connect(b"a") as a:
            running = tasks.create_task(
                ends.router.run(heard.on_message, heard.on_lost, gone.put_nowait)
            )
            await a.send(Answer(1))
            await heard.until(messages=1)
            ends.router.send(b"nobody", AbortChunks([1]))
            assert await gone.get() == b"nobody"
            ends.router.send(b"a", AbortChunks([1]))
            assert await received(a) == 1
            assert gone.empty()
            running.cancel()

    async def test_what_is_too_large_is_refused(
        self,
        ends: Ends,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(base, "MAX_MESSAGE_BYTES", 1000)
        heard = Heard()
        async with (
            running(ends.router, heard),
            ends.connect(b"a") as a,
            ends.connect(b"b") as b,
        ):
            with pytest.raises(ProtocolError, match=r"Answer of .* is too large"):
                await a.send(Answer(1, "x" * 1000))
            await ends.send_frames(a, [bytes(1001)])
            await a.send(Answer(2))
            await b.send(Answer(3))
            await heard.until(messages=2)
            ends.router.send(b"a", AbortChunks([2**32] * 1000))
            ends.router.send(b"b", AbortChunks([3]))
            assert await received(b) == 3
            await heard.until(lost=1)
        assert heard.ids_from(b"a") == [2]
        assert heard.lost[0][0] == b"a"
        assert "its 1001 bytes are more than 1000" in caplog.text

    async def test_a_peer_waits_while_nobody_reads(self, ends: Ends) -> None:
        heard = Heard()
        async with ends.connect(b"a") as a, asyncio.TaskGroup() as tasks:
            sent: list[int] = []

            async def send_all() -> None:
                for i in range(4 * MANY):
                    await a.send(Answer(i, "x" * 1000))
                    sent.append(i)

            sending = tasks.create_task(send_all())
            await asyncio.wait([sending], timeout=0.2)
            assert 0 < len(sent) < 4 * MANY
            async with running(ends.router, heard):
                await heard.until(messages=4 * MANY)
        assert heard.ids_from(b"a") == list(range(4 * MANY))
