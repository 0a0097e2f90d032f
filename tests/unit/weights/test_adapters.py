"""A PEFT model's weights are what it computes with; to get them changes nothing."""

from __future__ import annotations

import copy

import pytest

from aseer.weights.adapters import has_adapters, merged_weights
from tests.lazy import Lazy

torch = Lazy("torch")
transformers = Lazy("transformers")
peft = Lazy("peft")


def base_model(dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "dora", "lm_head trained whole"],
)
def test_adapters_are_merged_in_copies(settings, dtype):
    dtype = getattr(torch, dtype)
    base = base_model(dtype)
    names = set(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 8)
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).merge_and_unload().state_dict()

    assert has_adapters(model)
    found = dict(merged_weights(model))

    assert set(found) == set(expected) == names
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    merged = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[merged], base_model(dtype).state_dict()[merged])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_other_models_have_no_adapters():
    assert not has_adapters(base_model(torch.float32))
    assert not has_adapters({"a": 1})
