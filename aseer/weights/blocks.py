"""Bytes of tensors into a file in memory, at the pace of that memory.

One thread alone writes a file in /dev/shm at a fraction of what memory can do, so large
tensors are written in blocks, by several, which also look for NaN while a block is in
their cache. What the system takes longest for is to give a file its pages, so a file
that has them from an earlier update is written again.

What comes from a GPU goes through a ring of page-locked buffers: while some are
written, the next is copied, and nobody waits for a tensor. Copies are made in the order
of the GPU's current stream, so a source may fill the same memory with its next tensor.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

# Small beside a model, and so large that handing a block to a thread costs nothing.
BLOCK_BYTES = 8 << 20
# What is looked at and then copied from there: it stays in a core's own cache.
_PIECE_BYTES = 256 << 10
# As many as it takes to write as fast as memory is.
_MAX_THREADS = 8
# Of floats as unsigned integers: the type, all bits but the sign, and the least of them
# that is infinite or NaN.
_FLOATS = {
    "F32": ("uint32", 0x7FFFFFFF, 0x7F800000),
    "BF16": ("uint16", 0x7FFF, 0x7F80),
    "F16": ("uint16", 0x7FFF, 0x7C00),
}


class _Staged(NamedTuple):
    """A buffer of the ring, and what still reads it."""

    buffer: Any
    writing: Future[bool] | None


class BlockWriter:
    """Writes tensors to places of a file; `finish` waits until all is there."""

    def __init__(
        self,
        descriptor: int,
        *,
        make_buffer: Callable[[int], Any] | None = None,
        mark: Callable[[Any], Any] | None = None,
    ) -> None:
        """Begin; threads are made when they are needed.

        Args:
            make_buffer: page-locked memory of so many bytes, as a tensor.
            mark: of a device: what has a `synchronize` that waits until it has done
                all that it was given so far.
        """
        self._descriptor = descriptor
        self._num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self._num_threads, "aseer-weights")
        self._make_buffer = make_buffer or _page_locked
        self._mark = mark or _mark
        self._ring: list[_Staged] = []
        self._next = 0

    def put(self, values: Any, offset: int, dtype: str) -> bool:
        """Write a tensor's values, which may change once this has returned.

        Args:
            dtype: the values', spelt as in safetensors files.
        Returns:
            Whether they are finite, as far as that was looked at: on a CPU, of floats.

        Raises:
            OSError: there is no room; perhaps only when more is put.
        """
        flat = bytes_of(values)
        if flat.device.type == "cuda":
            self._stage(flat, offset)
            return True
        return self._write_blocks(flat.to("cpu").numpy(), offset, dtype)

    def finish(self) -> None:
        """Wait until all that was put is in the file.

        Raises:
            OSError: there was no room.
        """
        for staged in self._ring:
            if staged.writing is not None:
                staged.writing.result()

    def close(self) -> None:
        """Wait for threads that write, whatever comes of it, and end them."""
        self._threads.shutdown()
        self._ring = []

    def _write_blocks(self, data: Any, offset: int, dtype: str) -> bool:
        if len(data) <= BLOCK_BYTES:
            return self._write(data, offset, dtype)
        writing = [
            self._threads.submit(
                self._write, data[start : start + BLOCK_BYTES], offset + start, dtype
            )
            for start in range(0, len(data), BLOCK_BYTES)
        ]
        wait(writing)  # all of them: they read what the caller may change
        return all(each.result() for each in writing)

    def _stage(self, flat: Any, offset: int) -> None:
        """Have a GPU's values copied, and then written."""
        for start in range(0, flat.numel(), BLOCK_BYTES):
            part = flat[start : start + BLOCK_BYTES]
            buffer = self._free_buffer()
            staged = buffer[: part.numel()]
            staged.copy_(part, non_blocking=True)
            copied = self._mark(flat.device)
            writing = self._threads.submit(
                self._write_staged, copied, staged, offset + start
            )
            self._ring[self._next] = _Staged(buffer, writing)

    def _free_buffer(self) -> Any:
        """The next buffer of the ring, once it is written."""
        # One more than there are threads, so that one is copied to while they write.
        if len(self._ring) <= self._num_threads:
            self._ring.append(_Staged(self._make_buffer(BLOCK_BYTES), None))
            self._next = len(self._ring) - 1
        else:
            self._next = (self._next + 1) % len(self._ring)
        buffer, writing = self._ring[self._next]
        if writing is not None:
            writing.result()
        return buffer

    def _write_staged(self, copied: Any, staged: Any, offset: int) -> bool:
        copied.synchronize()
        return self._write(staged.numpy(), offset, "")

    def _write(self, data: Any, offset: int, dtype: str) -> bool:
        """Write bytes; whether they are finite, if they are floats."""
        import numpy as np

        kind, bits, least = _FLOATS.get(dtype, ("uint8", 0, 1))
        scratch = np.empty(_PIECE_BYTES // np.dtype(kind).itemsize, kind)
        is_finite = True
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            if bits:
                numbers = piece.view(kind)
                found = scratch[: len(numbers)]
                np.bitwise_and(numbers, bits, out=found)
                is_finite &= int(found.max()) < least
            _write_all(self._descriptor, memoryview(piece), offset + start)
        return is_finite


def bytes_of(values: Any) -> Any:
    """A tensor's values one behind another, as bytes; a copy only if it must be."""
    import torch

    flat = values.contiguous().reshape(-1)
    if flat.stride() != (1,):  # one element, or none, is contiguous however it lies
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        num_written = os.pwrite(descriptor, data, offset)
        data, offset = data[num_written:], offset + num_written


def _page_locked(num_bytes: int) -> Any:
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _mark(device: Any) -> Any:
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
