"""A source that holds all its tensors, checked as a whole before anything is sent.

What engines read straight from a trainer's GPUs cannot be checked on the way: by then
they have begun to change. So names, shapes and dtypes of all tensors are compared with
the model's first, and the values that this process has are looked at. Of a sharded
tensor these are its own part; what other processes have is theirs to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from aseer.errors import WeightUpdateError
from aseer.weights.adapters import has_adapters
from aseer.weights.checks import TensorSpec, WeightCheck
from aseer.weights.experts import parts_of
from aseer.weights.files import torch_dtype
from aseer.weights.finite import FiniteCheck
from aseer.weights.sending import module_of, shared_names
from aseer.weights.writer import spec_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aseer.weights.checks import ModelSpec
    from aseer.weights.experts import Part
    from aseer.weights.sending import WeightSource


class _Tensor(NamedTuple):
    """One of the source's tensors, and what is sent of it."""

    values: Any
    sent: list[_Sent]


class _Sent(NamedTuple):
    """A tensor, or a part of one; `names` are those that engines are given it by."""

    part: Part
    spec: TensorSpec
    names: list[str]


class HeldTensors:
    """What is sent of a source, in its order."""

    def __init__(
        self, source: WeightSource, model: ModelSpec, transfer: str, device: str
    ) -> None:
        """Check all tensors.

        Args:
            transfer: how they are to be sent, for errors.
            device: type of the device that they must be on.
        Raises:
            WeightUpdateError: the model does not take them, or they cannot be sent so.
        """
        self._transfer, self._device = transfer, device
        self._tensors: list[_Tensor] = []
        tensors = _mapping_of(source, transfer)
        shared = shared_names(tensors, model)
        check, finite = WeightCheck(model), FiniteCheck()
        first: dict[str, Any] = {}
        for name, values in tensors.items():
            spec = spec_of(name, values)
            sent: list[_Sent] = []
            self._tensors.append(_Tensor(values, sent))
            for part in parts_of(name, spec.shape, model.tensors):
                given = TensorSpec(spec.dtype, part.shape)
                accepted = None if name in shared else check.add(part.name, given)
                if accepted is None:
                    continue
                own = _own_part(values).detach()
                self._check_device(name, own)
                if accepted.is_copy:
                    _check_copies(name, own, first[accepted.key])
                    continue
                first.setdefault(accepted.key, own)
                if not sent:  # all parts of a tensor are looked at together
                    finite.add(name, own.to(torch_dtype(accepted.dtype)))
                written = TensorSpec(accepted.dtype, part.shape)
                sent.append(_Sent(part, written, model.names_of(accepted.key)))
        check.finish()
        finite.finish()

    @property
    def sent(self) -> list[tuple[str, TensorSpec]]:
        """Names and specs of what `pairs` gives."""
        return [
            (name, sent.spec)
            for tensor in self._tensors
            for sent in tensor.sent
            for name in sent.names
        ]

    @property
    def num_bytes(self) -> int:
        """Of all that is sent."""
        return sum(spec.num_bytes for _, spec in self.sent)

    @property
    def largest_bytes(self) -> int:
        """Of the largest tensor."""
        return max((spec.num_bytes for _, spec in self.sent), default=0)

    @property
    def device(self) -> Any:
        """Where the first tensor is."""
        return next(_own_part(t.values).device for t in self._tensors if t.sent)

    def pairs(self) -> Iterator[tuple[str, Any]]:
        """Names and whole tensors, one gathered at a time, rounded as engines would.

        Every process of a sharded trainer must take them all: to gather one is a call
        in which all take part. So what is not sent is gathered, too.
        """
        for values, every in self._tensors:
            gather = getattr(values, "full_tensor", None)
            whole = values.detach() if gather is None else gather().detach()
            for part, spec, names in every:
                own = part.of(whole).to(torch_dtype(spec.dtype)).contiguous()
                for name in names:
                    yield name, own

    def _check_device(self, name: str, values: Any) -> None:
        if values.device.type != self._device:
            raise WeightUpdateError(
                f"tensor {name!r} is on {values.device}, and transfer="
                f"{self._transfer!r} reads weights where a trainer on GPUs has them; "
                "give tensors that are on a GPU, or use transfer='host'"
            )


def is_held_on(source: WeightSource, device: str) -> bool:
    """Whether a source has all its tensors at hand, on devices of that type."""
    try:
        tensors = _mapping_of(source, "auto")
    except WeightUpdateError:
        return False
    types = {getattr(_own_part(t).device, "type", "") for t in tensors.values()}
    return types == {device}


def check_kind(source: WeightSource, transfer: str) -> None:
    """See that a source is of a kind that has all its tensors at hand; ask it for none.

    Raises:
        WeightUpdateError: it is not.
    """
    source = module_of(source)
    if has_adapters(source):
        raise WeightUpdateError(
            f"adapters are merged a layer at a time, and transfer={transfer!r} needs "
            "all tensors before it begins; use transfer='host'"
        )
    if not (hasattr(source, "state_dict") or isinstance(source, Mapping)):
        raise WeightUpdateError(
            f"transfer={transfer!r} takes an nn.Module or a state_dict, whose tensors "
            "are all at hand to be checked before engines change, and not a "
            f"{type(source).__name__}; use transfer='host'"
        )


def _mapping_of(source: WeightSource, transfer: str) -> Mapping[str, Any]:
    check_kind(source, transfer)
    source = module_of(source)
    if not hasattr(source, "state_dict"):
        return source  # type: ignore[no-any-return]
    tensors = source.state_dict()
    check_kind(tensors, transfer)
    return tensors  # type: ignore[no-any-return]


def _own_part(values: Any) -> Any:
    """What this process has of a tensor."""
    return values.to_local() if hasattr(values, "to_local") else values


def _check_copies(name: str, values: Any, others: Any) -> None:
    if not values.equal(others):
        raise WeightUpdateError(
            f"{name!r} and the embedding differ, but the engine has one tensor for "
            "both, as its checkpoint has (tie_word_embeddings). Tie them in training; "
            "or start the engine from a checkpoint that has both, with "
            "tie_word_embeddings=false"
        )
