"""Instances on nodes beside this machine: ids of their own, gone with their node."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from aseer.errors import InstanceLostError, InstanceStartError
from aseer.instance.messages import Run
from aseer.types import InstanceId
from tests.unit.runtime.machine import (
    chunk_of,
    config_of,
    launches_of,
    node_of,
    running,
)

if TYPE_CHECKING:
    from aseer.node.local import LocalNode
    from tests.unit.runtime.machine import Running

C, D = InstanceId(2), InstanceId(3)


def far_node(run: Running) -> LocalNode:
    """Another node; its processes are the same machine's."""
    node = node_of(run.machine.router)
    node.name = "far"
    return node


async def test_a_node_that_is_gone_takes_its_instances_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch) as run:
        node = far_node(run)
        attending = run.machine.tasks.create_task(
            run.pool.attend(node, launches_of(config_of()))
        )
        assert not run.pool.is_up(node)
        await run.until(("up", C), ("up", D))
        assert run.pool.is_up(node)
        assert [run.owner.infos[i].node for i in sorted(run.owner.infos)] == [
            *("", ""),
            *("far", "far"),
        ]
        assert await run.run_to_its_end(1, C) == "length"

        run.pool.run_chunk(C, Run(chunk_of(2, C, max_tokens=10**6)))
        node.lost_because = "its node far is gone: nothing was heard of it"
        for identity in ("2.1", "3.1"):
            run.process(identity).kill()
        await attending
        assert sorted(run.owner.kinds()[-2:]) == [("left", C), ("left", D)]
        assert "nothing was heard" in str(run.owner.told[-1])
        assert run.pool.is_idle
        with pytest.raises(InstanceLostError, match="instance 2 is down"):
            await run.pool.ask(C, "wake")
        run.pool.replace(C, "a weight update came too late")
        assert await run.run_to_its_end(3) == "length"
        assert "4.1" not in run.machine.processes, "nothing is started again there"


async def test_a_node_that_comes_again_has_instances_of_other_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch) as run:
        for identity, instance_id in (("2.1", C), ("3.1", D)):
            node = far_node(run)
            attending = run.machine.tasks.create_task(
                run.pool.attend(node, launches_of(config_of(num_instances=1)))
            )
            await run.until(("up", instance_id))
            node.lost_because = "gone"
            run.process(identity).kill()
            await attending


async def test_a_nodes_instance_that_dies_is_started_again_by_the_nodes_own_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch, config_of(max_restarts=1)) as run:
        node = far_node(run)
        attending = run.machine.tasks.create_task(
            run.pool.attend(node, launches_of(config_of(num_instances=1)))
        )
        await run.until(("up", C))
        run.process("0.1").kill()
        await run.until(("down", 0), ("up", 0))
        run.owner.told.clear()
        run.process("2.1").kill()
        await run.until(("down", C), ("up", C))
        assert run.pool.num_restarts(C) == 1
        attending.cancel()
        await asyncio.wait([attending])


async def test_an_instance_that_does_not_start_ends_those_of_its_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch) as run:
        run.machine.fail("3.1", "start", RuntimeError("no such model"))
        with pytest.raises(ExceptionGroup) as group:
            await run.pool.attend(far_node(run), launches_of(config_of()))
        (error,) = group.value.exceptions
        assert isinstance(error, InstanceStartError)
        assert "no such model" in str(error)
        assert all(run.process(i).has_ended for i in ("2.1", "3.1"))
        assert await run.run_to_its_end(1) == "length"


async def test_those_that_were_up_are_gone_for_the_rollout_if_a_sibling_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(monkeypatch) as run:
        fails = asyncio.Event()

        async def start() -> None:
            await fails.wait()
            raise RuntimeError("no memory left on its GPU")

        run.machine.scripts["3.1", "start"] = start

        async def attend() -> None:
            with suppress(BaseExceptionGroup):
                await run.pool.attend(far_node(run), launches_of(config_of()))

        attending = run.machine.tasks.create_task(attend())
        await run.until(("up", C))
        run.pool.run_chunk(C, Run(chunk_of(1, C, max_tokens=10**6)))
        run.machine.hold("2.1", "describe_weights")
        asked = run.pool.ask(C, "describe_weights")
        fails.set()
        await attending
        assert run.owner.kinds() == [("up", C), ("left", C)]
        assert "no memory left on its GPU" in str(run.owner.told[-1])
        assert run.pool.is_idle
        assert isinstance(asked.exception(), InstanceLostError)


@pytest.mark.parametrize("max_restarts", [0, 1])
async def test_a_nodes_instance_that_is_shot_while_it_starts_is_started_again(
    monkeypatch: pytest.MonkeyPatch, max_restarts: int
) -> None:
    monkeypatch.setattr("aseer.runtime.supervisor._RETRY_PAUSE_S", 0.0)
    config = config_of(num_instances=1, max_restarts=max_restarts)
    async with running(monkeypatch, config) as run:
        node = far_node(run)
        run.machine.hold("1.1", "start")

        async def attend() -> None:
            with suppress(BaseExceptionGroup):
                await run.pool.attend(node, launches_of(config))

        attending = run.machine.tasks.create_task(attend())
        await run.machine.until_asked("1.1", "start")
        run.process("1.1").kill()
        if max_restarts:
            await run.until(("up", InstanceId(1)))
            attending.cancel()
        await asyncio.wait([attending])
        assert ("1.2" in run.machine.processes) == bool(max_restarts)
