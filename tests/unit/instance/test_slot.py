"""What a slot makes of answers, asked for or not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aseer.errors import EngineError
from aseer.instance.launch import Launch
from aseer.instance.messages import Answer
from aseer.instance.slot import Slot
from aseer.watch import WakingClock


@pytest.fixture
def slot() -> Slot:
    launch = Launch(
        instance_id=0, backend="sim", engine_args={}, env={}, share="a test"
    )
    return Slot(launch, Path(), WakingClock())


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
