"""Tensors into one file that engines map: checked, rounded, and written once each.

A tensor that is no plain one with values at hand is refused by its name. Where there is
no room for the weights, that is said before any is written.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from aseer.errors import WeightUpdateError
from aseer.weights.blocks import BlockWriter
from aseer.weights.checks import TensorSpec, WeightCheck
from aseer.weights.files import (
    INDEX,
    Index,
    Tensor,
    dtype_name,
    map_tensors,
    no_place,
    torch_dtype,
)
from aseer.weights.finite import FiniteCheck, refuse_unless

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from io import FileIO
    from pathlib import Path
    from types import TracebackType

    from aseer.weights.checks import ModelSpec
    from aseer.weights.mappings import Mappings

DATA = "data"
"""Name of the file in an update's directory."""
_ALIGNMENT = 64
# Enough for all threads to have a block, and little beside a model: what is begun is
# held, and may be a copy in another dtype.
_MAX_BEGUN_BYTES = 64 << 20


class _Writing(NamedTuple):
    """A tensor that threads write; each of its parts is finite, or not."""

    name: str
    dtype: str
    num_bytes: int
    parts: list[Future[bool]]


class TensorWriter:
    """Writes an update's tensors, as a context manager; `finish` ends it."""

    def __init__(
        self,
        model: ModelSpec,
        directory: Path,
        mappings: Mappings | None = None,
        *,
        tensors_stay: bool = False,
    ) -> None:
        """`directory` is there already, for the index and the tensors.

        Args:
            mappings: where those of files that are written again are kept.
            tensors_stay: whether a tensor is not changed once it was given, so that
                the next is begun while it is written.
        """
        self._model = model
        self._check = WeightCheck(model)
        self._directory = directory
        self._mappings = mappings
        self._tensors_stay = tensors_stay
        self._writing: deque[_Writing] = deque()
        self._path = directory / DATA
        self._finite = FiniteCheck()
        self._need, self._is_known = model.least_bytes, False
        self._places: dict[str, Tensor] = {}
        self._file: FileIO
        self._offset = self._recycled = 0

    def __enter__(self) -> Self:
        try:
            # A file that an earlier update has no use for any more may be there.
            self._path.touch(mode=0o600)
            self._file = self._path.open("r+b", buffering=0)
            self._recycled = self._path.stat().st_size
            descriptor = self._file.fileno()
            mapped = self._mappings.of(descriptor) if self._mappings else None
            self._blocks = BlockWriter(descriptor, mapped)
        except OSError as error:
            raise no_place(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._blocks.close()
        self._file.close()

    def expect(self, num_bytes: int, *, is_known: bool) -> None:
        """See that there is room for all that is to be written.

        Args:
            is_known: whether it is exactly that, and not at least that.
        Raises:
            WeightUpdateError: there is not.
        """
        self._need, self._is_known = num_bytes, is_known
        free = free_bytes(self._directory) + self._recycled
        if num_bytes > free:
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
            is_here = values.device.type == "cpu"
            if is_copy or not is_here:
                self._finite.add(name, values)
            if is_copy:
                other = self._check.other_name(key, name)
                check_equal(name, values, other, self._written(key))
                return
            is_finite = self._append(name, key, TensorSpec(dtype, spec.shape), values)
        refuse_unless(is_finite, name, dtype)

    def finish(self) -> Index:
        """Write the index, once every tensor was.

        Raises:
            WeightUpdateError: one is missing, or has values that are not finite.
        """
        self._check.finish()
        self._settle(0)
        self._finite.finish()
        index = Index(
            [str(self._path)],
            [
                Tensor(name, place.spec, 0, place.offset, place.num_bytes)
                for key, place in self._places.items()
                for name in self._model.names_of(key)
            ],
        )
        try:
            self._blocks.finish()
            self._file.truncate(self._offset)  # what is empty was not written
        except OSError as error:
            raise self._no_room(free_bytes(self._directory)) from error
        index.write(self._directory / INDEX)
        return index

    def _append(self, name: str, key: str, spec: TensorSpec, values: Any) -> bool:
        """Write a tensor; whether it is finite, as far as that was looked at so far."""
        offset = -(-self._offset // _ALIGNMENT) * _ALIGNMENT
        if not self._places and not self._is_known:
            wanted = self._model.tensors[key].dtype
            self.expect(self._model.bytes_if(wanted, spec.dtype), is_known=False)
        num_bytes = values.numel() * values.itemsize
        is_finite = True
        if self._tensors_stay and values.device.type == "cpu":
            parts = self._blocks.begin(values, offset, spec.dtype)
            self._writing.append(_Writing(name, spec.dtype, num_bytes, parts))
            self._settle(_MAX_BEGUN_BYTES)
        else:
            try:
                is_finite = self._blocks.put(values, offset, spec.dtype)
            except OSError as error:
                raise self._no_room(free_bytes(self._directory)) from error
        self._places[key] = Tensor(key, spec, 0, offset, num_bytes)
        self._offset = offset + num_bytes
        return is_finite

    def _settle(self, num_bytes: int) -> None:
        """Wait until no more than so many bytes of the tensors that stay are left.

        Raises:
            WeightUpdateError: one has values that are not finite, or there is no room.
        """
        while self._writing and sum(w.num_bytes for w in self._writing) > num_bytes:
            name, dtype, _, parts = self._writing.popleft()
            try:
                is_finite = all(part.result() for part in parts)
            except OSError as error:
                raise self._no_room(free_bytes(self._directory)) from error
            refuse_unless(is_finite, name, dtype)

    def _written(self, key: str) -> Any:
        self._settle(0)
        try:
            self._blocks.finish()
        except OSError as error:
            raise self._no_room(free_bytes(self._directory)) from error
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


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"
