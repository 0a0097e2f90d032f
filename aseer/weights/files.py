"""Where an update's tensors lie: an index of byte ranges in files that engines map.

The files are a checkpoint's own safetensors files, which are not copied, or one file in
shared memory that the sender wrote. Engines map them, so that a tensor is in memory
once, however many read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.errors import WeightUpdateError
from aseer.weights.checks import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

INDEX = "index.json"
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPE_NAMES = {torch_name: name for name, torch_name in _TORCH_DTYPES.items()}


class Tensor(msgspec.Struct, frozen=True):
    """One tensor's place: `num_bytes` from `offset` of file number `file`."""

    name: str
    spec: TensorSpec
    file: int
    offset: int
    num_bytes: int


class Index(msgspec.Struct, frozen=True):
    """Every tensor of an update, in the order in which engines load them."""

    files: list[str]
    tensors: list[Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def write(self, path: Path) -> None:
        """Write it for `read_index`."""
        path.write_bytes(msgspec.json.encode(self))


def read_index(path: str) -> Index:
    """An index that was written; the files' sizes are checked against it.

    Raises:
        WeightUpdateError: a file is not there, or too short.
    """
    index = msgspec.json.decode(Path(path).read_bytes(), type=Index)
    try:
        sizes = [Path(file).stat().st_size for file in index.files]
    except OSError as error:
        raise WeightUpdateError(f"a file of the weights is gone: {error}") from error
    for tensor in index.tensors:
        if tensor.offset + tensor.num_bytes > sizes[tensor.file]:
            raise WeightUpdateError(
                f"{index.files[tensor.file]} ends before tensor {tensor.name!r} does"
            )
    return index


def index_checkpoint(directory: Path) -> Index:
    """The tensors of a directory's safetensors files, as their headers have it.

    Where there is a `model.safetensors.index.json`, what it names counts.

    Raises:
        WeightUpdateError: no such files, or broken ones.
    """
    listing = directory / "model.safetensors.index.json"
    if listing.is_file():
        weight_map = json.loads(listing.read_text())["weight_map"]
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise WeightUpdateError(f"{directory} has no *.safetensors files")
    tensors: list[Tensor] = []
    for number, path in enumerate(paths):
        try:
            tensors += _tensors_of(path, number)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightUpdateError(f"{path} is not a safetensors file: {error}") from (
                error
            )
    return Index([str(path.resolve()) for path in paths], tensors)


def specs_of_model(model: str, revision: str | None) -> dict[str, TensorSpec]:
    """What the checkpoint that an engine was started from holds, by name.

    Args:
        model: a directory, or the name of a model in the Hugging Face cache.
        revision: of a named model.
    Raises:
        WeightUpdateError: it is not a safetensors checkpoint.
    """
    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        try:
            found = snapshot_download(
                model, revision=revision, local_files_only=True, allow_patterns=patterns
            )
        except (OSError, ValueError) as error:  # not there; no name of a model
            raise WeightUpdateError(
                f"the checkpoint of {model!r} is not at hand, to compare with: {error}"
            ) from error
        directory = Path(found)
    return {t.name: t.spec for t in index_checkpoint(directory).tensors}


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a torch dtype; torch's own if it has none."""
    own = str(dtype).removeprefix("torch.")
    return _DTYPE_NAMES.get(own, own)


def map_tensors(index: Index) -> Iterator[tuple[str, Any]]:
    """Every tensor as a torch tensor in mapped memory, to be read and not kept."""
    import torch

    maps: dict[int, Any] = {}
    for tensor in index.tensors:
        if tensor.file not in maps:
            path = index.files[tensor.file]
            size = Path(path).stat().st_size
            maps[tensor.file] = torch.from_file(path, size=size, dtype=torch.uint8)
        part = maps[tensor.file][tensor.offset : tensor.offset + tensor.num_bytes]
        dtype = getattr(torch, _TORCH_DTYPES[tensor.spec.dtype])
        if tensor.offset % dtype.itemsize:
            part = part.clone()  # torch views aligned bytes only
        yield tensor.name, part.view(dtype).view(tensor.spec.shape)


def _tensors_of(path: Path, number: int) -> list[Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = _HEADER_LENGTH_BYTES + length
    return [
        Tensor(
            name=name,
            spec=TensorSpec(entry["dtype"], tuple(entry["shape"])),
            file=number,
            offset=start + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
