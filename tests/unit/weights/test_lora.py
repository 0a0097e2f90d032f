"""Adapters are sent as one adapter a layer, which changes the layer as they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.adapters import merged_weights
from aseer.weights.checks import ModelSpec, TensorSpec
from aseer.weights.files import INDEX, map_tensors, read_index
from aseer.weights.lora import module_of
from aseer.weights.sending import send
from tests.lazy import Lazy
from tests.unit.weights.test_adapters import base_model

if TYPE_CHECKING:
    from pathlib import Path

torch = Lazy("torch")
peft = Lazy("peft")

Q = "model.layers.0.self_attn.q_proj"


def spec_of(model: Any, max_lora_rank: int = 16) -> ModelSpec:
    tensors = {k: TensorSpec("F32", tuple(v.shape)) for k, v in model.items()}
    return ModelSpec(tensors, "F32", max_lora_rank=max_lora_rank)


def trained(settings: dict[str, Any], *more: dict[str, Any]) -> Any:
    """A PEFT model whose adapters, all of them active, are not those it began with."""
    model = peft.get_peft_model(base_model(torch.float32), peft.LoraConfig(**settings))
    for i, other in enumerate(more):
        model.add_adapter(f"other{i}", peft.LoraConfig(**other))
    names = ["default", *(f"other{i}" for i in range(len(more)))]
    model.base_model.set_adapter(names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 8)
    return model


def sent(model: Any, directory: Path, max_lora_rank: int = 16) -> dict[str, Any]:
    """The tensors that engines are given, by name."""
    directory.mkdir()
    spec = spec_of(base_model(torch.float32).state_dict(), max_lora_rank)
    index = send(model, spec, directory)
    assert read_index(str(directory / INDEX)) == index
    assert index.lora_rank
    return {name: values.clone() for name, values in map_tensors(index)}


@pytest.mark.parametrize(
    "adapters",
    [
        [{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}],
        [{"r": 4, "target_modules": "all-linear", "use_rslora": True}],
        [
            {
                "r": 2,
                "target_modules": ["q_proj", "up_proj"],
                "rank_pattern": {"q_proj": 6},
                "alpha_pattern": {"up_proj": 3},
            }
        ],
        [
            {"r": 4, "target_modules": ["q_proj"]},
            {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 9},
        ],
    ],
    ids=["plain", "rank-stabilised", "patterns", "two of a layer"],
)
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "in DataParallel"])
def test_a_layer_is_changed_as_by_all_of_its_adapters(adapters, wrap, tmp_path):
    model = trained(*adapters)
    base = base_model(torch.float32).state_dict()
    expected = dict(merged_weights(model))
    given = torch.nn.DataParallel(model) if wrap else model
    factors = sent(given, tmp_path / "new")
    for name in {module_of(name) for name in factors}:
        first = factors.pop(f"base_model.model.{name}.lora_A.weight")
        second = factors.pop(f"base_model.model.{name}.lora_B.weight")
        found = base.pop(f"{name}.weight") + second @ first
        torch.testing.assert_close(found, expected[f"{name}.weight"])
    assert not factors
    for name, tensor in base.items():
        assert torch.equal(tensor, expected[name]), "what has no adapter is not changed"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, f"'{Q}' is a variant of LoRA"),
        ({"lora_bias": True, "target_modules": ["biased"]}, "an adapter with a bias"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head' is a module that is trained"),
        ({"bias": "all", "target_modules": ["biased"]}, "that is trained"),
        ({"target_modules": ["embed_tokens"]}, "is an adapter of an embedding"),
        ({"target_modules": [], "target_parameters": [f"{Q}.weight"]}, "a parameter"),
        ({"r": 32}, r"has rank 32, and the engine was started for 16; set EngineConf"),
    ],
    ids=lambda given: str(given)[:20],
)
def test_what_engines_cannot_have_is_refused_by_name(settings, why, tmp_path):
    base = base_model(torch.float32)
    base.model.layers[0].biased = torch.nn.Linear(4, 4)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | settings)
    model = peft.get_peft_model(base, config)
    with pytest.raises(WeightUpdateError, match=why):
        sent(model, tmp_path / "new")


def test_nothing_else_may_be_trained(tmp_path):
    model = trained({"r": 4, "target_modules": ["q_proj"]})
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight.* is trained"):
        sent(model, tmp_path / "new")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model = trained({"r": 4, "target_modules": ["q_proj"]})
    tensors = base_model(torch.float32).state_dict()
    (tmp_path / "a").mkdir()
    other = spec_of({**tensors, f"{Q}.weight": torch.zeros(8, 16)})
    with pytest.raises(WeightUpdateError, match=r"shape \[16, 16\]; .* \[8, 16\]"):
        send(model, other, tmp_path / "a")
    del tensors[f"{Q}.weight"]
    with pytest.raises(WeightUpdateError, match="which the engine's model has not"):
        send(model, spec_of(tensors), tmp_path / "a")


def test_a_factor_that_is_not_finite_is_refused(tmp_path):
    model = trained({"r": 4, "target_modules": ["q_proj"]})
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(WeightUpdateError, match=r"q_proj\.lora_B' has values"):
        sent(model, tmp_path / "new")


def test_engines_without_adapters_are_given_merged_weights(tmp_path):
    model = trained({"r": 4, "target_modules": ["q_proj"]})
    names = base_model(torch.float32).state_dict()
    index = send(model, spec_of(names, max_lora_rank=0), tmp_path)
    assert not index.lora_rank
    assert {tensor.name for tensor in index.tensors} == names.keys()
