"""Wrappers' parts of a name are taken off, a model's own parts are not."""

from __future__ import annotations

import pytest

from aseer.weights.names import (
    embedding_of,
    is_output_layer,
    is_weight,
    predicts_further,
    unwrapped,
)

KNOWN = {"model.layers.0.mlp.up.weight", "vision.module.proj.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("model.layers.0.mlp.up.weight", "model.layers.0.mlp.up.weight"),
        ("module.model.layers.0.mlp.up.weight", "model.layers.0.mlp.up.weight"),
        ("module.module.lm_head.weight", "lm_head.weight"),
        ("module._orig_mod.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.lm_head.weight", "lm_head.weight"),
        (
            "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp._orig_mod.up."
            "_checkpoint_wrapped_module.weight",
            "model.layers.0.mlp.up.weight",
        ),
        ("model.layers.0.module.mlp.up.weight", "model.layers.0.mlp.up.weight"),
        ("vision.module.proj.weight", "vision.module.proj.weight"),
        ("module.vision.module.proj.weight", "vision.module.proj.weight"),
        ("module.other.weight", "module.other.weight"),
        ("_orig_mod.other.weight", "other.weight"),
    ],
)
def test_a_name_is_the_known_one_without_its_wrappers(given, meant):
    assert unwrapped(given, KNOWN) == meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("model.visual.merger.norm.weight", "visual.merger.norm.weight"),
        ("module.model.visual.merger.norm.weight", "visual.merger.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        (
            "model.language_model.layers.0.weight",
            "language_model.model.layers.0.weight",
        ),
        ("model.vision_tower.head.weight", "vision_tower.head.weight"),
        ("visual.norm.weight", "model.visual.norm.weight"),
    ],
)
def test_parts_of_models_that_see_are_known_by_either_name(given, meant):
    assert unwrapped(given, {meant, "model.other.weight"}) == meant


@pytest.mark.parametrize(
    ("names", "embedding"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], "model.embed_tokens.weight"),
        (
            ["transformer.wte.weight", "transformer.wpe.weight"],
            "transformer.wte.weight",
        ),
        (
            ["model.language_model.embed_tokens.weight", "model.visual.pos.weight"],
            "model.language_model.embed_tokens.weight",
        ),
        (["model.embed_tokens_per_layer.weight"], None),
        (["a.embed_tokens.weight", "b.embed_tokens.weight"], None),  # which is it?
        (["embed_tokens.bias"], None),
    ],
)
def test_the_input_embedding_is_known_by_its_name_if_there_is_one(names, embedding):
    assert embedding_of(names) == embedding


def test_output_layers_and_what_is_no_weight_are_known_by_their_names():
    assert is_output_layer("language_model.lm_head.weight")
    assert is_output_layer("output.weight")
    assert not is_output_layer("lm_head.bias")
    assert not is_output_layer("model.layers.0.output.dense.weight")
    assert not is_weight("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert is_weight("model.layers.3.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("name", "num_layers", "further"),
    [
        ("mtp.fc.weight", 48, True),  # Qwen3-Next
        ("model.mtp_layers.0.norm.weight", 48, True),
        ("model.layers.61.embed_tokens.weight", 61, True),  # DeepSeek-V3
        ("model.language_model.layers.46.eh_proj.weight", 46, True),
        ("model.layers.46.mlp.up_proj.weight", 92, False),  # GLM-4.5
        ("model.layers.46.mlp.up_proj.weight", None, False),
        ("vision_model.encoder.layers.46.mlp.fc1.weight", 28, False),
        ("model.layers.0.mlp.up_proj.weight", 28, False),
        ("lm_head.weight", 28, False),
    ],
)
def test_layers_that_predict_further_are_told_from_a_models_own(
    name, num_layers, further
):
    assert predicts_further(name, num_layers) == further


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("router.weight", "router.layer.weight"),
        ("experts.gate_up_proj", "input_linear.weight"),
        ("experts.down_proj", "output_linear.weight"),
    ],
)
def test_granites_experts_are_known_by_the_names_they_have_in_memory(given, meant):
    moe = "model.layers.3.block_sparse_moe."
    known = {f"{moe}{meant}", "model.layers.3.block_sparse_moe.other"}
    for wrapped in (moe + given, f"module.{moe}{given}"):
        assert unwrapped(wrapped, known) == moe + meant
    assert unwrapped(moe + given, {moe + given}) == moe + given
