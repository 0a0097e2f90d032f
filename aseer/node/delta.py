"""What changed between two versions of a block of weights, in few bytes, and back.

A training step changes a few per cent of a model's 16-bit weights, and of those the
last bits. So what is told of a block is where its numbers of 16 bits changed, as steps
from one place to the next, and by which bits (XOR); each byte of these numbers is put
beside its like, and all is deflated. It is exact for data of any kind.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of a block's numbers: where more have changed, the block itself is little larger.
MAX_CHANGED_SHARE = 0.25
_NUMBER_BYTES = 2
_STEP_BYTES = 4
_CHANGE_BYTES = _STEP_BYTES + _NUMBER_BYTES
# Of zlib: runs and frequent bytes are found, which is what there is, and nothing else
# is looked for, which would take several times as long.
_HOW = (1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)


def encode(base: bytes, data: bytes) -> bytes | None:
    """What turns `base` into `data`; None if that is hardly less than `data`."""
    if len(base) != len(data) or len(data) % _NUMBER_BYTES:
        return None
    changes = np.frombuffer(base, np.uint16) ^ np.frombuffer(data, np.uint16)
    places = np.flatnonzero(changes)
    if len(places) > MAX_CHANGED_SHARE * len(changes):
        return None
    steps = np.diff(places, prepend=0).astype(np.uint32)
    deflating = zlib.compressobj(*_HOW)
    return (
        deflating.compress(_by_byte(steps))
        + deflating.compress(_by_byte(changes[places]))
        + deflating.flush()
    )


def apply(base: bytes, delta: bytes) -> bytes:
    """The data that a delta was made of, with the same base.

    Raises:
        ValueError: the delta is none of such a base.
    """
    most = int(len(base) / _NUMBER_BYTES * MAX_CHANGED_SHARE) * _CHANGE_BYTES
    inflating = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte of room beyond the most there can be, so that the end is seen.
        told = inflating.decompress(delta, most + 1)
    except zlib.error as error:
        raise ValueError(f"a delta cannot be inflated: {error}") from error
    num, rest = divmod(len(told), _CHANGE_BYTES)
    if rest or not inflating.eof or len(base) % _NUMBER_BYTES:
        raise ValueError("a delta is not as long as it must be")
    split = num * _STEP_BYTES
    places = np.cumsum(_numbers(told[:split], np.uint32), dtype=np.int64)
    numbers = np.frombuffer(base, np.uint16).copy()
    if num and places[-1] >= len(numbers):
        raise ValueError("a delta is of a larger block")
    numbers[places] ^= _numbers(told[split:], np.uint16)
    return numbers.tobytes()


def _by_byte(numbers: NDArray[Any]) -> bytes:
    """First bytes of all, then second ones, and so on."""
    width = numbers.dtype.itemsize
    return numbers.view(np.uint8).reshape(-1, width).T.tobytes()


def _numbers(data: bytes, kind: Any) -> NDArray[Any]:
    width = np.dtype(kind).itemsize
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    numbers: NDArray[Any] = np.ascontiguousarray(planes.T).view(kind).ravel()
    return numbers
