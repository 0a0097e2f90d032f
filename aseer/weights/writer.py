"""Tensors into one file that engines map: checked, rounded, and written once each.

A tensor that is no plain one with values at hand is refused by its name. Where there is
no room for the weights, that is said before any is written.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from aseer.errors import WeightUpdateError
from aseer.weights.checks import ROUNDABLE, TensorSpec, WeightCheck
from aseer.weights.files import (
    INDEX,
    Index,
    Tensor,
    dtype_name,
    map_tensors,
    no_place,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path
    from types import TracebackType

    from aseer.weights.checks import ModelSpec

_DATA = "data"
_ALIGNMENT = 64


class TensorWriter:
    """Writes an update's tensors, as a context manager; `finish` ends it."""

    def __init__(self, model: ModelSpec, directory: Path) -> None:
        """`directory` is there already, for the index and the tensors."""
        self._model = model
        self._check = WeightCheck(model)
        self._directory = directory
        self._path = directory / _DATA
        self._need = model.least_bytes
        self._places: dict[str, Tensor] = {}
        self._file: FileIO
        self._offset = 0

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("xb", buffering=0)
        except OSError as error:
            raise no_place(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def expect(self, num_bytes: int) -> None:
        """See that there is room for all that is to be written.

        Raises:
            WeightUpdateError: there is not.
        """
        self._need = num_bytes
        if num_bytes > (free := free_bytes(self._directory)):
            raise self._no_room(free)

    def write(self, name: str, given: Any) -> None:
        """Check the next tensor and write it; a tied one's second name is compared.

        Raises:
            WeightUpdateError: it is not what the model takes, or there is no room.
        """
        spec = spec_of(name, given)
        accepted = self._check.add(name, spec)
        if accepted is None:
            return
        key, dtype, is_copy = accepted
        with _reading(name, given):
            values = given.detach().to(torch_dtype(dtype))
            check_finite(name, values)
            if is_copy:
                other = self._check.other_name(key, name)
                check_equal(name, values, other, self._written(key))
                return
            data = _bytes_of(values)
        self._append(key, TensorSpec(dtype, spec.shape), data)

    def finish(self) -> Index:
        """Write the index, once every tensor was.

        Raises:
            WeightUpdateError: one is missing.
        """
        self._check.finish()
        index = Index(
            [str(self._path)],
            [
                Tensor(name, place.spec, 0, place.offset, place.num_bytes)
                for key, place in self._places.items()
                for name in self._model.names_of(key)
            ],
        )
        try:
            self._file.truncate(self._offset)  # what is empty was not written
        except OSError as error:
            raise self._no_room(free_bytes(self._directory)) from error
        index.write(self._directory / INDEX)
        return index

    def _append(self, key: str, spec: TensorSpec, data: memoryview) -> None:
        self._offset = -(-self._offset // _ALIGNMENT) * _ALIGNMENT
        try:
            self._file.seek(self._offset)
            _write_all(self._file.fileno(), data)
        except OSError as error:
            raise self._no_room(free_bytes(self._directory)) from error
        self._places[key] = Tensor(key, spec, 0, self._offset, len(data))
        self._offset += len(data)

    def _written(self, key: str) -> Any:
        _, values = next(map_tensors(Index([str(self._path)], [self._places[key]])))
        return values

    def _no_room(self, free: int) -> WeightUpdateError:
        return WeightUpdateError(
            f"the new weights need {_gigabytes(self._need)} at "
            f"{self._directory.parent}, beside those that the engines have; "
            f"{_gigabytes(free)} are free. Make room there (it is shared memory unless "
            "set: a container's --shm-size), or put them elsewhere with "
            "EngineConfig(weights_dir=...)"
        )


def free_bytes(directory: Path) -> int:
    """Free where a directory is."""
    found = os.statvfs(directory)
    # Of shared memory without a limit nobody says how large it is.
    return found.f_bavail * found.f_frsize if found.f_blocks else 1 << 62


def spec_of(name: object, values: Any) -> TensorSpec:
    """Dtype and shape of what should be a tensor with values.

    Raises:
        WeightUpdateError: it is not one.
    """
    import torch

    if not isinstance(name, str):
        raise WeightUpdateError(
            "weights are pairs of a name and a tensor; a name is a "
            f"{type(name).__name__}"
        )
    if not isinstance(values, torch.Tensor):
        hint = "; torch.from_numpy makes one" if hasattr(values, "__array__") else ""
        raise WeightUpdateError(
            f"{name!r} is a {type(values).__name__}, not a tensor{hint}"
        )
    with _reading(name, values):
        return _spec_of(name, values)


def _spec_of(name: str, values: Any) -> TensorSpec:
    import torch

    if values.is_meta:
        raise WeightUpdateError(
            f"tensor {name!r} has no values: it is on the meta device"
        )
    if values.is_nested or values.layout is not torch.strided:
        layout = "nested" if values.is_nested else str(values.layout)
        raise WeightUpdateError(
            f"tensor {name!r} is {layout}; weights are dense: give it .to_dense()"
        )
    return TensorSpec(dtype_name(values.dtype), tuple(values.shape))


def check_finite(name: str, values: Any) -> None:
    """Look at every value.

    Raises:
        WeightUpdateError: one is NaN or infinite.
    """
    import torch

    dtype = dtype_name(values.dtype)
    if dtype not in ROUNDABLE or not values.numel():
        return
    # NaN and infinity come through as the least or the greatest value: one pass, and
    # no memory.
    if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise WeightUpdateError(
            f"tensor {name!r} has values that are NaN or infinite as {dtype}"
        )


def check_equal(name: str, values: Any, other_name: str, others: Any) -> None:
    """Compare what came under two names that the engine has one tensor for.

    Raises:
        WeightUpdateError: they differ.
    """
    import torch

    if not torch.equal(others, values.to("cpu", others.dtype)):
        raise WeightUpdateError(
            f"{name!r} and {other_name!r} differ, but the engine has one tensor for "
            "both, as its checkpoint has (tie_word_embeddings). Tie them in training; "
            "or start the engine from a checkpoint that has both, with "
            "tie_word_embeddings=false"
        )


@contextmanager
def _reading(name: str, values: Any) -> Iterator[None]:
    """What torch says of a tensor that it cannot read, with the tensor's name."""
    try:
        yield
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        kind = type(values).__name__
        raise WeightUpdateError(
            f"tensor {name!r}, a {kind}, cannot be read: {error}"
        ) from error


def _bytes_of(values: Any) -> memoryview:
    import torch

    flat = values.to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"
