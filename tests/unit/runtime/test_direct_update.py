"""A direct update: the calls at all instances, and what follows where one fails."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import WeightUpdateError
from aseer.runtime.direct_update import DirectUpdate
from aseer.runtime.weights import Plan, WeightKeeper
from aseer.types import InstanceId
from aseer.weights.checks import ModelSpec
from aseer.weights.current import CurrentWeights, TrainersWeights
from tests.unit.runtime.machine import Exited, config_of, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.unit.runtime.machine import Running

A, B = InstanceId(0), InstanceId(1)
STEPS = ("look", "init", "start", "update", "finish", "compare")
HAS_CHANGED = {"start", "update", "finish", "compare"}


class Sending:
    """A keeper on a pool, and updates that go straight to its instances."""

    def __init__(self, run: Running, directory: Path) -> None:
        self.run = run
        self.keeper = WeightKeeper(directory)
        self._directory = directory

    async def send(self, checksum: int = 1, *, begins: bool = True) -> DirectUpdate:
        """All steps of an update, in their order."""
        pool = self.run.pool
        members = {*self.run.owner.infos, *pool.in_need_of_weights}
        update = DirectUpdate(pool, members, "ipc")
        plan = self.plan()
        try:
            await update.look()
            await update.init({"rank_offset": 1})
            if begins:
                await update.start()
                for part in (0, checksum):
                    told = {"names": ["w"], "tensor_sizes": [4], "checksum": part}
                    await update.update(told)
                await update.finish()
                await update.compare()
        except WeightUpdateError as error:
            update.fail(str(error))
            raise WeightUpdateError(
                f"{error}; {self.keeper.failed(plan, pool)}"
            ) from error
        if begins:
            self.keeper.settle(plan, pool, update)
        return update

    def plan(self) -> Plan:
        version = self.keeper.version + 1
        directory = self._directory / str(version)
        directory.mkdir(exist_ok=True)
        claim: Any = SimpleNamespace()
        return Plan(version, directory, ModelSpec({}, dtype="F32"), claim)

    def weights(self) -> dict[str, str]:
        return {
            identity: process.backend.weights
            for identity, process in sorted(self.run.machine.processes.items())
            if not process.has_ended
        }


@asynccontextmanager
async def sending(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **settings: Any
) -> AsyncIterator[Sending]:
    config = config_of(**settings)
    args = {"weight_transfer_config": {"backend": "ipc"}}
    async with running(monkeypatch, config, **args) as run:
        yield Sending(run, tmp_path)


async def test_every_step_is_taken_by_all_in_its_order(monkeypatch, tmp_path) -> None:
    async with sending(monkeypatch, tmp_path) as up:
        update = await up.send()
        assert (update.num_tensors, update.num_bytes) == (2, 8)
        for i in ("0.1", "1.1"):
            asked = [what for identity, what in up.run.machine.asked if identity == i]
            order = ["look", "init", "start", "update", "update", "finish", "compare"]
            assert asked[1:] == order
        ranks = [
            dict(up.run.process(i).backend.told)["init"]["rank_offset"]
            for i in ("0.1", "1.1")
        ]
        assert ranks == [1, 2]
        assert up.keeper.version == 1
        assert up.weights() == {"0.1": "sent-1", "1.1": "sent-1"}
        assert list(tmp_path.iterdir()) == []
        assert isinstance(up.run.pool.weights.whole, TrainersWeights)


@pytest.mark.parametrize("error", [RuntimeError("it fails"), Exited()], ids=repr)
@pytest.mark.parametrize("step", STEPS)
async def test_one_that_fails_at_any_step_leaves_all_with_what_they_had(
    monkeypatch, tmp_path, step: str, error: BaseException
) -> None:
    async with sending(monkeypatch, tmp_path, max_restarts=1) as up:
        up.run.pool.weights = CurrentWeights("/old/index")
        up.keeper.version = 3
        up.run.machine.fail("1.1", step, error)
        with pytest.raises(
            WeightUpdateError, match=rf"instance 1.*'{step}'.*stays at 3"
        ):
            await up.send()
        has_changed = step in HAS_CHANGED
        if has_changed:
            await up.run.until(("down", 0), ("down", 1), ("up", 0), ("up", 1))
        elif isinstance(error, Exited):
            await up.run.until(("down", 1), ("up", 1))
        else:
            assert up.run.owner.told == []
        back = {"0.2": "/old/index", "1.2": "/old/index"}
        assert up.weights().items() >= (back.items() if has_changed else set())
        assert up.keeper.version == 3
        assert list(tmp_path.iterdir()) == []


async def test_weights_that_differ_among_engines_are_taken_from_none(
    monkeypatch, tmp_path
) -> None:
    async with sending(monkeypatch, tmp_path) as up:

        def differ() -> None:
            up.run.process("1.1").backend._weights = 9 << 32

        up.run.machine.scripts["1.1", "compare"] = differ
        with pytest.raises(WeightUpdateError, match="differ from one another"):
            await up.send()
        await up.run.until(("down", 0), ("down", 1), ("up", 0), ("up", 1))


async def test_one_that_dies_later_waits_and_takes_part_in_the_next(
    monkeypatch, tmp_path
) -> None:
    async with sending(monkeypatch, tmp_path, start_timeout_s=0.2) as up:
        await up.send(1)
        up.run.process("1.1").kill()
        await up.run.machine.until(lambda: up.run.pool.in_need_of_weights == [B])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):  # longer than a start may take
                await up.run.until(("up", 1))
        await up.send(2)
        await up.run.until(("up", 1))
        assert up.weights() == {"0.1": "sent-2", "1.2": "sent-2"}
        assert up.run.owner.kinds() == [("down", 1), ("up", 1)]


async def test_when_all_have_died_that_is_told_and_files_bring_them_back(
    monkeypatch, tmp_path
) -> None:
    async with sending(monkeypatch, tmp_path) as up:
        await up.send(1)
        for identity in ("0.1", "1.1"):
            up.run.process(identity).kill()
        await up.run.until(("in need",))
        pool = up.run.pool
        await up.run.machine.until(lambda: pool.in_need_of_weights == [A, B])
        pool.weights = CurrentWeights("/new/index")
        await up.run.until(("up", 0), ("up", 1))
        assert up.weights() == {"0.2": "/new/index", "1.2": "/new/index"}


async def test_adapters_stand_on_what_came_straight(monkeypatch, tmp_path) -> None:
    async with sending(monkeypatch, tmp_path) as up:
        await up.send(1)
        pool = up.run.pool
        whole = pool.weights.whole
        pool.weights = pool.weights.after("/adapters", is_adapters=True)
        up.run.process("1.1").kill()
        await up.run.machine.until(lambda: pool.in_need_of_weights == [B])
        pool.weights = pool.weights.after("/others", is_adapters=True)
        assert pool.weights == CurrentWeights(whole, "/others")
        await up.run.machine.until(lambda: pool.in_need_of_weights == [B])
        assert pool.weights.paths == {"/others"}
        assert CurrentWeights(whole).way_to(pool.weights) == ["/others"]
        assert CurrentWeights("/files").way_to(CurrentWeights(whole)) is None
        pool.weights = pool.weights.after("/files", is_adapters=False)
        await up.run.until(("up", 1))
        assert up.weights()["1.2"] == "/files"


async def test_one_that_came_up_meanwhile_is_started_again(
    monkeypatch, tmp_path
) -> None:
    async with sending(monkeypatch, tmp_path) as up:
        start = up.run.machine.hold("1.2", "start")
        up.run.process("1.1").kill()
        await up.run.machine.until_asked("1.2", "start")
        finish = up.run.machine.hold("0.1", "finish")
        sent = asyncio.get_running_loop().create_task(up.send(1))
        await up.run.machine.until_asked("0.1", "finish")
        start.set()
        await up.run.until(("up", 1))
        finish.set()
        await sent
        await up.run.machine.until(lambda: up.run.pool.in_need_of_weights == [B])
        assert up.weights() == {"0.1": "sent-1", "1.3": ""}


async def test_one_that_waits_for_weights_and_answers_nothing_ends_the_update(
    monkeypatch, tmp_path
) -> None:
    async with sending(monkeypatch, tmp_path, start_timeout_s=0.5) as up:
        await up.send(1)
        up.run.process("1.1").kill()
        await up.run.machine.until(lambda: up.run.pool.in_need_of_weights == [B])
        up.run.machine.hold("1.2", "update")
        async with asyncio.timeout(20):
            with pytest.raises(WeightUpdateError, match="a question unanswered"):
                await up.send(2)


async def test_engines_for_another_transfer_are_refused(monkeypatch, tmp_path) -> None:
    async with sending(monkeypatch, tmp_path) as up:
        update = DirectUpdate(up.run.pool, [A, B], "nccl")
        with pytest.raises(WeightUpdateError, match=r"'ipc'.*needs 'nccl'"):
            await update.look()
        assert await up.send(begins=False) is not None
        assert up.run.owner.told == []


async def test_an_update_that_is_over_changes_nothing_more(
    monkeypatch, tmp_path
) -> None:
    async with sending(monkeypatch, tmp_path) as up:
        update = DirectUpdate(up.run.pool, [A, B], "ipc")
        update.fail("nobody wants it")
        with pytest.raises(WeightUpdateError, match="is over"):
            await update.start()
        assert up.run.owner.told == []
