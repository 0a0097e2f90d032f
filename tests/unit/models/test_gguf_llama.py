"""From llama.cpp's layout to the one of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aseer.models.gguf_llama import (
    expected_shapes,
    llama_config,
    tokenizer_config,
    transformers_name,
    unpermute_rotary,
)

FIELDS = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 40,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
}


def llama_cpp_permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K."""
    head_rows = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, -1)
    return head_rows.swapaxes(1, 2).reshape(rows.shape)


@given(
    num_heads=st.integers(1, 5),
    half_head=st.integers(1, 6),
    hidden_size=st.integers(1, 4),
)
def test_unpermuting_inverts_what_llama_cpp_does(
    num_heads: int, half_head: int, hidden_size: int
) -> None:
    shape = (num_heads * half_head * 2, hidden_size)
    rows = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    permuted = llama_cpp_permute(rows, num_heads)
    np.testing.assert_array_equal(unpermute_rotary(permuted, num_heads), rows)


def test_unpermuting_parts_neighbours_by_half_a_head() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    expected = [0, 2, 1, 3, 4, 6, 5, 7]
    assert unpermute_rotary(rows, 2)[:, 0].tolist() == expected


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_a_gguf_file_has_a_name_and_a_shape(tied: bool) -> None:
    names = ["token_embd.weight", "output_norm.weight"]
    names += [] if tied else ["output.weight"]
    kinds = (
        "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
    )
    names += [f"blk.{i}.{kind}.weight" for i in range(2) for kind in kinds.split()]
    shapes = expected_shapes(llama_config(FIELDS, "float32", tied=tied))
    assert {transformers_name(name) for name in names} == shapes.keys()


def test_shapes_tell_query_heads_from_key_heads() -> None:
    shapes = expected_shapes(llama_config(FIELDS, "float32", tied=True))
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (24, 24)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (8, 24)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (24, 40)


def test_a_foreign_tensor_is_not_renamed() -> None:
    with pytest.raises(KeyError, match="ssm_in"):
        transformers_name("blk.0.ssm_in.weight")


def test_the_configuration_says_what_the_file_says() -> None:
    config = llama_config(FIELDS, "bfloat16", tied=True)
    assert config["head_dim"] == 4
    assert config["num_key_value_heads"] == 2
    assert config["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["vocab_size"] == 4
    assert config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_the_tokenizer_configuration_names_its_special_tokens() -> None:
    config = tokenizer_config(FIELDS)
    assert config["bos_token"] == "<s>"
    assert config["eos_token"] == config["pad_token"] == "</s>"
    assert config["unk_token"] == "<unk>"
    assert config["chat_template"] == "{{ messages }}"
    assert config["clean_up_tokenization_spaces"] is False
