"""What a model's settings say of its layers, for settings as models on the hub have."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest

from aseer.errors import ConfigError
from aseer.models.traits import read_traits, traits_of

if TYPE_CHECKING:
    from collections.abc import Iterator
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A hub that never answers, and an empty cache; calls as `local_files_only`."""
    calls: list[bool] = []
    is_over = threading.Event()

    def download(*args: object, local_files_only: bool, **kwargs: object) -> str:
        calls.append(local_files_only)
        if not local_files_only:
            is_over.wait(10)
        raise FileNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield calls
    is_over.set()
    for thread in threading.enumerate():
        if thread.name == "aseer-hub":
            thread.join(10)


def test_a_hub_that_does_not_answer_is_an_error_that_says_what_to_do(
    hub: list[bool],
) -> None:
    with pytest.raises(
        ConfigError, match=r"'a/b'.* within 0\.05 s; .*HF_HUB_OFFLINE=1"
    ):
        read_traits("a/b", deadline_s=0.05)
    assert hub == [True, False]


@pytest.mark.parametrize("where", ["environment", "library"])
def test_offline_the_hub_is_not_asked(
    hub: list[bool], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "library":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_traits("a/b") is None
    assert hub == [True]


def test_what_the_cache_has_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama"}))

    def download(*args: object, local_files_only: bool, **kwargs: object) -> str:
        assert local_files_only
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    traits = read_traits("a/b")
    assert traits is not None
    assert traits.model_type == "llama"


def test_an_error_of_the_hub_says_nothing_of_the_model_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def download(*args: object, local_files_only: bool, **kwargs: object) -> str:
        raise ConnectionError("no way" if not local_files_only else "not there")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert read_traits("a/b") is None
    assert "nothing is known of the layers of a/b" in caplog.text
    assert "no way" in caplog.text
