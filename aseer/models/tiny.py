"""A small Llama with random weights, for tests and measurements of everything but text.

Every ordinary token is one visible character, so prompts, stop strings and decoding
work as with a real model. The same arguments write the same bytes.

The weights are scaled so that sampling at temperature 1 looks like a language model's:
the next-token distribution has an entropy of some 2 nats and depends on the context, a
response ends with about one token in vocab_size, and greedy decoding wanders.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

from aseer.models import check_weight_dtype, save_weights
from aseer.models.gguf_llama import WEIGHTS, expected_shapes, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

BOS, EOS = "<bos>", "<eos>"
BOS_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
# Stands for a character of a prompt that the vocabulary lacks.
UNKNOWN = "□"
# Blanks are not visible, so text is encoded and decoded with these in their place.
VISIBLE_BLANKS = {" ": "␣", "\n": "⏎"}

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def make_tiny(
    directory: Path,
    *,
    vocab_size: int = 128,
    hidden_size: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 704,
    max_positions: int = 8192,
    logit_std: float = 2.5,
    score_std: float = 3.0,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write the model into the directory, made if it is not there, and return it.

    The defaults make 3 million parameters and heads of 64, a size that attention
    kernels of every device have.

    Args:
        directory: files of an earlier model in it are overwritten.
        vocab_size: special tokens included.
        hidden_size: a multiple of num_heads.
        num_layers: of attention and feed-forward.
        num_heads: a multiple of num_kv_heads.
        num_kv_heads: heads of keys and values.
        intermediate_size: width of the feed-forward layers.
        max_positions: the longest prompt and response together, in tokens.
        logit_std: standard deviation of a logit; more makes the next token surer.
        score_std: standard deviation of an attention score before the softmax. More
            makes attention pick a few tokens rather than average over all, without
            which the next token depends on the last one only and greedy decoding
            soon repeats itself.
        seed: of the weights.
        dtype: of the weights, "float32" or "bfloat16".

    Raises:
        ValueError: sizes that do not fit together, or an unknown dtype.
    """
    check_weight_dtype(dtype)
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}, "
            f"and that of num_kv_heads={num_kv_heads}"
        )
    tokens = vocabulary(vocab_size)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": max_positions,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", ids)
    write_tokenizer(directory, tokens, max_positions)
    weights = _random_weights(config, seed, logit_std=logit_std, score_std=score_std)
    save_weights(directory / WEIGHTS, weights, dtype)
    return directory


def vocabulary(size: int) -> list[str]:
    """The tokens in the order of their ids.

    After the special ones come printable ASCII, the signs for blanks, and then letters
    that no Unicode normalisation changes.

    Raises:
        ValueError: too small for ASCII, or more than there are such letters.
    """
    tokens = [BOS, EOS, UNKNOWN]
    tokens += [chr(code) for code in range(0x21, 0x7F)]
    tokens += VISIBLE_BLANKS.values()
    if size < len(tokens):
        raise ValueError(f"vocab_size must be at least {len(tokens)}, not {size}")
    for code in range(0xA1, 0xD800):
        if len(tokens) == size:
            return tokens
        char = chr(code)
        if unicodedata.category(char) in {"Ll", "Lu", "Lo"} and all(
            unicodedata.normalize(form, char) == char for form in ("NFC", "NFKC")
        ):
            tokens.append(char)
    raise ValueError(f"vocab_size must be at most {len(tokens)}, not {size}")


def _random_weights(
    config: Mapping[str, Any], seed: int, *, logit_std: float, score_std: float
) -> dict[str, npt.NDArray[np.float32]]:
    import numpy as np

    # Standard deviation of what a matrix puts out, 1 where none is named. This takes
    # inputs to have a mean square of 1; those of o_proj and down_proj have less, which
    # only makes their layers count for less.
    output_std = {
        "lm_head": logit_std,
        "q_proj": score_std**0.5,
        "k_proj": score_std**0.5,
    }
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        kind = name.split(".")[-2]
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        fan_in = 1 if kind == "embed_tokens" else shape[1]
        std = output_std.get(kind, 1.0) * fan_in**-0.5
        weights[name] = rng.standard_normal(shape, np.float32) * np.float32(std)
    return weights


def write_tokenizer(directory: Path, tokens: list[str], max_positions: int) -> None:
    """Write a tokenizer that makes each visible character a token.

    Args:
        directory: where the model is; made already.
        tokens: in the order of their ids, as `vocabulary` has them.
        max_positions: the longest text, in tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    # Without merges, BPE makes each character a token.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(blank, sign) for blank, sign in VISIBLE_BLANKS.items()]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": _CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", settings)
