"""A checkpoint's files are believed only as far as they are there."""

from __future__ import annotations

import json

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.files import (
    OpenIndex,
    describe_checkpoint,
    index_checkpoint,
    map_tensors,
    read_index,
)
from tests.lazy import Lazy
from tests.unit.weights.made import send

torch = Lazy("torch")
safetensors = Lazy("safetensors.torch")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LISTING = "model.safetensors.index.json"


def header(entry, num_bytes=8):
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not a safetensors file"),
        (b"nonsense" * 10, "is not a safetensors file"),
        (header([1, 2]), "is not a safetensors file"),
        (header(GOOD | {"data_offsets": [0, 4]}), "does not fit its bytes"),
        (header(GOOD | {"data_offsets": [-8, 0]}), "does not fit its bytes"),
        (header(GOOD | {"shape": [-1, -2]}), "does not fit its bytes"),
        (header(GOOD, num_bytes=7), "ends before tensor 'w' does"),
    ],
)
def test_a_broken_file_is_refused(content, match, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightUpdateError, match=match):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("listing", "match"),
    [
        ("nonsense", "is not an index of a checkpoint"),
        ("[]", "is not an index of a checkpoint"),
        ('{"metadata": {}}', "is not an index of a checkpoint"),
        ('{"weight_map": {"w": 3}}', "is not an index of a checkpoint"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "is not whole.*gone.safetensors"),
        ('{"weight_map": {}}', r"has no \*.safetensors files"),
    ],
)
def test_a_broken_index_of_a_checkpoint_is_refused(listing, match, tmp_path):
    (tmp_path / LISTING).write_text(listing)
    with pytest.raises(WeightUpdateError, match=match):
        index_checkpoint(tmp_path)


def test_of_a_checkpoint_in_parts_what_its_index_names_counts(tmp_path):
    for number in range(3):
        tensor = torch.full((2,), float(number))
        safetensors.save_file(
            {f"w{number}": tensor}, tmp_path / f"{number}.safetensors"
        )
    names = {"w0": "0.safetensors", "w2": "2.safetensors"}
    (tmp_path / LISTING).write_text(json.dumps({"weight_map": names}))
    found = dict(map_tensors(index_checkpoint(tmp_path)))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "w0": [0.0, 0.0],
        "w2": [2.0, 2.0],
    }


def test_files_that_shrink_or_vanish_after_they_were_sent_are_refused(tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    source.mkdir()
    file = source / "model.safetensors"
    safetensors.save_file({"w": torch.ones(100)}, file)
    model = describe_checkpoint(str(source), None, "F32", declares_tied=False)
    index = send(source, model, new)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(WeightUpdateError, match="ends before tensor 'w' does"):
        read_index(str(new / "index.json"))
    file.write_bytes(whole)
    read_index(str(new / "index.json"))
    file.unlink()
    with pytest.raises(WeightUpdateError, match="weights are gone"):
        read_index(str(new / "index.json"))
    with pytest.raises(WeightUpdateError, match="file is gone"):
        list(map_tensors(index))
    (new / "index.json").write_text("{}")
    with pytest.raises(WeightUpdateError, match="weights are gone"):
        read_index(str(new / "index.json"))


def test_between_its_two_phases_a_files_name_may_go_but_not_its_end(tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    source.mkdir()
    file = source / "model.safetensors"
    safetensors.save_file({"w": torch.ones(100)}, file)
    model = describe_checkpoint(str(source), None, "F32", declares_tied=False)
    send(source, model, new)
    opened = OpenIndex(str(new / "index.json"))
    try:
        file.rename(source / "elsewhere")
        assert dict(opened.tensors())["w"].tolist() == [1.0] * 100
        with (source / "elsewhere").open("r+b") as shortened:
            shortened.truncate(200)
        with pytest.raises(WeightUpdateError, match="ends before tensor 'w' does"):
            opened.tensors()
    finally:
        opened.close()
    with pytest.raises(WeightUpdateError, match="weights are gone"):
        OpenIndex(str(new / "index.json"))


@pytest.mark.parametrize(
    ("head", "declares_tied", "tied"),
    [
        ("none", True, [EMBEDDING]),
        ("none", False, [EMBEDDING]),  # there is nothing else to compute logits with
        ("equal", True, [EMBEDDING, HEAD]),
        ("equal", False, []),
        ("other", True, []),  # vLLM and Transformers do not tie these, either
        ("other", False, []),
    ],
)
def test_what_is_tied_is_told_by_the_checkpoint_and_its_settings(
    head, declares_tied, tied, tmp_path
):
    values = torch.randn(8, 4)
    tensors = {EMBEDDING: values, "norm.weight": torch.ones(4)}
    if head != "none":
        tensors[HEAD] = values.clone() if head == "equal" else values + 1
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    model = describe_checkpoint(
        str(tmp_path), None, "BF16", declares_tied=declares_tied
    )
    assert model.tied == tied
    assert model.tensors.keys() == tensors.keys()


def test_layers_that_predict_further_may_be_given_or_not(tmp_path):
    """They have a head of their own, which is not the model's."""
    source = tmp_path / "engine"
    source.mkdir()
    own = {EMBEDDING: torch.randn(8, 4), "model.layers.0.w": torch.randn(4)}
    further = {
        "mtp.fc.weight": torch.randn(4),
        "model.layers.1.embed_tokens.weight": torch.randn(8, 4),
        "model.layers.1.shared_head.output.weight": torch.randn(8, 4),
    }
    safetensors.save_file(own | further, source / "model.safetensors")
    model = describe_checkpoint(
        str(source), None, "F32", declares_tied=False, num_layers=1
    )
    assert set(model.optional) == further.keys()
    assert model.tied == [EMBEDDING]
    for number, given in enumerate((own, own | further)):
        index = send(given, model, tmp_path / f"{number}")
        found = dict(map_tensors(index))
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in found)
    with pytest.raises(WeightUpdateError, match=r"not given: 'model.layers.0.w'"):
        send({EMBEDDING: own[EMBEDDING]} | further, model, tmp_path / "new")


def test_a_checkpoint_that_is_not_at_hand_is_said():
    with pytest.raises(WeightUpdateError, match="'no/such/model' is not at hand"):
        describe_checkpoint("/no/such/model"[1:], None, "F32", declares_tied=False)
