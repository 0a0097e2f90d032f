"""Which KV that a request leaves behind somebody else still needs. Pure.

A pool keeps KV by whole chunks of tokens, each under all tokens up to its end, so that
prompts which begin alike share their first chunks, and so do siblings that begin their
responses alike. Whoever asks for a prefix finds it up to the first chunk that is
missing: to free one that is shared costs the others everything after it, too.

    group A  |== system prompt ==|== its question ==|-- generated --|
    group B  |== system prompt ==|== its question ====|-- generated -|
              ^ freed with the last unfinished group that begins so

Chunks are counted, by a hash of all tokens up to their end, as long as a group whose
prompt has them is unfinished. Nothing is kept for groups that may still come: an engine
keeps a prompt in its own cache, too, and the next update of the weights ends all of it.
Two chunks of one hash are freed late, which costs memory until the pool evicts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator

    from aseer.types import GroupId

_TOKEN_BYTES = 4
_NO_CHUNK = 0
_NOT_COUNTED = (b"", _NO_CHUNK)
_COMPARED_TOKENS = 16  # at once; what siblings write alike is seldom much longer


class PromptSharing:
    """Counts the unfinished groups whose prompts begin with a chunk.

    A group costs a pass over its prompt when it comes and when it goes, in between a
    number a chunk, and a response hardly anything.
    """

    def __init__(self, chunk_tokens: int) -> None:
        """`chunk_tokens` is the pool's granularity."""
        self._chunk_bytes = chunk_tokens * _TOKEN_BYTES
        self._num_groups: dict[int, int] = {}  # by hash of all tokens to a chunk's end
        # An unfinished group's prompt, and the hash of its last whole chunk.
        self._prompts: dict[GroupId, tuple[bytes, int]] = {}

    def add(self, group_id: GroupId, prompt: bytes) -> None:
        """A group comes; its prompt is int32."""
        key = _NO_CHUNK
        for key in self._keys(prompt):
            self._num_groups[key] = self._num_groups.get(key, 0) + 1
        self._prompts[group_id] = (prompt, key)

    def remove(self, group_id: GroupId) -> None:
        """A group is over; one that is not counted any more is left alone."""
        prompt, _ = self._prompts.pop(group_id, _NOT_COUNTED)
        for key in self._keys(prompt):
            self._num_groups[key] -= 1
            if not self._num_groups[key]:
                del self._num_groups[key]

    def num_shared(self, group_id: GroupId, tokens: bytes) -> int:
        """Tokens at the start that an unfinished group's prompt has, in whole chunks.

        Args:
            group_id: whose tokens they are. While it is counted, its own prompt is
                shared, and not looked at again.
            tokens: int32; its prompt and what was generated.
        """
        prompt, last = self._prompts.get(group_id, _NOT_COUNTED)
        num_bytes = len(prompt) // self._chunk_bytes * self._chunk_bytes
        for key in self._keys(tokens, num_bytes, last):
            if key not in self._num_groups:
                break
            num_bytes += self._chunk_bytes
        return num_bytes // _TOKEN_BYTES

    def __len__(self) -> int:
        """Chunks that are counted."""
        return len(self._num_groups)

    def _keys(
        self, tokens: bytes, start: int = 0, key: int = _NO_CHUNK
    ) -> Iterator[int]:
        """Hashes of the whole chunks from `start` on; that before it has `key`."""
        size = self._chunk_bytes
        for begin in range(start, len(tokens) - size + 1, size):
            key = hash((key, tokens[begin : begin + size]))
            yield key


def num_alike(tokens: array[int], others: Iterable[array[int]]) -> int:
    """Tokens at the start that at least one of the others begins with, too."""
    return max((_num_common(tokens, other) for other in others), default=0)


def _num_common(one: array[int], other: array[int]) -> int:
    step, num = _COMPARED_TOKENS, 0
    while num < len(one) and one[num : num + step] == other[num : num + step]:
        num += step
    end = min(len(one), len(other), num + step)
    while num < end and one[num] == other[num]:
        num += 1
    return min(num, end)
