"""Weights are the same if every byte is, wherever they lie."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from aseer.config import EngineConfig
from aseer.types import InstanceId, InstanceInfo
from aseer.weights.checks import TensorSpec
from aseer.weights.files import INDEX, Index, Tensor
from aseer.weights.fingerprint import (
    describe_model,
    fingerprint_of_model,
    fingerprint_of_update,
)

if TYPE_CHECKING:
    from pathlib import Path

INFO = InstanceInfo(
    instance_id=InstanceId(0),
    num_kv_blocks=1,
    block_size=1,
    max_num_seqs=1,
    max_model_len=1,
    vocab_size=7,
    dtype="float32",
)


def written(folder: Path, names: dict[str, bytes]) -> str:
    """An update of one-dimensional tensors of float32."""
    folder.mkdir()
    tensors, data = [], b"pad!" * len(folder.name)
    for name, values in names.items():
        spec = TensorSpec("F32", (len(values) // 4,))
        tensors.append(Tensor(name, spec, 0, len(data), len(values)))
        data += values
    (folder / "data").write_bytes(data)
    Index([str(folder / "data")], tensors).write(folder / INDEX)
    return str(folder / INDEX)


def test_the_same_bytes_are_the_same_weights_in_any_order_and_place(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("aseer.weights.fingerprint._BLOCK_BYTES", 16)
    a, b = os.urandom(100), os.urandom(64)
    first = fingerprint_of_update(written(tmp_path / "one", {"a": a, "b": b, "c": b""}))
    other = written(tmp_path / "other", {"c": b"", "b": b, "a": a})
    assert fingerprint_of_update(other) == first


@pytest.mark.parametrize("bit", [0, 130, 799])
def test_any_changed_bit_name_or_shape_makes_other_weights(tmp_path, bit):
    a = bytearray(100)
    first = fingerprint_of_update(written(tmp_path / "1", {"a": a, "b": a[:4]}))
    a[bit // 8] ^= 1 << bit % 8
    changed = fingerprint_of_update(written(tmp_path / "2", {"a": a, "b": bytes(4)}))
    renamed = written(tmp_path / "3", {"b": bytes(100), "a": bytes(4)})
    assert len({first, changed, fingerprint_of_update(renamed)}) == 3


def test_a_checkpoint_is_known_by_its_files_and_not_by_its_place(tmp_path):
    def model(name: str, content: bytes, **args: Any) -> EngineConfig:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(content)
        os.utime(folder / "model.safetensors", ns=(5, 5))
        config = '{"model_type": "llama", "num_layers": %d, "torch_dtype": "%s"}'
        text = config % (args.pop("num_layers", 2), name)
        (folder / "config.json").write_text(text)
        return EngineConfig(model=folder, device="cpu", engine_args=args)

    one, moved = model("one", b"abc"), model("moved", b"abc")
    longer = model("longer", b"abcd", num_layers=3)
    assert fingerprint_of_model(one) == fingerprint_of_model(moved)
    assert fingerprint_of_model(one) != fingerprint_of_model(longer)
    assert describe_model(one, INFO) == describe_model(moved, INFO)
    assert describe_model(one, INFO) != describe_model(longer, INFO)
    quantized = model("one", b"abc", quantization="fp8")
    assert describe_model(quantized, INFO)["quantization"] == "'fp8'"
    assert describe_model(one, INFO)["model_type"] == "llama"
