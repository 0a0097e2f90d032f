"""Weights straight from a trainer: all have them or none, whatever fails and where.

Engines are simulated, and what carries the weights is a stand-in that tells engines the
tensors' checksum; the calls, their order and what follows from a failure are real.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import zlib
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.weights import direct
from aseer.weights.carriers import told_of
from tests.integration.sim_weights import SHAPES, roll, weights
from tests.integration.sims import config_of, content, groups_of
from tests.waiting import until

if TYPE_CHECKING:
    from aseer.weights.carriers import Engines
    from aseer.weights.held import HeldTensors

torch = pytest.importorskip("torch")


class Carrier:
    """Tells engines what the weights come to, in two parts."""

    num_open = 0

    def __init__(self, tensors: HeldTensors) -> None:
        type(self).num_open += 1

    def get_ready(self, engines: Engines | None) -> None:
        assert engines is not None
        assert [peer.num_workers for peer in engines.look()] == [1, 1]
        engines.init({"rank_offset": 1}).result()

    def send(self, engines: Engines | None, tensors: HeldTensors) -> None:
        assert engines is not None
        checksum = 0
        for (name, values), told in zip(tensors.pairs(), tensors.sent, strict=True):
            checksum = zlib.crc32(values.numpy().tobytes(), checksum)
            assert told[0] == name
            engines.update({**told_of([told]), "checksum": checksum}).result()

    def close(self) -> None:
        type(self).num_open -= 1


@pytest.fixture(autouse=True)
def carrier(monkeypatch: pytest.MonkeyPatch) -> Any:
    for way in ("ipc", "nccl"):
        stand_in = direct.Way(Carrier, f"fake-{way}", "cpu")
        monkeypatch.setitem(direct.WAYS, way, stand_in)
    yield
    assert Carrier.num_open == 0


def sims(fault: Any = None, backend: str | None = "fake-ipc", **settings: Any) -> Any:
    args = {"weights": SHAPES, "weights_fault": fault}
    if backend is not None:
        args["weight_transfer_config"] = {"backend": backend}
    return config_of(engine_args=args, **settings)


async def test_what_comes_straight_is_what_comes_through_memory() -> None:
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0), transfer="host")
        one = await roll(engine)
        report = await engine.update_weights(weights(2.0), transfer="ipc", verify=True)
        assert (report.version, report.num_tensors, report.num_bytes) == (2, 2, 68)
        assert min(report.send_s, report.prepare_s, report.switch_s) >= 0
        two = await roll(engine)
        assert two != one
        assert not list(engine._host.folders.weights.iterdir())
        await engine.update_weights(weights(1.0))  # "auto": as engines were started
        assert not list(engine._host.folders.weights.iterdir())
        assert await roll(engine) == one
        await engine.update_weights(iter(weights(2.0).items()))  # not all at hand
        assert await roll(engine) == two


@pytest.mark.parametrize("fault", [("update", "die"), ("finish", "refuse")])
async def test_an_engine_that_fails_half_way_leaves_all_with_the_old_weights(
    fault: tuple[str, str],
) -> None:
    async with aseer.Engine(sims(["1.1", *fault])) as engine:
        await engine.update_weights(weights(1.0), transfer="host")
        before = await roll(engine)
        with pytest.raises(
            aseer.WeightUpdateError, match=rf"instance 1 .*'{fault[0]}'.*stays at 1"
        ):
            await engine.update_weights(weights(2.0), transfer="ipc")
        assert engine.weight_version == 1
        assert await roll(engine) == before
        await until(lambda: len(engine.instances) == 2)
        await engine.update_weights(weights(2.0), transfer="ipc")
        assert await roll(engine) != before


BAD = (
    ({"a": torch.zeros(4, 3)}, "1 of the model's 2 tensors were not given: 'b'"),
    ({"a": torch.zeros(4, 3), "b": torch.zeros(6)}, r"shape \[6\]"),
    (weights(float("nan")), "NaN or infinite"),
    (iter(weights(1.0).items()), "takes an nn.Module or a state_dict"),
    ({"a": torch.zeros(4, 3, device="meta"), "b": torch.zeros(5)}, "no values"),
)


async def test_weights_that_do_not_fit_reach_no_engine() -> None:
    async with aseer.Engine(sims(["0.1", "look", "die"])) as engine:
        for bad, match in BAD:
            with pytest.raises(aseer.WeightUpdateError, match=match):
                await engine.update_weights(bad, transfer="ipc")
        assert engine.weight_version == 0
        assert len(await roll(engine)) == 24


async def test_engines_that_were_started_otherwise_say_so() -> None:
    async with aseer.Engine(sims(backend=None)) as engine:
        with pytest.raises(aseer.WeightUpdateError, match="without a transfer"):
            await engine.update_weights(weights(1.0), transfer="ipc")
    async with aseer.Engine(sims()) as engine:
        with pytest.raises(aseer.WeightUpdateError, match="needs 'fake-nccl'"):
            await engine.update_weights(weights(1.0), transfer="nccl")
        with pytest.raises(aseer.ConfigError, match="transfer='mpi' is not allowed"):
            await engine.update_weights(weights(1.0), transfer="mpi")
        await engine.update_weights(weights(1.0))


@pytest.mark.parametrize(
    ("transfer", "source"),
    [
        ("nccl", weights(1.0)),
        ("mpi", weights(1.0)),
        ("ipc", iter(weights(1.0).items())),
    ],
)
async def test_what_cannot_be_sent_so_is_refused_before_a_rollout_is_aborted(
    transfer: Any, source: Any
) -> None:
    groups = groups_of(4, ignore_eos=True, max_tokens=300)
    async with aseer.Engine(sims()) as engine, engine.rollout(groups) as rollout:
        reading = aiter(rollout)
        responses = [await anext(reading)]
        with pytest.raises((aseer.WeightUpdateError, aseer.ConfigError)):
            await engine.update_weights(source, transfer=transfer, pause="abort")
        if transfer != "ipc":
            with pytest.raises((aseer.WeightUpdateError, aseer.ConfigError)):
                await engine.begin_update(transfer=transfer, pause="abort")
        responses += [response async for response in reading]
    assert {response.finish_reason for response in responses} == {"length"}


async def test_an_instance_that_dies_later_waits_for_the_next_update() -> None:
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0), transfer="ipc")
        one = await roll(engine)
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        await until(lambda: engine._host._pool.in_need_of_weights == [0])
        assert await roll(engine) == one  # by the other
        assert [info.instance_id for info in engine.instances] == [1]
        await engine.update_weights(weights(2.0), transfer="ipc")
        await until(lambda: len(engine.instances) == 2)
        two = await roll(engine)
        os.kill(engine.instances[1].pid, signal.SIGKILL)
        await until(lambda: engine._host._pool.in_need_of_weights == [1])
        await engine.update_weights(weights(1.0), transfer="host")
        await until(lambda: len(engine.instances) == 2)
        assert await roll(engine) == one != two


async def test_when_all_die_the_rollout_ends_and_the_next_update_mends_it() -> None:
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(weights(1.0), transfer="ipc")
        one = await roll(engine)
        reading = asyncio.ensure_future(roll(engine))  # noqa: TID251
        await until(lambda: engine._host.rollouts._session)
        for info in engine.instances:
            os.kill(info.pid, signal.SIGKILL)
        with pytest.raises(aseer.AseerError, match="straight from the trainer"):
            await reading
        await until(lambda: engine._host._pool.in_need_of_weights == [0, 1])
        with pytest.raises(aseer.EngineError, match="call update_weights"):
            await roll(engine)
        await engine.update_weights(weights(1.0), transfer="host")
        await until(lambda: len(engine.instances) == 2)
        assert await roll(engine) == one


def test_an_update_that_is_begun_is_sent_by_the_process_with_the_engine() -> None:
    with aseer.Engine(sims()) as engine:
        engine.update_weights_sync(weights(3.0), transfer="ipc")
        target = engine.begin_update_sync(transfer="ipc")
        assert pickle.loads(pickle.dumps(target)) == target
        with pytest.raises(aseer.WeightUpdateError, match="no weights were sent"):
            engine.finish_update_sync(target)
        with pytest.raises(aseer.WeightUpdateError, match="this process is neither"):
            target.send(weights(1.0))
        target = engine.begin_update_sync(transfer="ipc")
        with pytest.raises(aseer.WeightUpdateError, match="not given: 'b'"):
            target.send({"a": torch.zeros(4, 3)})
        target.send(weights(1.0))
        report = engine.finish_update_sync(target)
        assert (report.version, report.num_tensors) == (2, 2)
        one = content(list(engine.rollout_sync(groups_of(6))))
        engine.update_weights_sync(weights(1.0), transfer="host")
        assert content(list(engine.rollout_sync(groups_of(6)))) == one


async def test_a_begun_update_that_was_sent_and_abandoned_starts_all_again() -> None:
    async with aseer.Engine(sims()) as engine:
        before = await roll(engine)
        target = await engine.begin_update(transfer="ipc")
        await target.send_async(weights(1.0))
        await engine.abandon_update(target)
        assert direct.engines_of(target.directory) is None, "nothing is kept of it"
        assert engine.weight_version == 0
        await until(lambda: len(engine.instances) == 2)
        assert await roll(engine) == before
