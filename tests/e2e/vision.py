"""Tiny random models that see, as `tests/e2e/families.py` makes those that read."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aseer.models.tiny import vocabulary, write_tokenizer
from tests.e2e.families import COMMON, MAX_POSITIONS, VOCAB_SIZE, kept_model, scale

# In a folder of its own: every process that has it spends seconds on importing it.
TORCHVISION = Path(__file__).parents[2] / ".venv-images"
_SIGNS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
START, END, _, IMAGE, VIDEO = range(VOCAB_SIZE - len(_SIGNS), VOCAB_SIZE)
# Content parts as Qwen's own templates render them.
_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
_PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "embed_dim": 128,
        "hidden_size": 256,
        "mlp_ratio": 2,
        "patch_size": 14,
    },
    "qwen2_5_vl": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "out_hidden_size": 256,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "out_hidden_size": 256,
        "patch_size": 16,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 256,
    },
}
_SMALLEST, _LARGEST = 56 * 56, 28 * 28 * 256  # pixels


def needs_torchvision() -> None:
    """Skip the module where Qwen's processors cannot be had."""
    if find_spec("torchvision") is None:
        why = "run `python3 scripts/bootstrap.py --images` first"
        pytest.skip(why, allow_module_level=True)


def vision_env() -> dict[str, str]:
    """What has an engine's processes find torchvision where this one does."""
    path = [folder or os.getcwd() for folder in sys.path]
    return {"PYTHONPATH": os.pathsep.join(path)}


def vision_model(model_type: str, seed: int = 0) -> Path:
    """A directory with the model, made once for a test run."""
    return kept_model(model_type, seed, make_vision)


def make_vision(directory: Path, model_type: str, seed: int = 0) -> None:
    """Write the model with its tokenizer and processor into a new directory."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # its thread would outlive the test
    rope: dict[str, Any] = {
        "rope_type": "default",
        "mrope_section": [8, 12, 12],
        "rope_theta": 10000.0,
    }
    if model_type == "qwen3_vl":
        rope["mrope_interleaved"] = True
    config = AutoConfig.for_model(
        model_type,
        text_config=COMMON
        | {"num_hidden_layers": 3, "head_dim": 64, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "num_heads": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }
        | _VISION[model_type],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config.tie_word_embeddings = False
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    scale(model, seed)
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    tokens = [*vocabulary(VOCAB_SIZE)[: -len(_SIGNS)], *_SIGNS]
    write_tokenizer(directory, tokens, MAX_POSITIONS)
    _add_signs(directory)
    _write_processor(directory, model_type)


def _add_signs(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(
        [AddedToken(sign, special=True, normalized=False) for sign in _SIGNS]
    )
    tokenizer.save(str(path))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": _TEMPLATE}
    path.write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(_TEMPLATE)  # the processor's


def _write_processor(directory: Path, model_type: str) -> None:
    settings: dict[str, Any] = {
        "processor_class": _PROCESSORS[model_type],
        "patch_size": _VISION[model_type]["patch_size"],
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    if model_type == "qwen3_vl":
        settings["size"] = {"shortest_edge": _SMALLEST, "longest_edge": _LARGEST}
    else:
        settings |= {"min_pixels": _SMALLEST, "max_pixels": _LARGEST}
    for name, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        (
            "video_preprocessor_config.json",
            {
                "video_processor_type": "Qwen3VLVideoProcessor"
                if model_type == "qwen3_vl"
                else "Qwen2VLVideoProcessor"
            },
        ),
    ):
        (directory / name).write_text(json.dumps(settings | kind))


def seen_greedy(
    directory: Path, prompt: list[int], image: Any, num_tokens: int
) -> list[int]:
    """What transformers generates for a prompt with one image, of ordinary tokens."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(directory)
    text = processor.tokenizer.decode(prompt)
    inputs = processor(text=text, images=[Image.fromarray(image)], return_tensors="pt")
    generated = model.eval().generate(
        **inputs,
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        suppress_tokens=[*range(3), *range(START, VOCAB_SIZE)],
        pad_token_id=0,
    )
    return [int(token) for token in generated[0, inputs["input_ids"].shape[1] :]]
