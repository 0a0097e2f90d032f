"""An update's tensors are the model's: what is not is named, with what was wanted."""

from __future__ import annotations

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.checks import ModelSpec, TensorSpec, WeightCheck

EXPECTED = ModelSpec(
    {
        "embed.weight": TensorSpec("BF16", (8, 4)),
        "norm.weight": TensorSpec("F32", (4,)),
        "steps": TensorSpec("I64", ()),
        "scaled.weight": TensorSpec("F8_E4M3", (2,)),
    },
    dtype="BF16",
)
ALL = (
    ("embed.weight", "BF16", (8, 4)),
    ("norm.weight", "F16", (4,)),
    ("steps", "I64", ()),
    ("scaled.weight", "F8_E4M3", (2,)),
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_of(*given: tuple[str, str, tuple[int, ...]]) -> WeightCheck:
    check = WeightCheck(EXPECTED)
    for name, dtype, shape in given:
        check.add(name, TensorSpec(dtype, shape))
    return check


def test_what_the_model_takes_passes_in_any_order_and_any_roundable_dtype():
    check_of(*ALL).finish()
    check_of(*reversed(ALL)).finish()
    check_of(("norm.weight", "BF16", (4,)), ("embed.weight", "F32", (8, 4)))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            ("embed.weights", "BF16", (8, 4)),
            r"no tensor 'embed.weights'; it has 'embed",
        ),
        (
            ("embed.weight", "BF16", (4, 8)),
            r"'embed.weight' has shape \[4, 8\].*\[8, 4",
        ),
        (("embed.weight", "BF16", (32,)), r"shape \[32\]"),
        (("embed.weight", "F64", (8, 4)), "dtype F64; the model's has BF16.*float"),
        (("embed.weight", "F8_E4M3", (8, 4)), "dtype F8_E4M3"),
        (("steps", "F32", ()), "dtype F32; the model's has I64"),
        (("scaled.weight", "BF16", (2,)), "checkpoint is quantised.*with their scales"),
        (("lm_head.weight", "BF16", (8, 4)), "no tensor 'lm_head.weight'"),
    ],
)
def test_what_it_does_not_take_is_refused(given, match):
    with pytest.raises(WeightUpdateError, match=match):
        check_of(given)


def test_twice_and_never_are_refused():
    with pytest.raises(WeightUpdateError, match="given twice"):
        check_of(("steps", "I64", ()), ("steps", "I64", ()))
    with pytest.raises(WeightUpdateError, match="given twice"):
        check_of(("steps", "I64", ()), ("module.steps", "I64", ()))
    with pytest.raises(WeightUpdateError, match=r"3 of the model's 4.*'embed.weight'"):
        check_of(("steps", "I64", ())).finish()


def test_what_models_compute_at_their_start_is_neither_needed_nor_in_the_way():
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    spec = TensorSpec("F32", (4,))
    check = WeightCheck(ModelSpec({inv_freq: spec, "w": spec}, "F32"))
    check.add("w", spec)
    check.finish()
    assert check.add(inv_freq, spec) is None
    assert check_of().add(inv_freq, spec) is None


@pytest.mark.parametrize(
    ("checkpoint", "engine", "given", "written"),
    [
        ("BF16", "BF16", "F32", "BF16"),  # master weights
        ("F16", "F16", "F32", "F16"),
        ("BF16", "BF16", "F16", "F16"),  # saves nothing: left to the engine
        ("BF16", "F32", "F32", "F32"),  # the engine computes in all of it
        ("F32", "BF16", "F32", "F32"),  # which it may keep whole
        ("BF16", "F16", "F32", "F32"),
        ("F32", "F32", "BF16", "BF16"),
        ("F8_E4M3", "BF16", "F8_E4M3", "F8_E4M3"),
    ],
)
def test_a_tensor_is_rounded_only_where_every_engine_would(
    checkpoint, engine, given, written
):
    model = ModelSpec({"w": TensorSpec(checkpoint, (2,))}, engine)
    accepted = WeightCheck(model).add("w", TensorSpec(given, (2,)))
    assert accepted == ("w", written, False)


def tied(*names: str) -> ModelSpec:
    spec = TensorSpec("F32", (8, 4))
    return ModelSpec(dict.fromkeys(names, spec), "F32", list(names))


@pytest.mark.parametrize("names", [(EMBEDDING,), (EMBEDDING, HEAD)])
@pytest.mark.parametrize("given", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_of_tied_names_one_is_enough_and_the_other_a_copy(names, given):
    model, spec = tied(*names), TensorSpec("F32", (8, 4))
    check = WeightCheck(model)
    accepted = [check.add(name, spec) for name in given]
    check.finish()
    assert [a.key for a in accepted] == [EMBEDDING] * len(given)
    assert [a.is_copy for a in accepted] == [False, True][: len(given)]
    assert model.names_of(EMBEDDING) == list(names)
    with pytest.raises(WeightUpdateError, match="given twice"):
        check.add(given[0], spec)


def test_the_least_that_is_written_counts_what_is_tied_once():
    assert EXPECTED.least_bytes == 2 * 32 + 2 * 4 + 8 + 2
    assert tied(EMBEDDING, HEAD).least_bytes == 2 * 32
