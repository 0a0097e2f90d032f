"""Adapters are loaded beside those that serve; those go when the switch is made."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.errors import EngineError, WeightUpdateError
from aseer.instance.base import EngineDied
from aseer.weights.checks import ModelSpec, TensorSpec, WeightCheck
from aseer.weights.files import Index, Tensor

pytest.importorskip("vllm")

from vllm.v1.engine.exceptions import EngineDeadError

from aseer.instance.vllm.weights import EngineWeights

Q = "base_model.model.model.layers.0.self_attn.q_proj"


class Engine:
    """Notes what it is told; `fails` is what it raises next."""

    def __init__(self, architecture: str = "LlamaForCausalLM") -> None:
        self.told: list[Any] = []
        self.fails: Exception | None = None
        model = SimpleNamespace(architectures=[architecture])
        config = SimpleNamespace(hf_config=model)
        self.vllm_config = SimpleNamespace(model_config=config)

    def _hear(self, *what: Any) -> None:
        self.told.append(what)
        if self.fails is not None:
            raise self.fails

    async def add_lora(self, request: Any) -> None:
        self._hear("add", request.lora_int_id, Path(request.lora_path))

    async def remove_lora(self, number: int) -> None:
        self._hear("remove", number)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self._hear(method, *args)

    async def reset_prefix_cache(self) -> bool:
        self._hear("reset")
        return True


def written(directory: Path, lora_rank: int) -> str:
    """An index as it lies on a node, where files have other names."""
    directory.mkdir()
    data = directory / "0"
    data.write_bytes(bytes(32))
    tensors = [
        Tensor(f"{Q}.{part}.weight", TensorSpec("F32", (2, 2)), 0, i * 16, 16)
        for i, part in enumerate(("lora_A", "lora_B"))
    ]
    index = Index([str(data)], tensors, lora_rank)
    index.write(directory / "index.json")
    return str(directory / "index.json")


async def test_adapters_come_in_pefts_form_and_serve_from_the_switch_on(tmp_path):
    engine = Engine()
    weights = EngineWeights(lambda: engine)
    await weights.prepare(written(tmp_path / "1", 2))
    assert weights.lora is None, "the engine goes on as it was"
    *_, (told, number, directory) = engine.told
    assert (told, number) == ("add", 1)
    assert (directory / "adapter_model.safetensors").read_bytes() == bytes(32)
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 2
    assert settings["target_modules"] == ["q_proj"]
    assert directory.parent == tmp_path / "1", "it goes with the update's own"
    await weights.commit()
    assert weights.lora.lora_int_id == 1
    assert engine.told[-1] == ("reset",)

    await weights.prepare(written(tmp_path / "2", 2))
    await weights.commit()
    assert weights.lora.lora_int_id == 2
    assert engine.told[-2:] == [("remove", 1), ("reset",)]
    assert "aseer_commit_weights" not in [what[0] for what in engine.told]


async def test_whole_weights_take_adapters_away(tmp_path):
    engine = Engine()
    weights = EngineWeights(lambda: engine)
    await weights.prepare(written(tmp_path / "1", 2))
    await weights.commit()
    whole = written(tmp_path / "2", 0)
    await weights.prepare(whole)
    assert engine.told[-1] == ("aseer_prepare_weights", whole)
    assert weights.lora is not None
    await weights.commit()
    assert weights.lora is None
    assert engine.told[-3:] == [("aseer_commit_weights",), ("remove", 1), ("reset",)]


async def test_what_was_prepared_and_is_given_up_is_taken_away(tmp_path):
    engine = Engine()
    weights = EngineWeights(lambda: engine)
    await weights.prepare(written(tmp_path / "1", 2))
    await weights.discard()
    assert engine.told[-1] == ("remove", 1)
    await weights.prepare(written(tmp_path / "2", 2))
    await weights.prepare(written(tmp_path / "3", 2))
    assert ("remove", 2) in engine.told
    await weights.commit()
    assert weights.lora.lora_int_id == 3


@pytest.mark.parametrize("rank", [0, 2])
async def test_a_dead_engine_is_told_apart_from_adapters_that_do_not_fit(
    tmp_path, rank
):
    engine = Engine()
    weights = EngineWeights(lambda: engine)
    index = written(tmp_path / "1", rank)
    engine.fails = ValueError("not of this model")
    with pytest.raises(ValueError, match="not of this model"):
        await weights.prepare(index)
    engine.fails = EngineDeadError()
    with pytest.raises(EngineDied):
        await weights.prepare(index)


async def taken_by_an_engine(
    directory: Path, lora: Any = None, **tensors: Any
) -> ModelSpec:
    """What an engine takes that computes in bfloat16, from a checkpoint of these."""
    from safetensors.torch import save_file
    from torch import bfloat16

    save_file(tensors, directory / "model.safetensors")
    settings = SimpleNamespace(tie_word_embeddings=False)
    model = SimpleNamespace(
        model=str(directory),
        revision=None,
        dtype=bfloat16,
        hf_config=settings,
        hf_text_config=settings,
    )
    config = SimpleNamespace(model_config=model, lora_config=lora)
    engine: Any = SimpleNamespace(vllm_config=config)
    return await EngineWeights(lambda: engine).describe()


async def test_what_an_engine_takes_says_its_rank(tmp_path):
    from torch import zeros

    for lora, rank in ((SimpleNamespace(max_lora_rank=16), 16), (None, 0)):
        spec = await taken_by_an_engine(tmp_path, lora, weight=zeros(2, 2))
        assert spec.max_lora_rank == rank
        assert spec.dtype == "BF16"


async def test_bfloat16_weights_are_for_fp8_engines_of_a_bfloat16_checkpoint(tmp_path):
    """As docs/training.md has it: vLLM quantises what the checkpoint has whole."""
    from torch import bfloat16, zeros

    spec = await taken_by_an_engine(tmp_path, weight=zeros(4, 4, dtype=bfloat16))
    for dtype in ("BF16", "F32"):
        check = WeightCheck(spec)
        accepted = check.add("weight", TensorSpec(dtype, (4, 4)))
        check.finish()
        assert accepted == ("weight", "BF16", False)


async def test_an_fp8_checkpoint_takes_no_bfloat16_weights_and_says_what_would(
    tmp_path,
):
    from torch import float8_e4m3fn, ones, zeros

    spec = await taken_by_an_engine(
        tmp_path, weight=zeros(4, 4).to(float8_e4m3fn), weight_scale=ones(1)
    )
    refused = (
        "tensor 'weight' has dtype BF16; the model's has F8_E4M3: the engine's "
        "checkpoint is quantised. Give the tensors quantised as it has them, with "
        "their scales; or start the engine from a checkpoint that is not, with "
        "engine_args={'quantization': ...}"
    )
    with pytest.raises(WeightUpdateError) as caught:
        WeightCheck(spec).add("weight", TensorSpec("BF16", (4, 4)))
    assert str(caught.value) == refused
    check = WeightCheck(spec)
    check.add("weight", TensorSpec("F8_E4M3", (4, 4)))
    check.add("weight_scale", TensorSpec("F32", (1,)))
    check.finish()
    without_scale = WeightCheck(spec)
    without_scale.add("weight", TensorSpec("F8_E4M3", (4, 4)))
    with pytest.raises(WeightUpdateError, match="were not given: 'weight_scale'"):
        without_scale.finish()


async def test_weights_that_vllm_would_lose_are_refused_and_adapters_are_not(tmp_path):
    engine = Engine("GptOssForCausalLM")
    weights = EngineWeights(lambda: engine)
    with pytest.raises(EngineError, match="GptOssForCausalLM as they were: save the"):
        await weights.prepare(written(tmp_path / "1", 0))
    assert [what for what, *_ in engine.told] == ["aseer_discard_weights"]
    await weights.prepare(written(tmp_path / "2", 2))
    assert engine.told[-1][0] == "add"
