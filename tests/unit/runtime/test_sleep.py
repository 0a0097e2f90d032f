"""All instances sleep or none, whatever dies, comes or refuses in between."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from aseer.errors import EngineError
from aseer.runtime.sleep import Sleep
from aseer.types import InstanceId
from tests.unit.runtime.machine import Owner, config_of, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.types import InstanceInfo
    from tests.unit.runtime.machine import Running

A, B = InstanceId(0), InstanceId(1)


class SleepyOwner(Owner):
    """Tells `Sleep` of what comes up, as the host does."""

    sleep: Sleep | None = None

    def instance_up(self, info: InstanceInfo) -> None:
        super().instance_up(info)
        if self.sleep is not None:
            self.sleep.instance_up(info.instance_id)


@asynccontextmanager
async def sleepy(monkeypatch, **settings) -> AsyncIterator[tuple[Running, Sleep]]:
    monkeypatch.setattr("tests.unit.runtime.machine.Owner", SleepyOwner)
    async with running(monkeypatch, config_of(**settings)) as run:
        assert isinstance(run.owner, SleepyOwner)
        run.owner.sleep = sleep = Sleep(run.pool)
        yield run, sleep


def asleep(run: Running) -> list[str]:
    """Living instances that sleep."""
    processes = run.machine.processes
    return sorted(
        identity
        for identity, process in processes.items()
        if process.backend.is_asleep and not process.has_ended
    )


async def test_all_sleep_and_all_wake(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        assert asleep(run) == ["0.1", "1.1"]
        await sleep.end(run.owner.infos)
        assert asleep(run) == []
        assert await run.run_to_its_end(1) == "length"
        assert run.owner.told == []


async def test_if_one_refuses_the_others_are_woken_and_its_words_are_told(
    monkeypatch,
) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        run.machine.fail("1.1", "sleep", RuntimeError("it cannot"))
        with pytest.raises(EngineError, match="it cannot"):
            await sleep.begin(run.owner.infos, 1)
        assert asleep(run) == []
        assert await run.run_to_its_end(1) == "length"


async def test_why_they_cannot_sleep_is_told_also_if_they_cannot_wake_then(
    monkeypatch,
) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        run.machine.fail("*", "sleep", RuntimeError("no sleep mode"))
        run.machine.fail("*", "wake", RuntimeError("it does not sleep"))
        with pytest.raises(EngineError, match="no sleep mode"):
            await sleep.begin(run.owner.infos, 1)


async def test_one_that_dies_meanwhile_needs_no_sleep_and_stays_down(
    monkeypatch,
) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        run.machine.hold("1.1", "sleep")
        falling = asyncio.get_running_loop().create_task(
            sleep.begin(run.owner.infos, 1)
        )
        await run.machine.until_asked("1.1", "sleep")
        run.process("1.1").kill()
        await falling
        assert asleep(run) == ["0.1"]
        await run.until(("down", 1))
        assert "1.2" not in run.machine.processes
        await sleep.end(run.owner.infos)
        await run.until(("up", 1))
        assert asleep(run) == []


async def test_all_may_die_asleep(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        for identity in ("0.1", "1.1"):
            run.process(identity).kill()
        await run.until(("down", 0), ("down", 1))
        await sleep.end(run.owner.infos)
        await run.until(("up", 0), ("up", 1))


async def test_one_that_was_starting_follows_the_others(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        go_on = run.machine.hold("1.2", "start")
        run.process("1.1").kill()
        await run.machine.until_asked("1.2", "start")
        await sleep.begin(run.owner.infos, 1)
        go_on.set()
        await run.machine.until(lambda: asleep(run) == ["0.1", "1.2"])
        await sleep.end(run.owner.infos)
        assert asleep(run) == []


async def test_one_that_followed_a_sleep_that_fails_is_woken_too(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        start, refuse = run.machine.hold("1.2", "start"), asyncio.Event()

        async def refuse_late() -> None:
            await refuse.wait()
            raise RuntimeError("it cannot")

        run.machine.scripts["0.1", "sleep"] = refuse_late
        run.process("1.1").kill()
        await run.machine.until_asked("1.2", "start")
        falling = asyncio.get_running_loop().create_task(
            sleep.begin(run.owner.infos, 1)
        )
        await run.machine.until_asked("0.1", "sleep")
        start.set()
        await run.machine.until(lambda: asleep(run) == ["1.2"])
        refuse.set()
        with pytest.raises(EngineError, match="it cannot"):
            await falling
        assert asleep(run) == []


async def test_one_that_cannot_follow_is_replaced_for_free(monkeypatch) -> None:
    async with sleepy(monkeypatch, max_restarts=1) as (run, sleep):
        go_on = run.machine.hold("1.2", "start")
        run.machine.fail("1.2", "sleep", RuntimeError("it cannot"))
        run.process("1.1").kill()  # which takes the only restart
        await run.machine.until_asked("1.2", "start")
        await sleep.begin(run.owner.infos, 1)
        go_on.set()
        await run.machine.until(lambda: run.owner.kinds().count(("down", 1)) == 2)
        await sleep.end(run.owner.infos)
        await run.machine.until(lambda: run.owner.kinds().count(("up", 1)) == 2)


async def test_one_that_cannot_wake_is_replaced_and_the_others_go_on(
    monkeypatch,
) -> None:
    async with sleepy(monkeypatch, max_restarts=0) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        run.machine.fail("1.1", "wake", RuntimeError("it cannot"))
        await sleep.end(run.owner.infos)
        await run.until(("down", 1), ("up", 1))
        assert "it does not do as the others do" in run.owner.whys()[0]
        assert asleep(run) == []


async def test_if_none_can_wake_that_is_an_error_and_all_are_replaced(
    monkeypatch,
) -> None:
    async with sleepy(monkeypatch, max_restarts=0) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        for identity in ("0.1", "1.1"):
            run.machine.fail(identity, "wake", RuntimeError("it cannot"))
        with pytest.raises(EngineError, match="it cannot"):
            await sleep.end(run.owner.infos)
        await run.until(("up", 0), ("up", 1))
        assert asleep(run) == []


async def test_a_sleep_that_is_given_up_leaves_all_awake(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        go_on = run.machine.hold("1.1", "sleep")
        falling = asyncio.get_running_loop().create_task(
            sleep.begin(run.owner.infos, 1)
        )
        await run.machine.until_asked("1.1", "sleep")
        falling.cancel()
        go_on.set()
        await asyncio.wait([falling])
        assert falling.cancelled()
        assert asleep(run) == []
        assert run.owner.told == []


async def test_a_wake_that_is_given_up_goes_on_and_replaces_who_cannot(
    monkeypatch,
) -> None:
    async with sleepy(monkeypatch, max_restarts=0) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        go_on = asyncio.Event()

        async def fail_late() -> None:
            await go_on.wait()
            raise RuntimeError("it cannot")

        run.machine.scripts["1.1", "wake"] = fail_late
        waking = asyncio.get_running_loop().create_task(sleep.end(run.owner.infos))
        await run.machine.until_asked("1.1", "wake")
        waking.cancel()
        await asyncio.wait([waking])
        go_on.set()
        await run.until(("down", 1), ("up", 1))
        assert asleep(run) == []


def sleeping(run: Running) -> dict[str, set[str]]:
    """What sleeps of each living instance."""
    return {
        identity: process.backend.sleeping
        for identity, process in run.machine.processes.items()
        if not process.has_ended
    }


async def test_weights_wake_alone_and_the_rest_later(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        await sleep.end(run.owner.infos, ("weights",))
        assert sleep.has_weights
        assert sleeping(run) == {"0.1": {"kv_cache"}, "1.1": {"kv_cache"}}
        await sleep.end(run.owner.infos, ("kv_cache",))
        assert not sleep.has_weights
        assert asleep(run) == []
        assert await run.run_to_its_end(1) == "length"


async def test_nothing_is_started_while_only_weights_are_awake(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        await sleep.end(run.owner.infos, ("weights",))
        run.process("1.1").kill()
        await run.until(("down", 1))
        assert "1.2" not in run.machine.processes
        await sleep.end(run.owner.infos)
        await run.until(("up", 1))
        assert asleep(run) == []


async def test_one_that_comes_up_has_what_the_others_have(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        go_on = run.machine.hold("1.2", "start")
        run.process("1.1").kill()
        await run.machine.until_asked("1.2", "start")
        await sleep.begin(run.owner.infos, 1)
        await sleep.end(run.owner.infos, ("weights",))
        go_on.set()
        await run.machine.until(lambda: sleeping(run).get("1.2") == {"kv_cache"})
        await sleep.end(run.owner.infos, ("kv_cache",))
        assert asleep(run) == []


async def test_if_no_weights_can_wake_instances_are_started_again(monkeypatch) -> None:
    async with sleepy(monkeypatch) as (run, sleep):
        await sleep.begin(run.owner.infos, 1)
        run.machine.fail("*", "wake", RuntimeError("no memory"))
        with pytest.raises(EngineError, match="no memory"):
            await sleep.end(run.owner.infos, ("weights",))
        assert not sleep.has_weights
        await run.until(("up", 0), ("up", 1))
