"""Whether tensors are those that a model takes: names, shapes and dtypes. Pure.

Everything is checked while it is sent, before any engine changes anything.
"""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

import msgspec

from aseer.errors import WeightUpdateError
from aseer.weights.experts import parts_of
from aseer.weights.names import is_output_layer, is_weight, unwrapped

# Engines round one of these to another, as they do when they load a checkpoint.
ROUNDABLE = frozenset({"F32", "F16", "BF16"})
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_QUANTISED = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "I32"})
_MAX_NAMED = 4


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor's dtype, spelt as in safetensors files, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values; 0 for a dtype that is not known."""
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 0)


class ModelSpec(msgspec.Struct, frozen=True):
    """What an engine takes as new weights.

    Attributes:
        tensors: of the checkpoint that the engine was started from, by name.
        dtype: that the engine computes in.
        tied: names of the one tensor that is both the input embedding's and the output
            layer's, as far as the checkpoint has them, the embedding's first; empty if
            these are two tensors, or not known.
        optional: what the checkpoint has, and neither trainers nor what samples need:
            layers that predict more than the next token.
        max_lora_rank: of adapters that the engine computes with; 0 = with none, so that
            they are merged.
    """

    tensors: dict[str, TensorSpec]
    dtype: str
    tied: list[str] = []
    optional: list[str] = []
    max_lora_rank: int = 0

    def names_of(self, key: str) -> list[str]:
        """Names under which engines are given a tensor."""
        return self.tied if key in self.tied else [key]

    def dtype_to_send(self, key: str, given: str) -> str:
        """What a tensor of a given dtype is written as.

        It is rounded where engines would round it in any case, so that less is written:
        where the checkpoint has it in the dtype that the engine computes in, and that
        one is smaller.
        """
        wanted = self.tensors[key].dtype
        if wanted != self.dtype or not {given, wanted} <= ROUNDABLE:
            return given
        return wanted if DTYPE_BYTES[wanted] < DTYPE_BYTES[given] else given

    @property
    def least_bytes(self) -> int:
        """No complete weights are written in fewer bytes."""
        return self.bytes_if("", "")

    def bytes_if(self, wanted: str, written: str) -> int:
        """The least bytes of complete weights, if one dtype is written as another.

        Args:
            wanted: a dtype of the checkpoint.
        """
        smallest = dict.fromkeys(ROUNDABLE, "BF16") | {wanted: written}
        required = self.required
        return sum(
            TensorSpec(smallest.get(spec.dtype, spec.dtype), spec.shape).num_bytes
            for name, spec in self.tensors.items()
            if name in required
        )

    @property
    def required(self) -> set[str]:
        """What must be given; of tied names it is the first, for any of them."""
        names = self.tensors.keys() - set(self.tied[1:]) - set(self.optional)
        return {name for name in names if is_weight(name)}


class Accepted(NamedTuple):
    """A tensor that the model takes.

    Attributes:
        key: its name in the checkpoint; of tied names the embedding's.
        dtype: to write it as.
        is_copy: whether it came before under the other of two tied names, so that its
            values must be the same.
    """

    key: str
    dtype: str
    is_copy: bool


class WeightCheck:
    """Takes an update's tensors one by one and compares them with the model's."""

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._seen: dict[str, set[str]] = {}  # names, by key

    def knows(self, name: str, shape: tuple[int, ...] = ()) -> bool:
        """Whether it is a name of a tensor that the model has, or does without.

        Args:
            shape: as given; that of all of a layer's experts in one is known, too.
        """
        known = self._model.tensors
        own = unwrapped(name, known)
        if own in known or not is_weight(own) or self._is_tied(own):
            return True
        return len(parts_of(name, shape, known)) > 1

    def add(self, name: str, given: TensorSpec) -> Accepted | None:
        """Check the next tensor; None if engines do without it.

        Raises:
            WeightUpdateError: it is not one of the model's; says which and why.
        """
        own = unwrapped(name, self._model.tensors)
        if not is_weight(own):
            return None
        key = self._model.tied[0] if self._is_tied(own) else own
        wanted = self._model.tensors.get(key)
        if wanted is None:
            raise WeightUpdateError(
                f"the model has no tensor {name!r}{self._hint(name)}"
            )
        seen = self._seen.setdefault(key, set())
        if own in seen:
            raise WeightUpdateError(f"tensor {name!r} was given twice")
        is_copy = bool(seen)
        seen.add(own)
        if given.shape != wanted.shape:
            raise WeightUpdateError(
                f"tensor {name!r} has shape {list(given.shape)}; the model's has "
                f"{list(wanted.shape)}"
            )
        can_round = {given.dtype, wanted.dtype} <= ROUNDABLE
        if given.dtype != wanted.dtype and not can_round:
            raise WeightUpdateError(
                f"tensor {name!r} has dtype {given.dtype}; the model's has "
                f"{wanted.dtype}{_dtype_hint(given.dtype, wanted.dtype)}"
            )
        return Accepted(key, self._model.dtype_to_send(key, given.dtype), is_copy)

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            WeightUpdateError: something is.
        """
        tensors = self._model.tensors
        required = self._model.required - self._seen.keys()
        missing = [name for name in tensors if name in required]
        if missing:
            named = ", ".join(map(repr, missing[:_MAX_NAMED]))
            more = " and others" if len(missing) > _MAX_NAMED else ""
            raise WeightUpdateError(
                f"{len(missing)} of the model's {len(tensors)} tensors were not "
                f"given: {named}{more}"
            )

    def other_name(self, key: str, name: str) -> str:
        """The other name of a tied tensor that came twice."""
        own = unwrapped(name, self._model.tensors)
        return next(iter(self._seen[key] - {own}))

    def _is_tied(self, own: str) -> bool:
        if own in self._model.tensors:
            return own in self._model.tied
        return bool(self._model.tied) and is_output_layer(own)

    def _hint(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._model.tensors, n=1)
        return f"; it has {close[0]!r}" if close else ""


def _dtype_hint(given: str, wanted: str) -> str:
    if wanted in _QUANTISED and given in ROUNDABLE:
        return (
            ": the engine's checkpoint is quantised. Give the tensors quantised as it "
            "has them, with their scales; or start the engine from a checkpoint that "
            "is not, with engine_args={'quantization': ...}"
        )
    if given == "F64" and wanted in ROUNDABLE:
        return "; nobody trains in F64 on purpose: give it rounded, as .float()"
    return ""
