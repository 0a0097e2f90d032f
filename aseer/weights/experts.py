"""Experts in one tensor, as trainers have them, and one by one, as checkpoints do.

Pure. transformers from 5.0 on keeps the matrices of all of a layer's experts in one
tensor, the gate's and the up projection's in the same, and takes them apart when it
saves a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aseer.weights.names import unwrapped

if TYPE_CHECKING:
    from collections.abc import Container

# Names of a checkpoint's matrices in a fused tensor, in order; either of two spellings.
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


class Part(NamedTuple):
    """A checkpoint's tensor within a given one.

    Attributes:
        expert: its place along the first dimension; None = the part is all of it.
        rows: from and to, of the expert's matrix.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)

    def of(self, values: Any) -> Any:
        """The part of a whole tensor."""
        if self.expert is None:
            return values
        return values[self.expert][slice(*self.rows)]


def parts_of(name: str, shape: tuple[int, ...], known: Container[str]) -> list[Part]:
    """What the checkpoint has of a tensor: itself, or each expert's matrices.

    Args:
        name, shape: of the tensor that is given.
        known: the checkpoint's names.
    """
    own = unwrapped(name, known)
    prefix, _, last = own.rpartition(".")
    spellings = _FUSED.get(last)
    if own in known or spellings is None or len(shape) != 3:
        return [Part(name, shape)]
    num_experts, num_rows, num_columns = shape
    for layers in spellings:
        # The first expert's names tell whether it is this spelling, and wrappers.
        first = unwrapped(f"{prefix}.0.{layers[0]}.weight", known)
        if first not in known or num_rows % len(layers):
            continue
        prefix = first.removesuffix(f".0.{layers[0]}.weight")
        size = num_rows // len(layers)
        return [
            Part(
                f"{prefix}.{expert}.{layer}.weight",
                (size, num_columns),
                expert,
                (i * size, (i + 1) * size),
            )
            for expert in range(num_experts)
            for i, layer in enumerate(layers)
        ]
    return [Part(name, shape)]
