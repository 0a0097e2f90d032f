"""What a model's `config.json` says of the KV that its layers keep.

It is known before an engine is started, and vLLM is not asked. A model whose settings
this module does not know is taken for one that keeps every token in every layer.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aseer.errors import ConfigError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_log = logging.getLogger("aseer")

# A file of some kilobytes comes within a second; what takes longer will not come.
HUB_DEADLINE_S = 30.0
_TRUE = ("1", "ON", "YES", "TRUE")  # of the hub's environment variables

LayerKind = Literal["full", "window", "state"]

WORDS: dict[LayerKind, str] = {
    "full": "full attention",
    "window": "attention to a window",
    "state": "recurrent states",
}
# What transformers calls layers in `layer_types`; others, such as "moe", keep nothing.
_LAYER_TYPES: dict[str, LayerKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
    "recurrent": "state",
    "hybrid": "state",
}
# Settings that only models with recurrent states or linear attention have.
_STATE_SETTINGS = (
    "mamba_d_state",
    "mamba_d_ssm",
    "ssm_state_size",
    "state_size",
    "ssm_cfg",
    "linear_attn_config",
    "full_attention_interval",
    "hybrid_override_pattern",
    "attn_type_list",
    "conv_L_cache",
    "lru_width",
)
_ONLY_STATES = ("mamba", "mamba2", "falcon_mamba")
# Every other layer of these has a window, whether their settings say so or not.
_ALTERNATING = ("gemma2", "gemma3", "gemma3_text", "cohere2", "gpt_oss")
_TEXT_SETTINGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTraits:
    """Of one model.

    Attributes:
        model_type: as transformers has it.
        kinds: of layers by what they keep, in the order of `WORDS`.
        has_latent: keys and values are made from one latent a token (MLA).
        rotates_slices: rotates a part of each query and key that is a slice of a wider
            row, pair by pair, as DeepSeek does.
    """

    model_type: str
    kinds: tuple[LayerKind, ...]
    has_latent: bool = False
    rotates_slices: bool = False

    @property
    def words(self) -> str:
        """For a sentence."""
        kinds = ["a latent of each token (MLA)"] if self.has_latent else []
        kinds += [WORDS[k] for k in self.kinds if not (k == "full" and self.has_latent)]
        return f"{self.model_type}: {' and '.join(kinds)}"


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of what reads and writes text, where a model has other parts."""
    nested = (config.get(name) for name in _TEXT_SETTINGS)
    return next((n for n in nested if isinstance(n, dict)), config)


def traits_of(config: Mapping[str, Any]) -> ModelTraits:
    """What the settings of a `config.json` say."""
    text = text_settings(config)
    model_type = text.get("model_type") or config.get("model_type") or "unknown"
    kinds = _kinds_of(text, str(model_type))
    return ModelTraits(
        model_type=str(model_type),
        kinds=tuple(kind for kind in WORDS if kind in kinds),
        has_latent=text.get("kv_lora_rank") is not None and "full" in kinds,
        rotates_slices=text.get("qk_rope_head_dim") is not None,
    )


def read_traits(
    model: Path | str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    deadline_s: float = HUB_DEADLINE_S,
) -> ModelTraits | None:
    """Of a model in a directory, or of that name on the Hugging Face hub.

    See `read_settings` for the arguments and errors.

    Returns:
        None where its settings are not to be had; the log says why.
    """
    settings = read_settings(model, revision, token=token, deadline_s=deadline_s)
    return None if settings is None else traits_of(settings)


def read_settings(
    model: Path | str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    deadline_s: float = HUB_DEADLINE_S,
) -> dict[str, Any] | None:
    """What a model's `config.json` says.

    The hub is asked only where the file is not in its cache, and never if it is not to
    be (`HF_HUB_OFFLINE`).

    Args:
        token: for the hub; None = the one that this user has logged in with.
        deadline_s: how long to wait for the hub.

    Returns:
        None where it is not to be had; the log says why.

    Raises:
        ConfigError: the hub did not answer in time.
    """
    path = Path(model) / "config.json"
    try:
        if not path.is_file():
            path = _from_hub(str(model), revision, token, deadline_s)
        settings = json.loads(path.read_text("utf-8"))
    except ConfigError:
        raise
    except (ImportError, OSError, ValueError) as error:  # not there, or of another form
        _log.warning(
            "nothing is known of the layers of %s, which are taken for full attention: "
            "its config.json cannot be read (%s)",
            model,
            describe(error),
        )
        return None
    return settings if isinstance(settings, dict) else None


def _from_hub(
    model: str, revision: str | None, token: str | bool | None, deadline_s: float
) -> Path:
    """The path of a model's `config.json` in the hub's cache."""
    from huggingface_hub import constants, hf_hub_download

    def get(*, is_offline: bool) -> Path:
        path = hf_hub_download(
            model,
            "config.json",
            revision=revision,
            token=token,
            local_files_only=is_offline,
        )
        return Path(path)

    try:
        return get(is_offline=True)
    except OSError:
        # What was set after the hub's library was imported counts for engines.
        is_set = os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
        if constants.HF_HUB_OFFLINE or is_set:
            raise
    try:
        return _within(deadline_s, lambda: get(is_offline=False))
    except TimeoutError:
        raise ConfigError(
            f"the config.json of {model!r} did not come from the Hugging Face hub "
            f"within {deadline_s:g} s; give a directory, download the model beforehand "
            f"(`hf download {model}`), or set HF_HUB_OFFLINE=1 if the hub cannot be "
            "reached from here"
        ) from None


def _within(deadline_s: float, call: Callable[[], Path]) -> Path:
    """What `call` returns; after the deadline its thread ends by itself, some time.

    Raises:
        TimeoutError: it took longer. What `call` raises is raised, too.
    """
    result: Future[Path] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="aseer-hub", daemon=True).start()
    return result.result(deadline_s)


def _kinds_of(text: Mapping[str, Any], model_type: str) -> set[LayerKind]:
    has_window = _has_window(text)
    types = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(types, list):
        named = {_LAYER_TYPES[t] for t in types if t in _LAYER_TYPES}
        # Layers that slide over all of the text keep all of it.
        kinds = {"full" if k == "window" and not has_window else k for k in named}
        if "hybrid" in types:
            kinds.add("full")
        if kinds:
            return kinds
    kinds = {"full"}
    if has_window:
        alternates = model_type in _ALTERNATING or any("_pattern" in k for k in text)
        kinds = {"full", "window"} if alternates else {"window"}
    if text.get("attention_chunk_size"):
        kinds = {"full", "window"}
    if any(text.get(name) is not None for name in _STATE_SETTINGS):
        kinds.add("state")
    return {"state"} if model_type in _ONLY_STATES else kinds


def _has_window(text: Mapping[str, Any]) -> bool:
    slides = text.get("sliding_window") and text.get("use_sliding_window", True)
    return bool(slides or text.get("attention_chunk_size"))
