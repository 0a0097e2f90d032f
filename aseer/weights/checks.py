"""Whether tensors are those that a model takes: names, shapes, dtypes, finite values.

Everything is checked while it is sent, before any engine changes anything.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import WeightUpdateError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Engines round one of these to another, as they do when they load a checkpoint.
ROUNDABLE = frozenset({"F32", "F16", "BF16"})
_MAX_NAMED = 4


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor's dtype, spelt as in safetensors files, and shape."""

    dtype: str
    shape: tuple[int, ...]


class WeightCheck:
    """Takes an update's tensors one by one and compares them with the model's."""

    def __init__(self, expected: Mapping[str, TensorSpec]) -> None:
        """`expected` is what the model's own checkpoint holds, by name."""
        self._expected = expected
        self._seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the model has a tensor of that name."""
        return name in self._expected

    def add(self, name: str, given: TensorSpec, *, is_finite: bool) -> None:
        """Check the next tensor.

        Raises:
            WeightUpdateError: it is not one of the model's; says which and why.
        """
        wanted = self._expected.get(name)
        if wanted is None:
            raise WeightUpdateError(
                f"the model has no tensor {name!r}{self._hint(name)}"
            )
        if name in self._seen:
            raise WeightUpdateError(f"tensor {name!r} was given twice")
        self._seen.add(name)
        if given.shape != wanted.shape:
            raise WeightUpdateError(
                f"tensor {name!r} has shape {list(given.shape)}; the model's has "
                f"{list(wanted.shape)}"
            )
        can_round = {given.dtype, wanted.dtype} <= ROUNDABLE
        if given.dtype != wanted.dtype and not can_round:
            raise WeightUpdateError(
                f"tensor {name!r} has dtype {given.dtype}; the model's has "
                f"{wanted.dtype}"
            )
        if not is_finite:
            raise WeightUpdateError(
                f"tensor {name!r} has values that are NaN or infinite"
            )

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            WeightUpdateError: something is.
        """
        missing = [name for name in self._expected if name not in self._seen]
        if missing:
            named = ", ".join(map(repr, missing[:_MAX_NAMED]))
            more = " and others" if len(missing) > _MAX_NAMED else ""
            raise WeightUpdateError(
                f"{len(missing)} of the model's {len(self._expected)} tensors were not "
                f"given: {named}{more}"
            )

    def _hint(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._expected, n=1)
        return f"; it has {close[0]!r}" if close else ""
