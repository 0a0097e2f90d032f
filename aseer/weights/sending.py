"""From what a trainer has to what engines map: checked, and written once.

Runs in the thread that asked for the update, since a sharded trainer's iterator may
have collectives in it that belong to that thread. A source is asked for its tensors
once: `state_dict()` of a sharded model gathers it from all processes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from aseer.errors import WeightUpdateError
from aseer.weights.adapters import has_adapters, merged_weights
from aseer.weights.checks import TensorSpec, WeightCheck
from aseer.weights.experts import parts_of
from aseer.weights.files import (
    INDEX,
    Index,
    index_checkpoint,
    map_tensors,
)
from aseer.weights.finite import FiniteCheck
from aseer.weights.lora import send_adapters
from aseer.weights.writer import (
    TensorWriter,
    check_equal,
    spec_of,
)

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import TypeAlias

    from aseer.weights.checks import ModelSpec
    from aseer.weights.files import Tensor
    from aseer.weights.mappings import Mappings

# Sending, a tensor a step; what comes of it is what was sent.
_Steps: TypeAlias = "Generator[None, None, Index]"
# A directory, a state_dict, an nn.Module, or (name, tensor) pairs.
WeightSource: TypeAlias = Any

_KINDS = (
    "weights are a checkpoint's directory, a state_dict, an nn.Module or an iterable "
    "of (name, tensor)"
)
_DATA_PARALLEL = frozenset({"DistributedDataParallel", "DataParallel"})


def check_source(source: WeightSource, *, awaits: bool) -> None:
    """See what kind of source it is, and take nothing from it.

    Args:
        awaits: whether an async iterable may be given.
    Raises:
        WeightUpdateError: it is not one of those that are taken.
    """
    if isinstance(source, str | os.PathLike):
        try:
            is_there, why = Path(source).is_dir(), ""
        except OSError as error:  # it may not be looked at, or is no path
            is_there, why = False, f" ({error.strerror})"
        if not is_there:
            raise WeightUpdateError(
                f"{_KINDS}; there is no directory {os.fspath(source)!r:.300}{why}"
            )
        return
    is_class = isinstance(source, type)
    if not is_class and (has_adapters(source) or hasattr(source, "state_dict")):
        return
    if isinstance(source, AsyncIterable):
        if not awaits:
            raise WeightUpdateError(
                f"{_KINDS}; an async iterable needs `await Engine.update_weights(...)`"
            )
        return
    is_bytes = isinstance(source, bytes | bytearray)
    is_number = getattr(source, "shape", None) == ()
    if is_class or is_bytes or is_number or not isinstance(source, Iterable):
        raise WeightUpdateError(f"{_KINDS}, not a {type(source).__name__}")


def send(
    source: WeightSource,
    model: ModelSpec,
    directory: Path,
    mappings: Mappings | None = None,
) -> Index:
    """Check a source's tensors, one at a time, and put them where engines map them.

    Args:
        source: that `check_source` took.
        directory: there already, for the index and the tensors.
        mappings: see `TensorWriter`.
    Raises:
        WeightUpdateError: a tensor is not what the model takes, or there is no room.
    """
    sending = _Sending(_steps(source, model, directory, mappings))
    for _ in sending:
        pass
    return sending.index


async def send_async(
    source: WeightSource,
    model: ModelSpec,
    directory: Path,
    mappings: Mappings | None = None,
) -> Index:
    """As `send`; other tasks of the event loop run between two tensors.

    Raises:
        WeightUpdateError: as there.
    """
    if isinstance(source, AsyncIterable):
        return await _write_async(source, model, directory, mappings)
    sending = _Sending(_steps(source, model, directory, mappings))
    for _ in sending:
        await asyncio.sleep(0)
    return sending.index


class _Sending:
    """Sends as it is iterated over, a tensor a step; then `index` is what was sent."""

    index: Index

    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[None]:
        self.index = yield from self._steps


def _steps(
    source: WeightSource, model: ModelSpec, directory: Path, mappings: Mappings | None
) -> _Steps:
    if isinstance(source, str | os.PathLike):
        return (yield from _check_checkpoint(Path(source), model, directory))
    source = module_of(source)
    if has_adapters(source) and model.max_lora_rank:
        return send_adapters(source, model, directory)
    pairs = _pairs_of(source)
    # Another mapping may make each tensor in the memory of the one before.
    stays = isinstance(pairs, dict)
    with TensorWriter(model, directory, mappings, tensors_stay=stays) as writer:
        shared: frozenset[str] = frozenset()
        if isinstance(pairs, Mapping):
            shared = shared_names(pairs, model)
            kept = {k: values for k, values in pairs.items() if k not in shared}
            writer.expect(_bytes_to_write(kept, model), is_known=True)
            pairs = pairs.items()
        else:
            writer.expect(model.least_bytes, is_known=False)
        for pair in pairs:
            name, tensor = _whole(pair)
            if name not in shared:
                _write(name, tensor, model, writer)
            yield
        return writer.finish()


async def _write_async(
    source: AsyncIterable[object],
    model: ModelSpec,
    directory: Path,
    mappings: Mappings | None,
) -> Index:
    async with AsyncExitStack() as stack:
        writer = stack.enter_context(TensorWriter(model, directory, mappings))
        if isinstance(source, AsyncGenerator):
            # Its own clean-up is over before the caller learns how this ended.
            await stack.enter_async_context(aclosing(source))
        writer.expect(model.least_bytes, is_known=False)
        async for pair in source:
            _write(*_whole(pair), model, writer)
            await asyncio.sleep(0)
        return writer.finish()


def _check_checkpoint(source: Path, model: ModelSpec, directory: Path) -> _Steps:
    """Its files are mapped where they are; only an index of them is made."""
    check, finite = WeightCheck(model), FiniteCheck()
    index = index_checkpoint(source)
    taken: dict[str, Tensor] = {}
    tied: Any = None
    for tensor, (_, values) in zip(index.tensors, map_tensors(index), strict=True):
        accepted = check.add(tensor.name, tensor.spec)
        if accepted is not None:
            finite.add(tensor.name, values)
            if accepted.is_copy:
                check_equal(tensor.name, values, taken[accepted.key].name, tied)
            else:
                taken[accepted.key] = tensor
            if accepted.key in model.tied:
                tied = values
        yield
    check.finish()
    tensors = [
        structs.replace(tensor, name=name)
        for key, tensor in taken.items()
        for name in model.names_of(key)
    ]
    index = Index(index.files, tensors)
    index.write(directory / INDEX)
    return index


def module_of(source: WeightSource) -> WeightSource:
    """A source without what data-parallel training puts around it."""
    return source.module if type(source).__name__ in _DATA_PARALLEL else source


def _pairs_of(source: WeightSource) -> Mapping[str, Any] | Iterable[object]:
    """A mapping if the source holds all its tensors, else pairs as they come."""
    if has_adapters(source):
        return merged_weights(source)
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    return source  # type: ignore[no-any-return]


def _whole(pair: object) -> tuple[str, Any]:
    """A name and its tensor, gathered if it is sharded: a DTensor.

    All processes gather all of a source's tensors, so that none waits for another.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise WeightUpdateError(
            f"{_KINDS}; this iterable gave a {type(pair).__name__}, which is no pair"
        )
    name, values = pair
    if not isinstance(name, str):  # before it is looked for among names
        raise WeightUpdateError(f"{_KINDS}; a name is a {type(name).__name__}")
    gather = getattr(values, "full_tensor", None)
    return name, values if gather is None else gather()


def _write(name: str, values: Any, model: ModelSpec, writer: TensorWriter) -> None:
    """Write a tensor as the checkpoint has it."""
    for part in parts_of(name, spec_of(name, values).shape, model.tensors):
        writer.write(part.name, part.of(values))


def shared_names(tensors: Mapping[str, Any], model: ModelSpec) -> frozenset[str]:
    """Names that the model lacks, of tensors that it has by another name.

    Saved checkpoints leave out what layers share, `state_dict` does not.
    """
    check = WeightCheck(model)
    unknown = {
        name
        for name, values in tensors.items()
        if isinstance(name, str)
        and not check.knows(name, tuple(getattr(values, "shape", ())))
    }
    if not unknown:
        return frozenset()
    places = {_place(tensors[name]) for name in tensors if name not in unknown}
    return frozenset(
        name for name in unknown if (place := _place(tensors[name])) and place in places
    )


def _place(values: Any) -> tuple[int, tuple[int, ...]] | None:
    """Where a tensor's own values are, and its shape; None if that is not known."""
    with suppress(AttributeError, RuntimeError):
        local = values.to_local() if hasattr(values, "to_local") else values
        return (local.data_ptr(), tuple(values.shape)) if local.data_ptr() else None
    return None


def _bytes_to_write(tensors: Mapping[str, Any], model: ModelSpec) -> int:
    """What a source's tensors come to, after a first look at all of them.

    Raises:
        WeightUpdateError: the model does not take them.
    """
    check, num_bytes = WeightCheck(model), 0
    for name, values in tensors.items():
        spec = spec_of(name, values)
        for part in parts_of(name, spec.shape, model.tensors):
            accepted = check.add(part.name, TensorSpec(spec.dtype, part.shape))
            if accepted is not None and not accepted.is_copy:
                num_bytes += TensorSpec(accepted.dtype, part.shape).num_bytes
    check.finish()
    return num_bytes
