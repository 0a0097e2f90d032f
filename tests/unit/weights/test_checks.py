"""An update's tensors are the model's: what is not is named, with what was wanted."""

from __future__ import annotations

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.checks import TensorSpec, WeightCheck

EXPECTED = {
    "embed.weight": TensorSpec("BF16", (8, 4)),
    "norm.weight": TensorSpec("F32", (4,)),
    "steps": TensorSpec("I64", ()),
}


def check_of(*given: tuple[str, str, tuple[int, ...]]) -> WeightCheck:
    check = WeightCheck(EXPECTED)
    for name, dtype, shape in given:
        check.add(name, TensorSpec(dtype, shape), is_finite=True)
    return check


def test_what_the_model_takes_passes_in_any_order_and_any_roundable_dtype():
    check_of(("steps", "I64", ()), ("norm.weight", "BF16", (4,))).add(
        "embed.weight", TensorSpec("F32", (8, 4)), is_finite=True
    )
    check_of(
        ("norm.weight", "F16", (4,)),
        ("embed.weight", "BF16", (8, 4)),
        ("steps", "I64", ()),
    ).finish()


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
        (("embed.weight", "F64", (8, 4)), "dtype F64; the model's has BF16"),
        (("embed.weight", "F8_E4M3", (8, 4)), "dtype F8_E4M3"),
        (("steps", "F32", ()), "dtype F32; the model's has I64"),
    ],
)
def test_what_it_does_not_take_is_refused(given, match):
    with pytest.raises(WeightUpdateError, match=match):
        check_of(given)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(WeightUpdateError, match=r"'norm.weight' .*NaN or infinite"):
        WeightCheck(EXPECTED).add(
            "norm.weight", TensorSpec("F32", (4,)), is_finite=False
        )


def test_twice_and_never_are_refused():
    with pytest.raises(WeightUpdateError, match="given twice"):
        check_of(("steps", "I64", ()), ("steps", "I64", ()))
    with pytest.raises(WeightUpdateError, match=r"2 of the model's 3.*'embed.weight'"):
        check_of(("steps", "I64", ())).finish()
