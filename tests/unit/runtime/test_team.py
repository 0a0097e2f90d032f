"""Instances that compute together start, work and end as one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from aseer.errors import InstanceStartError
from aseer.instance.messages import Run
from aseer.node.messages import Located
from aseer.node.remote import RemoteNode
from aseer.runtime.team import Team
from aseer.types import InstanceId
from aseer.weights.current import CurrentWeights
from tests.unit.node.test_fetching import JOIN
from tests.unit.runtime.machine import (
    Running,
    chunk_of,
    config_of,
    launches_of,
    machine_of,
    node_of,
    running,
)

if TYPE_CHECKING:
    from aseer.config import EngineConfig

A, B = InstanceId(0), InstanceId(1)


def team_of(num: int = 2, **settings: Any) -> EngineConfig:
    return config_of(data_parallel_size=2, num_instances=num, **settings)


def num_told(run: Running, what: tuple[Any, ...]) -> int:
    return [each[: len(what)] for each in run.owner.told].count(what)


async def until_up(run: Running, *instances: InstanceId, times: int = 1) -> None:
    await run.machine.until(
        lambda: all(num_told(run, ("up", i)) >= times for i in instances)
    )


@pytest.mark.parametrize("victim", ["0.1", "1.1"])
async def test_the_death_of_one_is_told_as_that_of_all_and_costs_one_restart(
    monkeypatch, victim
) -> None:
    async with running(monkeypatch, team_of(max_restarts=1)) as run:
        before = dict(run.machine.processes)
        run.pool.run_chunk(A, Run(chunk_of(1, max_tokens=10**6)))
        run.process(victim).kill()
        await until_up(run, A, B)
        first, *downs = [each for each in run.owner.told if each[0] != "up"]
        assert downs == []
        assert set(first[1:-1]) == {A, B}
        assert "SIGKILL" in first[-1]
        assert run.pool.is_idle
        assert all(process.has_ended for process in before.values())
        assert [run.pool.num_restarts(i) for i in (A, B)] == [1, 1]
        assert await run.run_to_its_end(2, A) == "length"
        assert await run.run_to_its_end(3, B) == "length"
        run.process("0.2").kill()
        await run.until(("exhausted",))
        assert "max_restarts=1 are used up" in run.owner.whys()[-1]
        assert {"0.3", "1.3"}.isdisjoint(run.machine.processes)


async def test_another_team_goes_on(monkeypatch) -> None:
    async with running(monkeypatch, team_of(4)) as run:
        run.process("3.1").kill()
        await until_up(run, InstanceId(2), InstanceId(3))
        assert run.owner.kinds()[0] == ("down", InstanceId(3))
        assert {"0.2", "1.2"}.isdisjoint(run.machine.processes)
        assert await run.run_to_its_end(1, A) == "length"


async def test_one_that_does_not_start_again_takes_its_partner_with_it(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of(max_restarts=2)) as run:
        run.machine.fail("0.2", "start", RuntimeError("not yet"))
        run.process("0.1").kill()
        await until_up(run, A, B)
        assert run.process("1.2").has_ended
        assert sorted(run.machine.processes)[-1] == "1.3"
        assert num_told(run, ("up",)) == 2, "none was up in between"
        assert [each[0] for each in run.owner.told].count("down") == 1


async def test_no_room_for_one_ends_the_other(monkeypatch) -> None:
    async with running(monkeypatch, team_of(max_restarts=2)) as run:
        run.machine.num_refused_starts = 1
        run.process("1.1").kill()
        await until_up(run, A, B)
        assert run.pool.num_restarts(A) == run.pool.num_restarts(B) == 2


async def test_one_that_cannot_start_ends_the_start_with_its_own_words(
    monkeypatch,
) -> None:
    async with machine_of(monkeypatch) as machine:
        machine.fail("1.1", "start", RuntimeError("no such model"))
        run = Running(machine, team_of())
        async with asyncio.TaskGroup() as tasks:
            talking = tasks.create_task(machine.router.run(run.pool.on_message))
            with pytest.raises(ExceptionGroup) as caught:
                await run.pool.start()
            await run.pool.stop(0)
            talking.cancel()
        (error, *_) = caught.value.exceptions
        assert isinstance(error, InstanceStartError)
        assert "cause: RuntimeError: no such model" in str(error)
        assert all(p.has_ended for p in machine.processes.values())


async def test_none_works_before_all_have_the_same_weights(monkeypatch) -> None:
    async with running(monkeypatch, team_of()) as run:
        run.pool.weights = CurrentWeights("new")
        go_on = run.machine.hold("1.2", "prepare_weights")
        run.process("0.1").kill()
        await run.machine.until_asked("1.2", "prepare_weights")
        first = run.process("0.2").backend
        await run.machine.until(lambda: first.weights == "new")
        await asyncio.sleep(0.05)
        assert num_told(run, ("up",)) == 0
        run.pool.weights = CurrentWeights("newer")
        await run.machine.until(lambda: first.weights == "newer")
        assert num_told(run, ("up",)) == 0
        go_on.set()
        await until_up(run, A, B)
        assert run.process("1.2").backend.weights == "newer"


async def test_one_that_is_replaced_costs_nothing_nor_do_its_partners(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of(max_restarts=0)) as run:
        for times in (1, 2):
            run.pool.replace(B, "for a test")
            await until_up(run, A, B, times=times)
        assert num_told(run, ("exhausted",)) == 0
        assert all("for a test" in why for why in run.owner.whys())


async def test_one_that_is_replaced_ends_its_partner_before_it_can_compute(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of()) as run:
        partner = run.process("0.1")
        killed: list[str] = []
        kill = partner.kill
        monkeypatch.setattr(partner, "kill", lambda: (killed.append("0.1"), kill()))
        run.pool.replace(B, "its weights are not those of the others")
        assert killed == ["0.1"], "in the same moment"
        await until_up(run, A, B)


async def test_both_that_are_replaced_at_once_are_started_once(monkeypatch) -> None:
    async with running(monkeypatch, team_of(max_restarts=0)) as run:
        run.pool.replace(A, "for a test")
        run.pool.replace(B, "for a test")
        await until_up(run, A, B)
        assert {"0.2", "1.2"} <= set(run.machine.processes)
        assert {"0.3", "1.3"}.isdisjoint(run.machine.processes)


async def test_while_one_is_given_up_the_other_waits_and_comes_back_with_it(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of(4, max_restarts=0)) as run:
        run.process("0.1").kill()
        await run.machine.until(lambda: run.owner.told)
        await asyncio.sleep(0.05)
        assert {"0.2", "1.2"}.isdisjoint(run.machine.processes)
        run.pool.forgive(1)
        await until_up(run, A, B)


async def test_a_death_in_the_moment_of_the_start_reaches_one_that_has_no_process(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of(max_restarts=3)) as run:
        machine, start = run.machine, run.machine.start
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def slow(*args: Any) -> Any:
            if b'"1.2"' in args[1]:
                entered.set()
                await go_on.wait()
            return await start(*args)

        monkeypatch.setattr("aseer.node.local.InstanceProcess.start", slow)
        machine.fail("0.2", "start", RuntimeError("not yet"))
        run.process("0.1").kill()
        await entered.wait()
        await machine.until_asked("0.2", "start")
        await asyncio.sleep(0.02)
        go_on.set()
        await until_up(run, A, B)
        assert machine.processes["1.2"].has_ended
        assert num_told(run, ("up",)) == 2


# On nodes


class FarNode(RemoteNode):
    """Another host; its processes are the same machine's."""

    def __init__(self, run: Running, name: str) -> None:
        super().__init__(structs.replace(JOIN, name=name), lambda data: None)
        here = node_of(run.machine.router)
        self.endpoint = here.endpoint
        self.start = here.start  # type: ignore[method-assign,assignment]
        self.send = here.send  # type: ignore[method-assign]
        self.forget = here.forget  # type: ignore[method-assign]
        self.supplies = ()

    async def locate(self) -> Located:
        if self.lost_because is not None:
            raise InstanceStartError(self.lost_because)
        return Located("10.0.0.1", port=1)

    async def reaches(self, other: RemoteNode) -> bool:
        return True


C, D = InstanceId(2), InstanceId(3)


def far_team(run: Running, *names: str) -> Team:
    launches = launches_of(team_of())
    members = [(FarNode(run, name), launches[0]) for name in names]
    return Team(members)


async def test_on_two_nodes_they_are_one_until_a_node_is_gone(monkeypatch) -> None:
    async with running(monkeypatch, team_of()) as run:
        team = far_team(run, "one", "two")
        attending = run.machine.tasks.create_task(run.pool.attend_team(team))
        await until_up(run, C, D)
        assert run.pool.is_up(team)
        assert [run.owner.infos[i].node for i in (C, D)] == ["one", "two"]
        run.process("3.1").kill()
        await until_up(run, C, D, times=2)
        assert run.process("2.1").has_ended
        run.owner.told.clear()
        team.nodes[1].lose("its node two is gone")
        run.process("3.2").kill()
        await attending
        assert sorted(run.owner.kinds()) == [("left", C), ("left", D)]
        assert run.process("2.2").has_ended
        assert {"2.3", "3.3"}.isdisjoint(run.machine.processes)
        assert run.pool.places == [A, B]


async def test_one_that_waits_for_a_node_that_is_lost_waits_no_more(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of(max_restarts=1)) as run:
        team = far_team(run, "one", "two")
        attending = run.machine.tasks.create_task(run.pool.attend_team(team))
        await until_up(run, C, D)
        monkeypatch.setattr("aseer.runtime.supervisor._RETRY_PAUSE_S", 10.0)
        run.machine.num_refused_starts = 1
        run.process("3.1").kill()
        await run.machine.until(lambda: run.machine.num_refused_starts == 0)
        team.nodes[1].lose("its node two is gone")
        monkeypatch.setattr("aseer.runtime.supervisor._RETRY_PAUSE_S", 0.0)
        async with asyncio.timeout(15):
            await attending
        assert run.pool.places == [A, B]


async def test_nodes_that_do_not_reach_each_other_are_told_and_left(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of()) as run:
        team = far_team(run, "one", "two")
        attending = run.machine.tasks.create_task(run.pool.attend_team(team))
        await until_up(run, C, D)

        async def reaches(other: RemoteNode) -> bool:
            return False

        team.nodes[0].reaches = reaches  # type: ignore[method-assign]
        run.process("2.1").kill()
        await attending
        assert sorted(run.owner.kinds()[-2:]) == [("left", C), ("left", D)]
        assert "one and two do not reach each other" in str(run.owner.told[-1])
        assert team.apart == (team.nodes[0], team.nodes[1])


async def test_a_team_that_does_not_start_is_told_to_whoever_wanted_it(
    monkeypatch,
) -> None:
    async with running(monkeypatch, team_of()) as run:
        run.machine.fail("3.1", "start", RuntimeError("no such model"))
        with pytest.raises(ExceptionGroup) as caught:
            await run.pool.attend_team(far_team(run, "one", "two"))
        assert "no such model" in str(caught.value.exceptions[0])
        assert all(run.process(each).has_ended for each in ("2.1", "3.1"))
        assert run.pool.places == [A, B]
