"""Weights change on all instances or none, whoever dies or comes in between."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aseer.errors import EngineError, WeightUpdateError
from aseer.runtime.activity import Activity, Call
from aseer.runtime.claims import Claims
from aseer.runtime.weights import MAX_VERSION, WeightKeeper, weights_dir_of
from aseer.types import InstanceId
from aseer.weights.current import CurrentWeights
from aseer.weights.files import INDEX
from tests.unit.runtime.machine import Exited, Owner, config_of, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aseer.runtime.weights import Plan, SwitchTimes
    from aseer.types import InstanceInfo
    from tests.unit.runtime.machine import Running

A, B = InstanceId(0), InstanceId(1)


class KeepersOwner(Owner):
    """Tells the keeper of what comes and goes, as the host does."""

    keeper: WeightKeeper | None = None

    def instance_up(self, info: InstanceInfo) -> None:
        if self.keeper is not None:
            self.keeper.instance_up(info.instance_id)
        super().instance_up(info)

    def instance_down(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId] = ()
    ) -> None:
        super().instance_down(instance_id, why, partners)
        if self.keeper is not None:
            for each in (instance_id, *partners):
                self.keeper.instance_down(each, why)


class Updates:
    """A keeper on a pool, with the claims of an engine."""

    def __init__(self, run: Running, directory: Path) -> None:
        self.run = run
        self.keeper = WeightKeeper(directory)
        self.claims = Claims()
        assert isinstance(run.owner, KeepersOwner)
        run.owner.keeper = self.keeper

    async def begin(self, version: int | None = None) -> Plan:
        claim = await self.claims.take(Call.UPDATE)
        assert claim is not None
        try:
            infos = self.run.owner.infos
            return await self.keeper.begin(self.run.pool, infos, version, claim)
        except BaseException:
            claim.release()
            raise

    async def switch(self, plan: Plan) -> SwitchTimes:
        try:
            return await self.keeper.switch(plan, self.run.pool, self.run.owner.infos)
        finally:
            plan.claim.release()

    def weights(self) -> dict[str, str]:
        """What living instances have; the name of the update's folder."""
        return {
            identity: Path(process.backend.weights).parent.name
            for identity, process in sorted(self.run.machine.processes.items())
            if not process.has_ended
        }


@asynccontextmanager
async def updates(monkeypatch, tmp_path, **settings) -> AsyncIterator[Updates]:
    monkeypatch.setattr("tests.unit.runtime.machine.Owner", KeepersOwner)
    async with running(monkeypatch, config_of(**settings)) as run:
        yield Updates(run, tmp_path)


async def test_all_have_the_new_weights_and_the_old_ones_go(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        for version in (1, 2):
            plan = await up.begin()
            assert plan.version == version
            assert list(plan.model.tensors) == ["w"]
            times = await up.switch(plan)
            assert min(times) >= 0
            assert up.keeper.version == version
            name = f"{version}-{version}"
            assert up.weights() == {"0.1": name, "1.1": name}
            assert [each.name for each in tmp_path.iterdir()] == [name]
        assert up.claims.activity is Activity.IDLE
        assert up.run.pool.weights == CurrentWeights(str(plan.directory / INDEX))


@pytest.mark.parametrize(
    ("version", "why"),
    [
        (0, "does not follow"),
        (-1, "does not follow"),
        (True, "not an int"),
        ("2", "not an int"),
        (MAX_VERSION + 1, "not allowed"),
    ],
)
async def test_a_version_must_be_a_later_one(
    monkeypatch, tmp_path, version, why
) -> None:
    async with updates(monkeypatch, tmp_path, num_instances=1) as up:
        with pytest.raises(WeightUpdateError, match=why):
            await up.begin(version)
        assert up.claims.activity is Activity.IDLE
        await up.switch(await up.begin(MAX_VERSION))
        assert up.keeper.version == MAX_VERSION


async def test_an_update_that_is_only_begun_can_be_given_up(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path, num_instances=1) as up:
        plan = await up.begin()
        up.keeper.abandon(plan)
        up.keeper.abandon(plan)
        assert list(tmp_path.iterdir()) == []
        assert up.claims.activity is Activity.IDLE
        again = await up.begin()
        assert (again.version, plan.version) == (1, 1)
        assert again.directory != plan.directory


async def test_without_an_instance_there_is_no_update(monkeypatch, tmp_path) -> None:
    async with updates(monkeypatch, tmp_path, max_restarts=0) as up:
        for identity in ("0.1", "1.1"):
            up.run.process(identity).kill()
        await up.run.until(("exhausted",))
        with pytest.raises(EngineError, match="no instance is up"):
            await up.begin()


async def test_if_one_dies_before_it_says_what_it_takes_another_says_it(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        up.run.machine.fail("0.1", "describe_weights", Exited())
        plan = await up.begin()
        assert list(plan.model.tensors) == ["w"]
        await up.switch(plan)


async def test_if_one_refuses_all_keep_what_they_had(monkeypatch, tmp_path) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        await up.switch(await up.begin())
        up.run.machine.fail("1.1", "prepare_weights", RuntimeError("no such file"))
        plan = await up.begin()
        with pytest.raises(WeightUpdateError, match=r"no such file.*stays at 1"):
            await up.switch(plan)
        assert up.weights() == {"0.1": "1-1", "1.1": "1-1"}
        assert up.keeper.version == 1
        assert not plan.directory.exists()
        await up.run.machine.until_asked("0.1", "discard_weights")
        assert up.run.owner.told == []


async def test_one_that_dies_while_it_prepares_comes_back_with_the_new_weights(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        up.run.machine.fail("1.1", "prepare_weights", Exited())
        await up.switch(await up.begin())
        await up.run.until(("up", 1))
        assert up.weights() == {"0.1": "1-1", "1.2": "1-1"}


async def test_one_that_cannot_switch_is_replaced_for_free(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path, max_restarts=0) as up:
        up.run.machine.fail("1.1", "commit_weights", RuntimeError("broken"))
        await up.switch(await up.begin())
        await up.run.until(("down", 1), ("up", 1))
        assert up.weights() == {"0.1": "1-1", "1.2": "1-1"}


async def test_if_none_can_switch_all_come_back_with_the_old_weights(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path, max_restarts=0) as up:
        await up.switch(await up.begin())
        for identity in ("0.1", "1.1"):
            up.run.machine.fail(identity, "commit_weights", RuntimeError("broken"))
        plan = await up.begin()
        with pytest.raises(WeightUpdateError, match="broken"):
            await up.switch(plan)
        await up.run.until(("up", 0), ("up", 1))
        assert up.weights() == {"0.2": "1-1", "1.2": "1-1"}
        assert not plan.directory.exists()
        assert up.keeper.version == 1


async def test_if_all_die_while_they_prepare_the_update_fails(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        for identity in ("0.1", "1.1"):
            up.run.machine.fail(identity, "prepare_weights", Exited())
        with pytest.raises(WeightUpdateError, match="was lost"):
            await up.switch(await up.begin())
        await up.run.until(("up", 0), ("up", 1))
        assert set(up.weights().values()) == {""}


async def test_one_that_comes_up_while_others_prepare_takes_part(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        machine = up.run.machine
        start = machine.hold("1.2", "start")
        prepare = machine.hold("0.1", "prepare_weights")
        up.run.process("1.1").kill()
        await machine.until_asked("1.2", "start")
        plan = await up.begin()
        switching = asyncio.get_running_loop().create_task(up.switch(plan))
        await machine.until_asked("0.1", "prepare_weights")
        start.set()
        await machine.until_asked("1.2", "prepare_weights")
        assert not switching.done()
        prepare.set()
        await switching
        assert up.weights() == {"0.1": "1-1", "1.2": "1-1"}


async def test_one_that_comes_up_while_others_switch_has_the_new_weights(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        machine = up.run.machine
        start = machine.hold("1.2", "start")
        commit = machine.hold("0.1", "commit_weights")
        up.run.process("1.1").kill()
        await machine.until_asked("1.2", "start")
        plan = await up.begin()
        switching = asyncio.get_running_loop().create_task(up.switch(plan))
        await machine.until_asked("0.1", "commit_weights")
        start.set()
        await up.run.until(("up", 1))
        assert up.weights()["1.2"] == "1-1"
        commit.set()
        await switching
        assert up.weights() == {"0.1": "1-1", "1.2": "1-1"}
        assert up.keeper.version == 1


async def test_one_that_joins_after_others_failed_to_switch_decides_for_the_new(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        machine = up.run.machine
        start, commit = machine.hold("1.2", "start"), asyncio.Event()

        async def fail_late() -> None:
            await commit.wait()
            raise RuntimeError("broken")

        machine.scripts["0.1", "commit_weights"] = fail_late
        up.run.process("1.1").kill()
        await machine.until_asked("1.2", "start")
        plan = await up.begin()
        switching = asyncio.get_running_loop().create_task(up.switch(plan))
        await machine.until_asked("0.1", "commit_weights")
        start.set()
        await up.run.until(("up", 1))
        commit.set()
        await switching
        await up.run.until(("down", 0), ("up", 0))
        assert up.weights() == {"0.2": "1-1", "1.2": "1-1"}


async def test_whoever_waits_for_instances_that_answer_no_more_is_told(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path) as up:
        up.run.machine.hold("1.1", "prepare_weights")
        plan = await up.begin()
        switching = asyncio.get_running_loop().create_task(up.switch(plan))
        await up.run.machine.until_asked("1.1", "prepare_weights")
        up.keeper.give_up("the engine was closed")
        with pytest.raises(WeightUpdateError, match="the engine was closed"):
            await switching
        assert up.claims.activity is Activity.IDLE
        assert not plan.directory.exists()
        up.keeper.give_up("nobody waits any more")


async def test_an_error_in_an_updates_decisions_fails_the_update_alone(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path, max_restarts=0) as up:

        def fail(*answer: object) -> None:
            raise KeyError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr("aseer.weights.update.WeightUpdate.committed", fail)
            with pytest.raises(WeightUpdateError, match="KeyError"):
                await up.switch(await up.begin())
        await up.run.until(("down", 0), ("down", 1), ("up", 0), ("up", 1))
        assert set(up.weights().values()) == {""}
        await up.switch(await up.begin())
        assert set(up.weights().values()) == {"1-2"}


async def test_the_weights_folder_is_where_it_is_told_or_in_shared_memory(
    monkeypatch, tmp_path
) -> None:
    run_dir = Path("/tmp/aseer-x")
    config = config_of(weights_dir=str(tmp_path))
    assert weights_dir_of(config, run_dir) == tmp_path / "aseer-x"
    monkeypatch.setattr("aseer.node.cleanup.SHARED_MEMORY", tmp_path)
    assert weights_dir_of(config_of(), run_dir) == tmp_path / "aseer-x"
    monkeypatch.setattr("aseer.node.cleanup.SHARED_MEMORY", tmp_path / "none")
    assert weights_dir_of(config_of(), run_dir) == run_dir / "weights"


async def test_a_place_that_cannot_be_made_is_said(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    async with updates(monkeypatch, tmp_path / "file", num_instances=1) as up:
        with pytest.raises(WeightUpdateError, match=r"no place for .*weights_dir"):
            await up.begin()
        assert up.claims.activity is Activity.IDLE


async def test_the_file_of_the_weights_before_is_written_again_if_there_is_room(
    monkeypatch, tmp_path
) -> None:
    async with updates(monkeypatch, tmp_path, num_instances=1) as up:
        numbers = []
        for content in (b"one", b"two", b"three", b"four"):
            plan = await up.begin()
            data = plan.directory / "data"
            assert data.exists() is (content in (b"three", b"four"))
            with data.open("r+b" if data.exists() else "wb") as file:
                file.write(content)
            numbers.append(data.stat().st_ino)
            await up.switch(plan)
            assert data.read_bytes()[: len(content)] == content
        assert numbers[2:] == numbers[:2]
        assert len(set(numbers)) == 2

        monkeypatch.setattr("aseer.runtime.weights.free_memory_bytes", lambda: 2)
        await up.switch(await up.begin())
        assert [path.name for path in tmp_path.iterdir()] == ["5-5"]
