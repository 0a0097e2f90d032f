"""From what a trainer has to what engines map: checked, and written once.

Runs in the thread that asked for the update, since a sharded trainer's iterator may
have collectives in it that belong to that thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aseer.errors import WeightUpdateError
from aseer.weights.adapters import has_adapters, merged_weights
from aseer.weights.checks import ROUNDABLE, TensorSpec, WeightCheck
from aseer.weights.files import (
    INDEX,
    Index,
    Tensor,
    dtype_name,
    index_checkpoint,
    map_tensors,
)

if TYPE_CHECKING:
    from typing import TypeAlias

# A directory, a state_dict, an nn.Module, or (name, tensor) pairs.
WeightSource: TypeAlias = Any

_DATA = "data"
_ALIGNMENT = 64


class Sending:
    """Checks a source's tensors, one at a time, and puts them where engines map them.

    sending = Sending(source, expected, directory)
    for _ in sending: ...    # a step a tensor
    sending.index
    """

    def __init__(
        self, source: WeightSource, expected: Mapping[str, TensorSpec], directory: Path
    ) -> None:
        """Prepare; `directory`, made if need be, is for the index and the tensors.

        Raises:
            WeightUpdateError: the source is not one of those that are taken.
        """
        self._check = WeightCheck(expected)
        self._directory = directory
        self._source = source
        if not isinstance(source, str | Path) and _pairs_of(source) is None:
            raise WeightUpdateError(
                f"weights are a checkpoint's directory, a state_dict, an nn.Module or "
                f"an iterable of (name, tensor), not a {type(source).__name__}"
            )
        self._index = Index([], [])

    @property
    def index(self) -> Index:
        """What was sent, once all of it was."""
        return self._index

    def __iter__(self) -> Iterator[None]:
        """Send, a step a tensor.

        Raises:
            WeightUpdateError: a tensor is not what the model takes, or there is no
                room for it.
        """
        self._directory.mkdir(mode=0o700, parents=True)
        if isinstance(self._source, str | Path):
            yield from self._check_checkpoint(Path(self._source))
        else:
            yield from self._write_tensors()
        self._check.finish()
        self._index.write(self._directory / INDEX)

    def _check_checkpoint(self, directory: Path) -> Iterator[None]:
        self._index = index = index_checkpoint(directory)
        for tensor, (_, values) in zip(index.tensors, map_tensors(index), strict=True):
            self._check.add(tensor.name, tensor.spec, is_finite=_is_finite(values))
            yield

    def _write_tensors(self) -> Iterator[None]:
        path = self._directory / _DATA
        tensors: list[Tensor] = []
        offset = 0
        with path.open("xb", buffering=0) as file:
            for name, values in self._named_tensors():
                spec = TensorSpec(dtype_name(values.dtype), tuple(values.shape))
                self._check.add(name, spec, is_finite=_is_finite(values))
                data = _bytes_of(values)
                offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
                try:
                    file.seek(offset)
                    _write_all(file.fileno(), data)
                except OSError as error:
                    raise WeightUpdateError(
                        f"the weights do not fit at {path} ({error}); "
                        "EngineConfig(weights_dir=...) puts them elsewhere"
                    ) from error
                tensors.append(Tensor(name, spec, 0, offset, len(data)))
                offset += len(data)
                yield
            file.truncate(offset)  # what is empty was not written
        self._index = Index([str(path)], tensors)

    def _named_tensors(self) -> Iterator[tuple[str, Any]]:
        """The source's tensors, whole; of tied ones those that the model has."""
        places: set[tuple[int, tuple[int, ...]]] = set()
        extra = []
        is_held = isinstance(self._source, Mapping) or hasattr(
            self._source, "state_dict"
        )
        for name, values in _pairs_of(self._source) or ():
            whole = getattr(values, "full_tensor", None)  # a DTensor's
            tensor = whole() if whole is not None else values
            if not hasattr(tensor, "data_ptr"):
                raise WeightUpdateError(
                    f"{name!r} is a {type(tensor).__name__}, not a tensor"
                )
            tensor = tensor.detach()
            place = (tensor.data_ptr(), tuple(tensor.shape))
            if is_held and name not in self._check:
                extra.append((name, tensor, place))
                continue
            places.add(place)
            yield name, tensor
        for name, tensor, place in extra:
            if place not in places:
                yield name, tensor  # to be refused by its name


def _pairs_of(source: WeightSource) -> Iterable[tuple[str, Any]] | None:
    """(name, tensor) pairs; None if the source has none."""
    if has_adapters(source):
        return merged_weights(source)
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return source.items()
    return source if isinstance(source, Iterable) else None


def _is_finite(values: Any) -> bool:
    import torch

    if dtype_name(values.dtype) not in ROUNDABLE or not values.numel():
        return True
    # NaN and infinity come through as the least or the greatest value: one pass, and
    # no memory.
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _bytes_of(values: Any) -> memoryview:
    import torch

    flat = values.to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
