"""The transport in memory keeps the contract, and makes the faults it is told to."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from aseer.instance.messages import FROM_INSTANCE, TO_INSTANCE, AbortChunks
from aseer.transport import base
from aseer.transport.base import Reader
from aseer.transport.memory import Faults, MemoryRouter, Wire
from tests.unit.transport.contract import MAX_QUEUED, Contract, Heard, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.instance.messages import FromInstance, ToInstance
    from aseer.transport.memory import MemoryDealer


class MemoryEnds:
    """See `Ends`."""

    def __init__(self) -> None:
        self.router: MemoryRouter[FromInstance] = MemoryRouter(
            FROM_INSTANCE, max_queued=MAX_QUEUED
        )

    @asynccontextmanager
    async def connect(self, identity: bytes) -> AsyncIterator[MemoryDealer[ToInstance]]:
        with self.router.connect(identity, TO_INSTANCE) as dealer:
            yield dealer

    async def send_frames(
        self, dealer: MemoryDealer[ToInstance], frames: list[bytes]
    ) -> None:
        await dealer.send_frames(frames)

    async def send_to(
        self, identity: bytes, dealer: MemoryDealer[ToInstance], frames: list[bytes]
    ) -> None:
        dealer.down.carry(frames)


class TestMemory(Contract):
    @pytest.fixture
    def ends(self) -> MemoryEnds:
        return MemoryEnds()


async def test_a_peer_that_stays_blocked_is_lost() -> None:
    router: MemoryRouter[FromInstance] = MemoryRouter(
        FROM_INSTANCE, capacity=1, max_blocked_s=0.0
    )
    heard = Heard()
    with router.connect(b"a", TO_INSTANCE):
        async with running(router, heard):
            for i in range(3):
                router.send(b"a", AbortChunks([i]))
            await heard.until(lost=1)
    assert "it read none of 2 messages for" in heard.lost[0][1]


async def test_bytes_are_bounded_as_well_as_messages() -> None:
    router: MemoryRouter[FromInstance] = MemoryRouter(
        FROM_INSTANCE, capacity=1, max_queued_bytes=10_000
    )
    heard = Heard()
    with router.connect(b"a", TO_INSTANCE):
        async with running(router, heard):
            for _ in range(30):
                router.send(b"a", AbortChunks([2**32] * 100))
            await heard.until(lost=1)
    assert "it does not read: 11 messages" in heard.lost[0][1]


def test_the_log_does_not_grow_with_what_is_dropped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(base, "time", SimpleNamespace(monotonic=lambda: now))
    reader = Reader(FROM_INSTANCE)
    for num_lines in (1, 2):
        for _ in range(1000):
            assert reader.read([b"\xc1"], b"a") is None
        assert len(caplog.records) == num_lines
        now += 60.0
    assert "(and 999 more since" in caplog.text


def carried(num: int, faults: Faults) -> list[int]:
    came: list[int] = []
    wire = Wire(lambda frames: came.append(int(frames[0])))
    wire.faults = faults
    for i in range(num):
        wire.carry([b"%d" % i])
    wire.settle()
    return came


def test_faults_are_as_chosen_and_the_same_again() -> None:
    assert carried(100, Faults(random.Random(1))) == list(range(100))
    dropped = carried(1000, Faults(random.Random(1), drop=0.2))
    assert dropped == sorted(set(dropped))
    assert 700 < len(dropped) < 900
    repeated = carried(1000, Faults(random.Random(1), repeat=0.2))
    assert repeated == sorted(repeated)
    assert 1100 < len(repeated) < 1300
    delayed = carried(1000, Faults(random.Random(1), delay=0.2, max_delay=3))
    assert sorted(delayed) == list(range(1000))
    assert max(i - delayed.index(i) for i in range(1000)) > 0
    late = [delayed.index(i) - i for i in range(1000)]
    assert 0 < max(late) <= 3
    assert delayed == carried(1000, Faults(random.Random(1), delay=0.2, max_delay=3))


def test_two_ends_in_memory_need_no_event_loop_to_be_made() -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    router: MemoryRouter[FromInstance] = MemoryRouter(FROM_INSTANCE)
    with router.connect(b"a", TO_INSTANCE) as a:
        assert a.num_unread == 0
