"""Bytes of tensors into a file in memory, at the pace of that memory.

One thread alone writes a file in /dev/shm at a fraction of what memory can do, so large
tensors are written in blocks, by several, which also look for NaN while a piece is in
their cache. Where the file is mapped (`aseer.weights.mappings`), that is a plain copy.

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
# What is looked at and then copied from there: it stays in a core's own cache, and a
# step of Python for each is nothing beside it.
_PIECE_BYTES = 2 << 20
# As many as it takes to write as fast as memory is.
_MAX_THREADS = 8
# Bytes of a float, and its least bits that are infinite or NaN, without the sign.
_FLOATS = {"F32": (4, 0x7F800000), "BF16": (2, 0x7F80), "F16": (2, 0x7C00)}


class _Staged(NamedTuple):
    """A buffer of the ring, and what still reads it."""

    buffer: Any
    writing: Future[bool] | None


class BlockWriter:
    """Writes tensors to places of a file; `finish` waits until all is there."""

    def __init__(
        self,
        descriptor: int,
        mapped: Any = None,
        *,
        make_buffer: Callable[[int], Any] | None = None,
        mark: Callable[[Any], Any] | None = None,
    ) -> None:
        """Begin; threads are made when they are needed.

        Args:
            mapped: the bytes that the file has already, as an array (uint8) that is
                the file; what goes beyond them is written as files are.
            make_buffer: page-locked memory of so many bytes, as a tensor.
            mark: of a device: what has a `synchronize` that waits until it has done
                all that it was given so far.
        """
        self._descriptor = descriptor
        self._mapped: Any = b"" if mapped is None else mapped
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
        data = flat.to("cpu").numpy()
        if len(data) <= BLOCK_BYTES:
            return self._write(data, offset, dtype)
        writing = self._begin_blocks(data, offset, dtype)
        wait(writing)  # all of them: they read what the caller may change
        return all(each.result() for each in writing)

    def begin(self, values: Any, offset: int, dtype: str) -> list[Future[bool]]:
        """As `put`, of a CPU's tensor, but values must not change until it is written.

        Returns:
            Of each part of it whether it is finite, or the OSError, once it is written.
        """
        return self._begin_blocks(bytes_of(values).numpy(), offset, dtype)

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

    def _begin_blocks(self, data: Any, offset: int, dtype: str) -> list[Future[bool]]:
        return [
            self._threads.submit(
                self._write, data[start : start + BLOCK_BYTES], offset + start, dtype
            )
            for start in range(0, len(data), BLOCK_BYTES)
        ]

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
        num_bytes, least = _FLOATS.get(dtype, (0, 0))
        is_finite = True
        for start in range(0, len(data), _PIECE_BYTES):
            piece, place = data[start : start + _PIECE_BYTES], offset + start
            if num_bytes:
                is_finite &= _is_finite(piece, num_bytes, least)
            if place + len(piece) <= len(self._mapped):
                self._mapped[place : place + len(piece)] = piece
            else:
                _write_all(self._descriptor, memoryview(piece), place)
        return is_finite


def _is_finite(piece: Any, num_bytes: int, least: int) -> bool:
    """Whether no float of a piece is infinite or NaN.

    As integers with a sign the greatest is the greatest float above zero, as integers
    without one the greatest is the least float below zero, if there are any.
    """
    sign = 1 << (8 * num_bytes - 1)
    return (
        int(piece.view(f"i{num_bytes}").max()) < least
        and int(piece.view(f"u{num_bytes}").max()) < sign + least
    )


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
