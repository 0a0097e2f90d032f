"""A Llama in a GGUF file as the files of a safetensors model directory.

llama.cpp's layout differs from the one of transformers and vLLM in the tensors' names,
in the order of the rows of Q and K, and in how the tokenizer is written down. What the
loaders of transformers make of such a file is not used: depending on the version they
keep the weights packed, and the tokenizer that they build garbles text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aseer.models import save_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

WEIGHTS = "model.safetensors"

_GGUF_NORMAL_TOKEN = 1

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_path: Path, directory: Path, dtype: str) -> None:
    """Write weights, configuration and tokenizer into an existing directory.

    Raises:
        KeyError: not a Llama, or a field is missing.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    config = llama_config(fields, dtype, tied="output.weight" not in names)
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors = {}
    for tensor in reader.tensors:
        rows = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            rows = unpermute_rotary(rows, heads[kind])
        tensors[transformers_name(tensor.name)] = rows
    save_weights(directory / WEIGHTS, tensors, dtype)
    write_json(directory / "config.json", config)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", ids)
    _write_tokenizer(fields, directory)


def unpermute_rotary(
    rows: npt.NDArray[np.float32], num_heads: int
) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's reordering of a Q or K projection's rows.

    llama.cpp interleaves the two halves of each head, since it rotates neighbouring
    rows; transformers and vLLM rotate row i with row i + head_dim / 2.

    Args:
        rows: [num_heads * head_dim, hidden_size].
        num_heads: K has as many as there are KV heads.
    """
    half = rows.shape[0] // num_heads // 2
    pairs = rows.reshape(num_heads, half, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def transformers_name(gguf_name: str) -> str:
    """The name that transformers' Llama gives to a tensor of a GGUF file.

    Raises:
        KeyError: not a tensor of a Llama model.
    """
    if gguf_name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[gguf_name]
    _, layer, kind, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"


def llama_config(
    fields: Mapping[str, Any], dtype: str, *, tied: bool
) -> dict[str, Any]:
    """config.json's content from a GGUF file's fields.

    Args:
        fields: the file's metadata, by name.
        dtype: of the weights.
        tied: the file has no output matrix, the embeddings serve as one.
    """
    hidden_size = fields["llama.embedding_length"]
    num_heads = fields["llama.attention.head_count"]
    # GGUF stores it as float32, which turns 1e-5 into 9.99999975e-06.
    rms_norm_eps = float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": rms_norm_eps,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's content from a GGUF file's fields."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # The generic class takes tokenizer.json as it is; a model's own class would
        # put its pre-tokenizer in the place of ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write_tokenizer(fields: Mapping[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    # Its place in the list is a token's id; its place in the merges, its rank.
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = (t for t, k in zip(tokens, kinds, strict=True) if k != _GGUF_NORMAL_TOKEN)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", tokenizer_config(fields))


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape in a Llama of this config.json."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    layer_shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
