"""What a model's settings say of its layers, for settings as models on the hub have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from aseer.models.traits import read_traits, traits_of

if TYPE_CHECKING:
    from pathlib import Path

MODELS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model_type": "llama"}, ("full",)),
    ({"model_type": "qwen3_moe", "sliding_window": None}, ("full",)),
    (
        {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False},
        ("full",),
    ),
    (
        {
            "model_type": "qwen3",
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
        },
        ("full",),
    ),
    ({"model_type": "mistral", "sliding_window": 4096}, ("window",)),
    ({"model_type": "gemma2", "sliding_window": 4096}, ("full", "window")),
    (
        {
            "model_type": "gemma3",
            "text_config": {"sliding_window": 1024, "sliding_window_pattern": 6},
        },
        ("full", "window"),
    ),
    (
        {
            "model_type": "gpt_oss",
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        ("full", "window"),
    ),
    (
        {"model_type": "llama4", "text_config": {"attention_chunk_size": 8192}},
        ("full", "window"),
    ),
    (
        {"model_type": "qwen3_next", "full_attention_interval": 4},
        ("full", "state"),
    ),
    (
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["mamba", "mamba", "attention"],
        },
        ("full", "state"),
    ),
    (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"},
        ("full", "state"),
    ),
    ({"model_type": "jamba", "mamba_d_state": 16}, ("full", "state")),
    ({"model_type": "falcon_h1", "mamba_d_ssm": 1024}, ("full", "state")),
    ({"model_type": "mamba2", "state_size": 128}, ("state",)),
    (
        {"model_type": "kimi_linear", "linear_attn_config": {}, "kv_lora_rank": 512},
        ("full", "state"),
    ),
]


@pytest.mark.parametrize(
    ("config", "kinds"), MODELS, ids=[c["model_type"] for c, _ in MODELS]
)
def test_layers_are_told_apart_by_what_they_keep(
    config: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    assert traits_of(config).kinds == kinds


def test_latents_and_their_rotation_are_told() -> None:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    for config in (
        {"model_type": "deepseek_v3", **latent},
        {"model_type": "kimi_vl", "text_config": {"model_type": "kimi_k2", **latent}},
    ):
        traits = traits_of(config)
        assert (traits.has_latent, traits.rotates_slices) == (True, True)
        assert traits.kinds == ("full",)
        assert traits.words.endswith(": a latent of each token (MLA)")
    plain = traits_of({"model_type": "llama"})
    assert (plain.has_latent, plain.rotates_slices) == (False, False)
    assert plain.words == "llama: full attention"


def test_a_directorys_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    traits = read_traits(tmp_path)
    assert traits is not None
    assert traits.model_type == "llama"


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_settings_that_cannot_be_read_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert read_traits(tmp_path) is None


def test_a_model_that_is_not_at_hand_says_nothing(tmp_path: Path) -> None:
    assert read_traits(tmp_path / "nothing") is None
