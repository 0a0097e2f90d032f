"""What is sent is what engines map, whatever it came from; errors leave no index."""

from __future__ import annotations

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.checks import TensorSpec
from aseer.weights.files import (
    index_checkpoint,
    map_tensors,
    read_index,
    specs_of_model,
)
from aseer.weights.sending import Sending

torch = pytest.importorskip("torch")


def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, dtype=torch.bfloat16),
        "halves": torch.randn(2, 2, dtype=torch.float16),
        "count": torch.tensor(5),
        "empty": torch.empty(0, 4),
    }


def specs(given):
    names = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
    }
    return {k: TensorSpec(names[t.dtype], tuple(t.shape)) for k, t in given.items()}


def sent(source, expected, directory):
    sending = Sending(source, expected, directory)
    for _ in sending:
        pass
    return dict(map_tensors(read_index(str(directory / "index.json"))))


def module_of(given):
    module = torch.nn.Module()
    for name, tensor in given.items():
        module.register_buffer(name.replace(".", "_"), tensor)
    return module


@pytest.mark.parametrize("kind", ["state_dict", "pairs", "module", "directory"])
def test_every_source_arrives_bit_for_bit(kind, tmp_path):
    given = tensors()
    source = given
    if kind == "pairs":
        source = iter(given.items())
    elif kind == "module":
        given = {k.replace(".", "_"): t for k, t in given.items()}
        source = module_of(given)
    elif kind == "directory":
        from safetensors.torch import save_file

        source = tmp_path / "checkpoint"
        source.mkdir()
        save_file(given, source / "model.safetensors")
        assert specs_of_model(str(source), None) == specs(given)
    found = sent(source, specs(given), tmp_path / "new")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_tensors_that_are_not_contiguous_or_want_gradients_arrive(tmp_path):
    given = {"w": torch.randn(4, 6).t().requires_grad_()}
    assert torch.equal(sent(given, specs(given), tmp_path / "new")["w"], given["w"])


def test_an_iterator_is_taken_one_tensor_at_a_time(tmp_path):
    given = tensors()
    alive = []

    def pairs():
        for name, tensor in given.items():
            alive.append(name)
            yield name, tensor

    steps = iter(Sending(pairs(), specs(given), tmp_path / "new"))
    next(steps)
    assert alive == ["a.weight"]


def test_a_tied_copy_that_the_model_lacks_is_left_out(tmp_path):
    given = {"embed": torch.randn(4, 2)}
    tied = given | {"lm_head": given["embed"]}
    assert sent(tied, specs(given), tmp_path / "new").keys() == {"embed"}
    untied = given | {"lm_head": torch.randn(4, 2)}
    with pytest.raises(WeightUpdateError, match="no tensor 'lm_head'"):
        sent(untied, specs(given), tmp_path / "other")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_bad_value_is_found(bad, dtype, tmp_path):
    given = {"w": torch.zeros(1000, dtype=getattr(torch, dtype))}
    given["w"][777] = bad
    with pytest.raises(WeightUpdateError, match="'w' has values that are NaN"):
        sent(given, specs(given), tmp_path / "new")
    assert not (tmp_path / "new" / "index.json").exists()


def test_a_checkpoint_with_a_bad_value_is_refused(tmp_path):
    from safetensors.torch import save_file

    given = {"w": torch.full((10,), float("nan"))}
    save_file(given, tmp_path / "model.safetensors")
    with pytest.raises(WeightUpdateError, match="'w' has values that are NaN"):
        sent(tmp_path, specs(given), tmp_path / "new")


def test_what_are_no_weights_is_said(tmp_path):
    with pytest.raises(WeightUpdateError, match="not a int"):
        Sending(5, {}, tmp_path / "new")
    with pytest.raises(WeightUpdateError, match=r"no \*\.safetensors files"):
        sent(tmp_path, {}, tmp_path / "new")
    with pytest.raises(WeightUpdateError, match="'w' is a list, not a tensor"):
        sent({"w": [1.0]}, {"w": TensorSpec("F32", (1,))}, tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense" * 10)
    with pytest.raises(WeightUpdateError, match="is not a safetensors file"):
        index_checkpoint(tmp_path)


def test_a_file_that_shrank_is_refused(tmp_path):
    given = tensors()
    for _ in Sending(given, specs(given), tmp_path / "new"):
        pass
    data = tmp_path / "new" / "data"
    data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(WeightUpdateError, match="ends before tensor"):
        read_index(str(tmp_path / "new" / "index.json"))
