"""What a slot makes of answers, asked for or not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aseer.core.columns import columns_of
from aseer.errors import EngineError, InstanceLostError
from aseer.instance.messages import AbortChunks, Answer, Report
from aseer.node.machine import Launch
from aseer.runtime.restarts import RestartBudget
from aseer.runtime.slot import Slot
from aseer.types import ChunkId, InstanceLoad
from aseer.watch import WakingClock
from tests.unit.builders import report_of


@pytest.fixture
def slot() -> Slot:
    launch = Launch(
        instance_id=0, backend="sim", engine_args={}, env={}, share="a test"
    )
    node: Any = SimpleNamespace(said=[])
    node.send = lambda peer, message: node.said.append(message)
    return Slot(launch, node, RestartBudget(0), WakingClock())


def said(slot: Slot) -> list[str]:
    """What its process was told: chunks, and which of them are to end."""
    node: Any = slot.node
    return [
        f"end {message.chunk_ids}"
        if isinstance(message, AbortChunks)
        else f"run {message.chunk.chunk_id}"
        for message in node.said
    ]


def run(number: int) -> Any:
    return SimpleNamespace(chunk=SimpleNamespace(chunk_id=ChunkId(number)))


async def test_a_chunk_that_is_held_goes_once_what_it_waits_for_is_over(
    slot: Slot,
) -> None:
    waits = [asyncio.get_running_loop().create_future() for _ in range(2)]
    for number, until in enumerate(waits):
        slot.hold(run(number), until)
    await asyncio.sleep(0)
    assert said(slot) == []
    waits[1].set_result(None)
    await asyncio.sleep(0)
    assert said(slot) == ["run 1"]
    waits[0].set_result(None)
    await asyncio.sleep(0)
    assert said(slot) == ["run 1", "run 0"]


async def test_a_chunk_that_is_held_is_known_before_it_is_to_end(slot: Slot) -> None:
    until = asyncio.get_running_loop().create_future()
    slot.hold(run(3), until)
    slot.abort([ChunkId(2), ChunkId(3)])
    until.set_result(None)
    await asyncio.sleep(0)
    assert said(slot) == ["run 3", "end [2, 3]"]


async def test_what_is_held_for_a_process_that_is_gone_is_sent_to_nobody(
    slot: Slot,
) -> None:
    until = asyncio.get_running_loop().create_future()
    slot.hold(run(3), until)
    slot.is_gone("it died")
    slot.begin_incarnation()
    until.set_result(None)
    await asyncio.sleep(0)
    assert said(slot) == []


async def test_an_answer_that_nobody_waits_for_changes_nothing(slot: Slot) -> None:
    asked = slot.asked[1] = asyncio.get_running_loop().create_future()
    slot.take_answer(Answer(7, "to what?"))
    assert not asked.done()
    slot.take_answer(Answer(1, "first"))
    slot.take_answer(Answer(1, error="second"))
    assert await asked == "first"


async def test_an_error_is_the_askers(slot: Slot) -> None:
    asked = slot.asked[1] = asyncio.get_running_loop().create_future()
    slot.take_answer(Answer(1, error="no"))
    with pytest.raises(EngineError, match="no"):
        await asked


async def test_what_was_asked_fails_with_its_instance_and_once(slot: Slot) -> None:
    loop = asyncio.get_running_loop()
    waiting, done = loop.create_future(), loop.create_future()
    done.set_result("before")
    slot.asked = {1: waiting, 2: done}
    slot.is_gone("it was killed")
    slot.fail_asked("twice")
    slot.take_answer(Answer(1, "too late"))
    with pytest.raises(InstanceLostError, match="it was killed"):
        await waiting
    assert await done == "before"
    assert slot.asked == {}


async def test_an_answer_to_who_gave_up_is_nobodys(slot: Slot) -> None:
    asked = slot.asked[1] = asyncio.get_running_loop().create_future()
    asked.cancel()
    slot.take_answer(Answer(1, error="no"))
    assert asked.cancelled()


def test_a_new_process_knows_nothing_of_the_one_before(slot: Slot) -> None:
    slot.begin_incarnation()
    slot.failure, slot.killed_because = "broken", "a test"
    slot.running.add(ChunkId(1))
    slot.up.set()
    slot.said_hello.set()
    slot.is_unreachable()
    slot.begin_incarnation()
    assert slot.identity == b"0.2"
    assert (slot.failure, slot.killed_because) == (None, None)
    assert slot.unreachable_since is None
    assert slot.running == set()
    assert (slot.up.is_set(), slot.said_hello.is_set()) == (False, False)


def test_only_a_chunk_that_ends_well_shows_that_engines_work(slot: Slot) -> None:
    slot.running |= {ChunkId(i) for i in range(5)}
    reasons = ["stop", "length", "aborted", "error", None]
    worked = []
    for chunk_id, reason in enumerate(reasons):
        report = Report(
            columns_of([report_of(chunk_id, [1], end=reason)]), InstanceLoad()
        )
        worked.append(slot.count(report))
    assert worked == [True, True, False, False, False]
    assert slot.running == {4}


def test_killing_a_place_without_a_process_does_nothing(slot: Slot) -> None:
    slot.kill("a test")
    assert slot.killed_because is None


async def test_a_kill_between_two_processes_is_of_neither(slot: Slot) -> None:
    killed: list[str] = []
    slot.process = cast("Any", SimpleNamespace(kill=lambda: killed.append("the old")))
    slot.begin_incarnation()
    slot.kill("it comes too late")
    assert not killed
    assert not slot.killed.is_set()
    assert slot.killed_because is None
