"""The tiny model: the same every time, and readable token by token."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import pytest

from aseer.models.gguf_llama import expected_shapes
from aseer.models.tiny import BOS_ID, EOS_ID, UNKNOWN, make_tiny, vocabulary

if TYPE_CHECKING:
    from pathlib import Path

safetensors_numpy = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")

SMALL = {"hidden_size": 32, "num_layers": 2, "intermediate_size": 48}


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    first = contents(make_tiny(tmp_path / "a", **SMALL, seed=3))
    assert contents(make_tiny(tmp_path / "b", **SMALL, seed=3)) == first
    other = contents(make_tiny(tmp_path / "c", **SMALL, seed=4))
    assert other.pop("model.safetensors") != first.pop("model.safetensors")
    assert other == first


def test_the_default_has_three_million_parameters(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path)
    tensors = safetensors_numpy.load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    assert {k: v.shape for k, v in tensors.items()} == expected_shapes(config)
    assert sum(v.size for v in tensors.values()) == pytest.approx(3e6, rel=0.05)
    assert {v.dtype for v in tensors.values()} == {np.dtype(np.float32)}
    assert config["max_position_embeddings"] >= 4096


@pytest.mark.parametrize("size", [128, 1000])
def test_every_id_decodes_to_one_visible_character_of_its_own(
    tmp_path: Path, size: int
) -> None:
    make_tiny(tmp_path, vocab_size=size, **SMALL)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]
    assert texts[BOS_ID] == "<bos>"
    assert texts[EOS_ID] == "<eos>"
    assert len(set(texts)) == size
    for char in texts[2:]:
        assert len(char) == 1
        assert char.isprintable()
        assert not char.isspace()
        assert not unicodedata.combining(char)


def test_text_round_trips_but_for_blanks_and_unknown_characters(
    tmp_path: Path,
) -> None:
    make_tiny(tmp_path, **SMALL)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    def there_and_back(text: str) -> str:
        return tokenizer.decode(tokenizer.encode(text).ids)

    ascii_text = "".join(map(chr, range(0x21, 0x7F)))
    assert there_and_back(ascii_text) == ascii_text
    assert there_and_back("two words\n") == "two␣words⏎"
    assert there_and_back("a語b") == f"a{UNKNOWN}b"
    assert tokenizer.encode("hi<eos>").ids[-1] == EOS_ID


def test_the_vocabulary_has_bounds() -> None:
    assert len(vocabulary(99)) == 99
    with pytest.raises(ValueError, match="at least 99"):
        vocabulary(98)
    with pytest.raises(ValueError, match="vocab_size must be at most"):
        vocabulary(100_000)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple"):
        make_tiny(tmp_path, hidden_size=30)
    with pytest.raises(ValueError, match="multiple"):
        make_tiny(tmp_path, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="int4"):
        make_tiny(tmp_path, dtype="int4")
    assert list(tmp_path.iterdir()) == []
