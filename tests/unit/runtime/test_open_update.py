"""An update that other processes send to ends once: by its caller, or by the clock."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from aseer.errors import WeightUpdateError
from aseer.runtime import open_update
from aseer.runtime.open_update import OpenUpdates
from aseer.runtime.weights import Plan
from aseer.weights.checks import ModelSpec


class Keeper:
    def __init__(self) -> None:
        self.abandoned: list[Plan] = []

    def abandon(self, plan: Plan) -> None:
        self.abandoned.append(plan)


def plan_at(path, version=2) -> Plan:
    directory = path / f"{version}"
    directory.mkdir()
    return Plan(version, directory, ModelSpec({}, "F32"), SimpleNamespace())  # type: ignore[arg-type]


async def test_it_is_taken_once_and_by_its_own_target(tmp_path):
    updates = OpenUpdates(keeper := Keeper())
    plan = plan_at(tmp_path)
    target = updates.begin(plan, 60.0)
    assert (target.version, target.directory) == (2, str(plan.directory))
    other = SimpleNamespace(version=3, directory="/elsewhere")
    with pytest.raises(WeightUpdateError, match="version 3 is not one of this engine"):
        updates.take(other, "was finished already")
    assert updates.take(target, "was finished already") == (plan, None)
    with pytest.raises(WeightUpdateError, match="version 2 was finished already"):
        updates.take(target, "was abandoned")
    assert keeper.abandoned == []


async def test_the_clock_ends_it_and_says_so_to_whoever_comes_later(
    tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(
        open_update, "WakingClock", lambda _: SimpleNamespace(read=lambda: now[0])
    )
    monkeypatch.setattr(open_update, "_TICK_S", 0.0)
    updates = OpenUpdates(keeper := Keeper())
    plan = plan_at(tmp_path)
    target = updates.begin(plan, 60.0)
    for now[0] in (0.0, 59.9):
        for _ in range(5):
            await asyncio.sleep(0)
        assert keeper.abandoned == []
    now[0] = 60.0
    for _ in range(5):
        await asyncio.sleep(0)
    assert keeper.abandoned == [plan]
    with pytest.raises(WeightUpdateError, match=r"abandoned 60 s after begin_update"):
        updates.take(target, "was finished already")


async def test_one_that_was_taken_is_not_ended_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        open_update, "WakingClock", lambda _: SimpleNamespace(read=lambda: now[0])
    )
    monkeypatch.setattr(open_update, "_TICK_S", 0.0)
    updates = OpenUpdates(keeper := Keeper())
    updates.take(updates.begin(plan_at(tmp_path), 60.0), "was finished already")
    now[0] = 100.0
    for _ in range(5):
        await asyncio.sleep(0)
    assert keeper.abandoned == []
