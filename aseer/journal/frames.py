"""Frames of a file that only grows: each is whole, or it is not there.

    frame  =  mark (4 bytes)  +  size  +  crc32 of size and payload  +  payload

A file may end anywhere, since whoever wrote it may have died in the middle of a write,
and bytes in it may have changed. A frame counts if its checksum is right. What stands
behind the first frame that does not is either the remains of one write (no frame
follows) or damage (a frame follows).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap

MARK = b"\xa5ajn"
_HEAD = Struct("<4sII")
#: The most bytes that one frame's payload has. A report of an instance, the largest
#: payload, has a few million.
MAX_PAYLOAD_BYTES = 1 << 30


class Frame(NamedTuple):
    """One frame of a file.

    Attributes:
        end: where the next frame begins.
    """

    payload: bytes
    end: int


def frame_of(payload: bytes) -> bytes:
    """The payload with what lets it be checked.

    Raises:
        ValueError: the payload is too large.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(
            f"a frame takes up to {MAX_PAYLOAD_BYTES} bytes, not {len(payload)}"
        )
    return _HEAD.pack(MARK, len(payload), _checksum(payload)) + payload


def frames_in(data: bytes | mmap) -> Iterator[Frame]:
    """Every frame from the beginning, up to the first that is not whole."""
    at = 0
    while (frame := _frame_at(data, at)) is not None:
        yield frame
        at = frame.end


def is_followed(data: bytes | mmap, at: int) -> bool:
    """Whether a whole frame begins anywhere behind `at`."""
    while (at := data.find(MARK, at + 1)) >= 0:
        if _frame_at(data, at) is not None:
            return True
    return False


def _frame_at(data: bytes | mmap, at: int) -> Frame | None:
    start = at + _HEAD.size
    if start > len(data):
        return None
    mark, size, checksum = _HEAD.unpack(data[at:start])
    end = start + size
    if mark != MARK or size > MAX_PAYLOAD_BYTES or end > len(data):
        return None
    payload = data[start:end]
    return Frame(payload, end) if _checksum(payload) == checksum else None


def _checksum(payload: bytes) -> int:
    return crc32(payload, crc32(len(payload).to_bytes(4, "little")))
