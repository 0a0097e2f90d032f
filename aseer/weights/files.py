"""Where an update's tensors lie: an index of byte ranges in files that engines map.

The files are a checkpoint's own safetensors files, which are not copied, or one file in
shared memory that the sender wrote. Engines map them, so that a tensor is in memory
once, however many read it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
from msgspec import structs

from aseer.errors import WeightUpdateError
from aseer.weights.checks import DTYPE_BYTES, ModelSpec, TensorSpec
from aseer.weights.names import embedding_of, is_output_layer, predicts_further

if TYPE_CHECKING:
    from collections.abc import Iterator

INDEX = "index.json"
_LISTING = "model.safetensors.index.json"
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
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
    """Every tensor of an update, in the order in which engines load them.

    Attributes:
        lora_rank: of adapters (LoRA), of which the first file has all, as PEFT names
            them; 0 = the tensors are a model's own.
    """

    files: list[str]
    tensors: list[Tensor]
    lora_rank: int = 0

    @property
    def num_bytes(self) -> int:
        """Of all tensors; of one with two names once."""
        places = {(t.file, t.offset, t.num_bytes) for t in self.tensors}
        return sum(num_bytes for _, _, num_bytes in places)

    def write(self, path: Path) -> None:
        """Write it for `read_index`.

        Raises:
            WeightUpdateError: there is no room.
        """
        try:
            path.write_bytes(msgspec.json.encode(self))
        except OSError as error:
            raise no_place(error) from error


def make_directory(directory: Path) -> None:
    """Make an update's directory, which belongs to this user alone.

    Raises:
        WeightUpdateError: it cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise no_place(error) from error


def no_place(error: OSError) -> WeightUpdateError:
    """What to raise where the system makes no file."""
    return WeightUpdateError(
        f"there is no place for the new weights: {error}; "
        "EngineConfig(weights_dir=...) puts them elsewhere"
    )


def read_index(path: str) -> Index:
    """An index that was written; the files' sizes are checked against it.

    Raises:
        WeightUpdateError: a file is not there, or too short.
    """
    try:
        index = msgspec.json.decode(Path(path).read_bytes(), type=Index)
        _check_sizes(index)
    except (OSError, msgspec.MsgspecError) as error:
        raise WeightUpdateError(f"the new weights are gone: {error}") from error
    return index


class OpenIndex:
    """An index whose files are held open, so that their names may go meanwhile."""

    def __init__(self, path: str) -> None:
        """Open what `Index.write` wrote, and its files.

        Raises:
            WeightUpdateError: a file is not there, or too short.
        """
        self._index = index = read_index(path)
        self._files: list[BinaryIO] = []
        try:
            for name in index.files:
                self._files.append(Path(name).open("rb"))
        except OSError as error:
            self.close()
            raise WeightUpdateError(f"the new weights are gone: {error}") from error

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """As `map_tensors`.

        Raises:
            WeightUpdateError: a file was cut off since.
        """
        numbers = [file.fileno() for file in self._files]
        _check_ends(self._index, [os.fstat(number).st_size for number in numbers])
        opened = [f"/proc/self/fd/{number}" for number in numbers]
        return map_tensors(structs.replace(self._index, files=opened))

    def close(self) -> None:
        """Let the files go."""
        for file in self._files:
            file.close()


def index_checkpoint(directory: Path) -> Index:
    """The tensors of a directory's safetensors files, as their headers have it.

    Where there is a `model.safetensors.index.json`, what it names counts.

    Raises:
        WeightUpdateError: no such files, or broken ones.
    """
    listing = directory / _LISTING
    paths = sorted(directory.glob("*.safetensors"))
    if listing.is_file():
        paths = _listed(listing)
    if not paths:
        raise WeightUpdateError(f"{directory} has no *.safetensors files")
    tensors: list[Tensor] = []
    for number, path in enumerate(paths):
        try:
            tensors += _tensors_of(path, number)
        except OSError as error:
            raise WeightUpdateError(f"the checkpoint is not whole: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightUpdateError(f"{path} is not a safetensors file: {error}") from (
                error
            )
    index = Index([str(path.resolve()) for path in paths], tensors)
    try:
        _check_sizes(index)
    except OSError as error:
        raise WeightUpdateError(f"the checkpoint is not whole: {error}") from error
    return index


def describe_checkpoint(
    model: str,
    revision: str | None,
    dtype: str,
    *,
    declares_tied: bool,
    num_layers: int | None = None,
    max_lora_rank: int = 0,
) -> ModelSpec:
    """What an engine takes that was started from a checkpoint.

    Args:
        model: a directory, or the name of a model in the Hugging Face cache.
        revision: of a named model.
        dtype: that the engine computes in.
        declares_tied: whether the model's settings say that its output layer has the
            input embedding's weight. Where the checkpoint has both nevertheless,
            engines tie them only if they are equal.
        num_layers: of the language model; None = not known.
        max_lora_rank: see `ModelSpec`.
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
    index = index_checkpoint(directory)
    specs = {tensor.name: tensor.spec for tensor in index.tensors}
    optional = [name for name in specs if predicts_further(name, num_layers)]
    own = [tensor for tensor in index.tensors if tensor.name not in set(optional)]
    tied = _tied(Index(index.files, own), declares_tied=declares_tied)
    return ModelSpec(specs, dtype, tied, optional, max_lora_rank)


def _tied(index: Index, *, declares_tied: bool) -> list[str]:
    names = [tensor.name for tensor in index.tensors]
    embedding = embedding_of(names)
    heads = [name for name in names if is_output_layer(name)]
    if embedding is None or len(heads) > 1:
        return []
    if heads:
        pair = [t for t in index.tensors if t.name in (embedding, heads[0])]
        if not declares_tied or pair[0].spec != pair[1].spec:
            return []
        one, other = (values for _, values in map_tensors(Index(index.files, pair)))
        if not one.equal(other):
            return []
    return [embedding, *heads]


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a torch dtype; torch's own if it has none."""
    own = str(dtype).removeprefix("torch.")
    return _DTYPE_NAMES.get(own, own)


def torch_dtype(name: str) -> Any:
    """The torch dtype of a safetensors name, or of torch's own name.

    Raises:
        WeightUpdateError: there is none.
    """
    import torch

    found = getattr(torch, _TORCH_DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise WeightUpdateError(f"tensors of dtype {name} are not known to torch")
    return found


def map_tensors(index: Index) -> Iterator[tuple[str, Any]]:
    """Every tensor as a torch tensor in mapped memory, to be read and not kept.

    Raises:
        WeightUpdateError: a file is gone, or cannot be mapped.
    """
    maps: dict[int, Any] = {}
    for tensor in index.tensors:
        if tensor.file not in maps:
            maps[tensor.file] = _map(index.files[tensor.file])
        part = maps[tensor.file][tensor.offset : tensor.offset + tensor.num_bytes]
        dtype = torch_dtype(tensor.spec.dtype)
        if tensor.offset % dtype.itemsize:
            part = part.clone()  # torch views aligned bytes only
        yield tensor.name, part.view(dtype).view(tensor.spec.shape)


def _map(path: str) -> Any:
    import torch

    try:
        size = Path(path).stat().st_size
        return torch.from_file(path, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise WeightUpdateError(f"the weights' file is gone: {error}") from error


def _listed(listing: Path) -> list[Path]:
    """The files that a checkpoint's own index names."""
    try:
        names = set(json.loads(listing.read_bytes())["weight_map"].values())
        return [listing.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightUpdateError(
            f"{listing} is not an index of a checkpoint: {error!r}"
        ) from error


def _check_sizes(index: Index) -> None:
    _check_ends(index, [Path(file).stat().st_size for file in index.files])


def _check_ends(index: Index, sizes: list[int]) -> None:
    for tensor in index.tensors:
        if tensor.offset + tensor.num_bytes > sizes[tensor.file]:
            raise WeightUpdateError(
                f"{index.files[tensor.file]} ends before tensor {tensor.name!r} does"
            )


def _tensors_of(path: Path, number: int) -> list[Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = _HEADER_LENGTH_BYTES + length
    return [_tensor_of(name, entry, number, start) for name, entry in header.items()]


def _tensor_of(name: str, entry: dict[str, Any], file: int, start: int) -> Tensor:
    begin, end = entry["data_offsets"]
    spec = TensorSpec(entry["dtype"], tuple(entry["shape"]))
    is_whole = spec.dtype not in DTYPE_BYTES or spec.num_bytes == end - begin
    if not 0 <= begin <= end or min(spec.shape, default=0) < 0 or not is_whole:
        raise ValueError(f"tensor {name!r} ({entry}) does not fit its bytes")
    return Tensor(name, spec, file, start + begin, end - begin)
