"""How tensors get from a trainer's GPUs into engines: CUDA IPC, and NCCL.

Each carrier is the trainer's half of one of vLLM's weight transfer engines. Either
sends buffers of many tensors, so that a thousand small ones cost no thousand calls.

ipc: each process of the trainer has one buffer on its GPU, which it fills, has the
engines of that GPU read, and fills again. Every GPU with an engine on it needs such a
process. What engines are told of a buffer is plain data; they load no pickle.

nccl: the process that has the engine broadcasts to all workers of all engines, which
are on other GPUs. Other processes of the trainer only gather with it.
"""

from __future__ import annotations

import socket
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aseer.errors import WeightUpdateError
from aseer.weights.blocks import bytes_of
from aseer.weights.files import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from aseer.weights.checks import TensorSpec
    from aseer.weights.held import HeldTensors

#: What a buffer holds, unless one tensor is larger. Two buffers of that size are small
#: beside a model, and are filled in a fraction of a second.
BUFFER_BYTES = 1 << 30
_NUM_BUFFERS = 2
# Of torch's description of a shared tensor: which classes they are is not sent.
_CLASSES = (0, 4, 5)


class Peer(NamedTuple):
    """An engine that is to have the weights.

    Attributes:
        num_workers: its processes that have a part of the model.
        gpus: ids of their GPUs, as the driver has them.
    """

    instance_id: int
    num_workers: int
    gpus: tuple[str, ...]


class Engines(Protocol):
    """All engines of an update; each call is made at all of them at once."""

    def look(self) -> list[Peer]:
        """Who they are; nothing changes."""
        ...

    def init(self, info: dict[str, Any]) -> Future[None]:
        """Have vLLM's transfer engines get ready; nothing changes."""
        ...

    def start(self) -> Future[None]:
        """From here on engines that do not come to `finish` are started again."""
        ...

    def update(self, info: dict[str, Any]) -> Future[None]:
        """Have engines load what is told there."""
        ...

    def finish(self) -> Future[None]:
        """All is sent."""
        ...


class Carrier(Protocol):
    """The trainer's half of a transfer."""

    def get_ready(self, engines: Engines | None) -> None:
        """Meet the engines; nothing changes.

        Args:
            engines: None in the processes that do not have the engine.
        """
        ...

    def send(self, engines: Engines | None, tensors: HeldTensors) -> None:
        """Send all tensors."""
        ...

    def close(self) -> None:
        """Give back what was taken; however far it came."""
        ...


class IpcCarrier:
    """Engines read a buffer on the GPU that they share with the trainer."""

    def __init__(self, tensors: HeldTensors) -> None:
        """Take the buffer."""
        import torch

        size = max(BUFFER_BYTES, tensors.largest_bytes)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=tensors.device)
        self._handles: dict[str, list[Any]] = {}

    def get_ready(self, engines: Engines | None) -> None:
        """See `Carrier`.

        Raises:
            WeightUpdateError: an engine is on a GPU where the trainer has no process.
        """
        self._handles = _joined(self._own_handle())
        if engines is None:
            return
        for peer in engines.look():
            missing = [gpu for gpu in peer.gpus if gpu not in self._handles]
            if missing:
                raise WeightUpdateError(
                    f"transfer='ipc' reaches engines on the trainer's own GPUs, and "
                    f"instance {peer.instance_id} is on {', '.join(missing)}, where no "
                    "process of the trainer takes part; have one process a GPU call "
                    "send() of a begin_update's target, or use transfer='nccl' or "
                    "'host'"
                )
        engines.init({"packed": True}).result()

    def send(self, engines: Engines | None, tensors: HeldTensors) -> None:
        """See `Carrier`."""
        for filled in fill(self._buffer, tensors.pairs()):
            if engines is not None:
                told = told_of(filled) | {"ipc_handles": self._handles}
                engines.update(told).result()
            _wait_for_all()  # nobody fills a buffer that somebody's engine still reads

    def close(self) -> None:
        """See `Carrier`."""
        import torch

        del self._buffer
        torch.cuda.ipc_collect()

    def _own_handle(self) -> dict[str, list[Any]]:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        _, args = reduce_tensor(self._buffer)
        plain = [
            None if i in _CLASSES else list(x) if isinstance(x, tuple) else x
            for i, x in enumerate(args)
        ]
        return {gpu_id(torch.cuda.get_device_properties(self._buffer.device)): plain}


class NcclCarrier:
    """The process that has the engine broadcasts to the workers of all engines."""

    def __init__(self, tensors: HeldTensors) -> None:
        """Find vLLM's half for trainers.

        Raises:
            WeightUpdateError: vLLM is not installed for this interpreter.
        """
        try:
            from vllm.distributed.weight_transfer import nccl_common, packed_tensor
        except ImportError as error:
            raise WeightUpdateError(
                "transfer='nccl' needs vLLM in the trainer's environment, too, as it "
                f"is in the engines' ({error}); install it there, or use "
                "transfer='host'"
            ) from error
        self._join = nccl_common.trainer_init
        self._broadcast = packed_tensor.packed_nccl_broadcast_producer
        self._buffer_bytes = max(BUFFER_BYTES, tensors.largest_bytes)
        self._group: Any = None

    def get_ready(self, engines: Engines | None) -> None:
        """See `Carrier`."""
        if engines is None:
            return
        place = {
            "master_address": "127.0.0.1",
            "master_port": _free_port(),
            "world_size": 1 + sum(peer.num_workers for peer in engines.look()),
        }
        packing = {
            "packed": True,
            "packed_buffer_size_bytes": self._buffer_bytes,
            "packed_num_buffers": _NUM_BUFFERS,
        }
        joining = engines.init({**place, "rank_offset": 1, **packing})
        self._group = self._join(place)  # both ends wait for each other there
        joining.result()

    def send(self, engines: Engines | None, tensors: HeldTensors) -> None:
        """See `Carrier`."""
        if engines is None:
            for _ in tensors.pairs():
                pass
            return
        receiving = engines.update(told_of(tensors.sent))
        # An engine that fails does not take part, and NCCL would wait for it for ever.
        receiving.add_done_callback(self._give_up_if_failed)
        self._broadcast(
            tensors.pairs(),
            self._group,
            0,
            lambda pair: pair[1],
            self._buffer_bytes,
            _NUM_BUFFERS,
        )
        receiving.result()

    def _give_up_if_failed(self, receiving: Future[None]) -> None:
        if receiving.exception() is not None and self._group is not None:
            self._group.nccl.ncclCommAbort(self._group.comm)
            self._group.disabled = True

    def close(self) -> None:
        """See `Carrier`."""
        group, self._group = self._group, None
        if group is not None and not group.disabled:
            group.destroy()


def gpu_id(properties: Any) -> str:
    """A GPU's id, which is the same in every process whatever that may see."""
    return str(properties.uuid)


def told_of(sent: list[tuple[str, TensorSpec]]) -> dict[str, Any]:
    """What vLLM's transfer engines are told of the tensors in a buffer."""
    return {
        "names": [name for name, _ in sent],
        "dtype_names": [
            str(torch_dtype(spec.dtype)).removeprefix("torch.") for _, spec in sent
        ],
        "shapes": [list(spec.shape) for _, spec in sent],
        "tensor_sizes": [spec.num_bytes for _, spec in sent],
    }


def fill(
    buffer: Any, pairs: Iterator[tuple[str, Any]]
) -> Iterator[list[tuple[str, TensorSpec]]]:
    """Copy tensors into a buffer, one behind another, as often as it takes.

    Yields:
        What is in the buffer, once all of it is there.
    """
    import torch

    from aseer.weights.writer import spec_of

    held: list[tuple[str, TensorSpec]] = []
    used = 0
    end: tuple[str, Any] = ("", None)
    for name, values in chain(pairs, [end]):
        data = None if values is None else bytes_of(values)
        # Whoever reads it views it where it lies, which must be a multiple of its size.
        is_over = data is None or used + data.numel() > buffer.numel()
        if held and (is_over or used % values.itemsize):
            if buffer.is_cuda:
                torch.cuda.current_stream(buffer.device).synchronize()
            yield held
            held, used = [], 0
        if data is not None:
            buffer[used : used + data.numel()].copy_(data)
            used += data.numel()
            held.append((name, spec_of(name, values)))


def _joined(handle: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The handles of all processes of the trainer."""
    import torch

    if not is_one_of_many():
        return handle
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, handle)
    return {gpu: plain for one in every for gpu, plain in one.items()}


def _wait_for_all() -> None:
    import torch

    if is_one_of_many():
        torch.distributed.barrier()


def is_one_of_many() -> bool:
    """Whether this process belongs to a trainer of several."""
    import torch

    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return bool(there and torch.distributed.get_world_size() > 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
