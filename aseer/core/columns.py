"""What an instance reports of many chunks, as columns: one of ids, one of tokens.

Tokens, their logprobs and text are streams that only grow, and a report says where in
each it begins. So reports may be lost, late, doubled, cut differently or overtaken:
what was taken before is skipped, and a report that does not follow on it is refused. A
refusal shows that another report is missing, or that the instance speaks nonsense;
either way the chunk is broken, and what it goes on to generate is of no use.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING

# Runtime imports: msgspec resolves the annotations.
from aseer.types import ChunkEnd, ChunkId, ChunkProgress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ID = Struct("=q")
_TOKEN_BYTES = 4  # and a logprob's
_MALFORMED = -1  # a count that is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Progress of chunks, in one order in all columns; `ChunkProgress` has it of one.

    Columns that do not belong together are refused for every chunk.

    Attributes:
        chunk_ids: int64 as bytes.
        starts, counts: int32 as bytes: where a chunk's tokens begin, and how many they
            are; a negative count is refused.
        tokens, logprobs: of all chunks, one after the other: int32 and float32 as
            bytes.
        text_starts, text_counts: int32 as bytes: where a chunk's text begins, and how
            long it is, in bytes; both empty if no chunk has any so far.
        text: of all chunks, UTF-8.
        cached: a chunk's place, and its `num_cached_tokens`, if it says any.
        ends: a chunk's place and its end, if it is over.
    """

    chunk_ids: bytes = b""
    starts: bytes = b""
    counts: bytes = b""
    tokens: bytes = b""
    logprobs: bytes = b""
    text_starts: bytes = b""
    text_counts: bytes = b""
    text: bytes = b""
    cached: list[tuple[int, int]]
    ends: list[tuple[int, ChunkEnd]]

    def ended(self) -> list[tuple[ChunkId, ChunkEnd]]:
        """Chunks that are over, by id."""
        num = self.num_chunks
        return [(self.chunk_id_at(i), end) for i, end in self.ends if 0 <= i < num]

    @property
    def num_chunks(self) -> int:
        """Whole ids that the columns have."""
        return len(self.chunk_ids) // _ID.size

    def chunk_id_at(self, place: int) -> ChunkId:
        """The chunk that has a place in the columns."""
        return ChunkId(_ID.unpack_from(self.chunk_ids, place * _ID.size)[0])

    def tokens_by_chunk(self) -> Iterator[tuple[ChunkId, int, bytes]]:
        """Chunks that have any: id, where they begin, the tokens."""
        columns = (
            _numbers("q", self.chunk_ids),
            _numbers("i", self.starts),
            _numbers("i", self.counts),
        )
        place = 0
        for chunk_id, start, count in zip(*columns, strict=False):
            end = place + max(0, count) * _TOKEN_BYTES
            if end > place:
                yield ChunkId(chunk_id), start, self.tokens[place:end]
            place = end


def columns_of(reports: Iterable[ChunkProgress]) -> Columns:
    """The same as columns; what is malformed is refused in them, too."""
    chunk_ids, starts, counts = array("q"), array("i"), array("i")
    text_starts, text_counts = array("i"), array("i")
    tokens: list[bytes] = []
    logprobs: list[bytes] = []
    texts: list[bytes] = []
    cached: list[tuple[int, int]] = []
    ends: list[tuple[int, ChunkEnd]] = []
    has_text = False
    for i, report in enumerate(reports):
        num_bytes = len(report.tokens)
        count = num_bytes // _TOKEN_BYTES
        chunk_ids.append(report.chunk_id)
        if num_bytes == len(report.logprobs) == count * _TOKEN_BYTES:
            tokens.append(report.tokens)
            logprobs.append(report.logprobs)
        else:
            count = _MALFORMED
        starts.append(report.start)
        counts.append(count)
        text = report.text.encode()
        texts.append(text)
        text_starts.append(report.text_start)
        text_counts.append(len(text))
        has_text = has_text or report.text_start != 0 or bool(text)
        if report.num_cached_tokens is not None:
            cached.append((i, report.num_cached_tokens))
        if report.end is not None:
            ends.append((i, report.end))
    return Columns(
        chunk_ids=chunk_ids.tobytes(),
        starts=starts.tobytes(),
        counts=counts.tobytes(),
        tokens=b"".join(tokens),
        logprobs=b"".join(logprobs),
        text_starts=text_starts.tobytes() if has_text else b"",
        text_counts=text_counts.tobytes() if has_text else b"",
        text=b"".join(texts),
        cached=cached,
        ends=ends,
    )


def _numbers(typecode: str, column: bytes) -> array[int]:
    """A column's numbers; what is left over at its end is none."""
    numbers = array(typecode)
    numbers.frombytes(column[: len(column) // numbers.itemsize * numbers.itemsize])
    return numbers
