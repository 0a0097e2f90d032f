"""Tiny random models of many families, made with transformers.

Each has 256 tokens in its vocabulary (`aseer.models.tiny.vocabulary`), some million
parameters, and weights scaled so that greedy decoding wanders rather than repeats
itself. Sliding windows are 64 tokens long, so that a response leaves them behind.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aseer.models.tiny import EOS_ID, vocabulary, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB_SIZE = 256
MAX_POSITIONS = 4096
WINDOW = 64

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_GEMMA: dict[str, Any] = {
    "head_dim": 64,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 64,
    "tie_word_embeddings": True,
}
# vLLM's kernels of multi-head latent attention on a CPU have this size only.
_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "qwen3_moe": _EXPERTS | {"head_dim": 64, "num_hidden_layers": 3},
    "qwen2_moe": _EXPERTS
    | {"num_hidden_layers": 3, "shared_expert_intermediate_size": 128},
    "deepseek_v3": _LATENT
    | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    },
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA
    | {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "gpt_oss": {
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "intermediate_size": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": MAX_POSITIONS,
        },
    },
    "mistral": {"head_dim": 64, "sliding_window": WINDOW},
    "granitemoehybrid": {
        "layer_types": ["mamba"] * 3 + ["attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 256,
        "intermediate_size": 128,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 64,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 0.125,
    },
    "qwen3_next": _EXPERTS
    | {
        "head_dim": 64,
        "shared_expert_intermediate_size": 128,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "partial_rotary_factor": 0.25,
    },
}
# Of queries and keys: attention then picks a few tokens rather than average over all.
_SHARPER = math.sqrt(3.0)
# Settings that vLLM reads and that transformers leaves out of what it writes.
_ADDED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
}


def family_model(model_type: str, seed: int = 0) -> Path:
    """A directory with the family's model, made once for a test run."""
    return kept_model(model_type, seed, make_family)


def kept_model(
    model_type: str, seed: int, make: Callable[[Path, str, int], None]
) -> Path:
    """A directory with a model, made once for a test run."""
    name = f"family-{os.getpid()}-{model_type}-{seed}"
    directory = Path(tempfile.gettempdir()) / name
    if not directory.exists():
        make(directory, model_type, seed)
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def make_family(
    directory: Path, model_type: str, seed: int = 0, **changes: Any
) -> None:
    """Write the family's model with its tokenizer into a new directory.

    Args:
        changes: of the family's settings.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # its thread would outlive the test
    settings = COMMON | FAMILIES[model_type] | changes
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scale(model, seed)
    if settings["tie_word_embeddings"]:
        # Inputs and outputs share their matrix: small rows, and the last norm makes up
        # for it, or every token would predict itself.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.02)
            model.model.norm.weight.fill_(7.0)
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    write_tokenizer(directory, vocabulary(VOCAB_SIZE), MAX_POSITIONS)
    path = directory / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | _ADDED.get(model_type, {})))


def greedy(
    directory: Path, prompts: list[list[int]], num_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """What transformers generates for each prompt: token ids, the logprob of each."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",  # the other one caps no logits (Gemma 2)
    ).eval()
    results = []
    for prompt in prompts:
        ids, logprobs = list(prompt), []
        with torch.no_grad():
            for _ in range(num_tokens):
                row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(row.argmax()))
                logprobs.append(float(row.max()))
        results.append((ids[len(prompt) :], logprobs))
    return results


def scale(model: Any, seed: int) -> None:
    """Draw every matrix anew so that what goes through a layer keeps its size."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Any, std: float) -> None:
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    biases = {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    for name, parameter in {**dict(model.named_parameters()), **biases}.items():
        module, leaf = (["", *name.split(".")])[-2:]
        if leaf == "sinks":
            normal(parameter, 1.0)
        elif leaf == "e_score_correction_bias":
            normal(parameter, 0.05)
        elif module in ("q_norm", "k_norm"):
            with torch.no_grad():  # to the same size as below; Gemma's are less by 1
                parameter.add_(_SHARPER - 1.0)
        elif parameter.dim() < 2 or "conv" in name:
            continue
        elif "embed" in name:
            normal(parameter, 1.0)
        else:
            # gpt-oss keeps its experts' matrices transposed.
            is_transposed = "gpt_oss" in type(model).__module__ and parameter.dim() == 3
            fan_in = parameter.shape[-2 if is_transposed else -1]
            gain = {"lm_head": 2.5}.get(module, 1.0)
            if module in ("q_proj", "k_proj", "kv_b_proj", "q_b_proj"):
                gain = _SHARPER
            normal(parameter, gain / math.sqrt(fan_in))
