"""Adapters alone, sent to simulated instances: they stand on the whole weights."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from tests.integration.sims import config_of
from tests.integration.test_weights import roll, until

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


class Layers(torch.nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 4, bias=False)
        self.b = torch.nn.Linear(4, 5, bias=False)
        torch.nn.init.constant_(self.a.weight, value)
        torch.nn.init.constant_(self.b.weight, value)


def sims(**settings: Any) -> aseer.EngineConfig:
    args = {"weights": {"a.weight": [4, 3], "b.weight": [5, 4]}}
    return config_of(engine_args=args, **{"max_lora_rank": 8} | settings)


def adapters(value: float) -> Any:
    model = peft.get_peft_model(Layers(), peft.LoraConfig(r=2, target_modules=["a"]))
    torch.nn.init.constant_(model.base_model.model.a.lora_A["default"].weight, value)
    return model


def num_files(directory: Path) -> int:
    """Of weights that are in use."""
    return len([path for path in directory.iterdir() if path.name != "spare"])


async def test_adapters_are_sent_alone_and_instances_that_start_have_both(tmp_path):
    async with aseer.Engine(sims(weights_dir=tmp_path)) as engine:
        first = await roll(engine)
        report = await engine.update_weights(adapters(1.0))
        assert (report.version, report.num_tensors) == (1, 2)
        assert report.num_bytes == 4 * (2 * 3 + 4 * 2)
        one = await roll(engine)
        await engine.update_weights(Layers(3.0))
        whole = await roll(engine)
        await engine.update_weights(adapters(1.0))
        both = await roll(engine)
        assert len({str(each) for each in (first, one, whole, both)}) == 4
        (run,) = tmp_path.iterdir()
        assert num_files(run) == 2, "of the whole weights, and the adapters"
        for info in engine.instances:
            os.kill(info.pid, signal.SIGKILL)
        await until(lambda: not engine.instances)
        await until(lambda: len(engine.instances) == 2)
        assert await roll(engine) == both
        await engine.update_weights(adapters(2.0))
        assert await roll(engine) != both
        assert num_files(run) == 2
        await engine.update_weights(Layers(3.0))
        assert await roll(engine) == whole, "whole weights are all there is then"
        assert num_files(run) == 1


async def test_another_process_may_send_them():
    async with aseer.Engine(sims()) as engine:
        await engine.update_weights(adapters(1.0))
        one = await roll(engine)
        await engine.update_weights(adapters(2.0))
        target = await engine.begin_update()
        assert target.model.max_lora_rank == 8
        target.send(adapters(1.0))
        assert (await engine.finish_update(target)).num_tensors == 2
        assert await roll(engine) == one


async def test_adapters_that_do_not_fit_change_nothing():
    async with aseer.Engine(sims(max_lora_rank=1)) as engine:
        before = await roll(engine)
        with pytest.raises(aseer.WeightUpdateError, match=r"rank 2, and .* for 1"):
            await engine.update_weights(adapters(1.0))
        assert await roll(engine) == before


async def test_without_whole_weights_adapters_are_of_no_use():
    async with aseer.Engine(sims()) as engine:
        await engine.sleep(level=2)
        await engine.wake()
        with pytest.raises(aseer.WeightUpdateError, match=r"went with sleep\(level=2"):
            await engine.update_weights(adapters(1.0))
        await engine.update_weights(Layers(3.0))
        await engine.update_weights(adapters(1.0))
        await engine.sleep(level=1)
        await engine.wake()
        await engine.update_weights(adapters(2.0))


async def test_without_max_lora_rank_they_are_merged():
    async with aseer.Engine(sims(max_lora_rank=None)) as engine:
        report = await engine.update_weights(adapters(1.0))
        assert report.num_bytes == 4 * (4 * 3 + 5 * 4)


def test_adapters_files_are_those_of_the_update(tmp_path: Path) -> None:
    with aseer.Engine(sims(weights_dir=tmp_path)) as engine:
        engine.update_weights_sync(adapters(1.0))
        (folder,) = next(tmp_path.iterdir()).iterdir()
        names = {path.name for path in folder.iterdir()}
        assert names == {"adapter_model.safetensors", "index.json"}
