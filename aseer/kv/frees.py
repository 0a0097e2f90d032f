"""KV that is to be freed, until a server is told. Pure.

A server hashes all tokens of what it is to free before it answers, and one that takes
too long to answer is taken for dead. So it is told a bounded part at a time. What comes
while too much waits is not freed by name: the server evicts it, as what it used least,
and the next update of the weights ends it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aseer.kv.messages import Free

# A million tokens: a server takes 0.3 s to hash them, of at least a few until it is
# taken for dead; and at two polls a second this is more than a node generates.
_MAX_TOLD_BYTES = 4 << 20
_MAX_WAITING_BYTES = 64 << 20  # a rollout that is cancelled may have much at once


class FreeQueue:
    """First in, first out."""

    def __init__(
        self,
        max_told_bytes: int = _MAX_TOLD_BYTES,
        max_waiting_bytes: int = _MAX_WAITING_BYTES,
    ) -> None:
        """Bytes are those of tokens."""
        self._max_told_bytes = max_told_bytes
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[Free] = deque()
        self._num_bytes = 0

    def add(self, what: Free) -> None:
        """For later, if there is room."""
        if self._num_bytes + len(what.tokens) <= self._max_waiting_bytes:
            self._waiting.append(what)
            self._num_bytes += len(what.tokens)

    def take(self) -> list[Free]:
        """What to tell now."""
        taken: list[Free] = []
        room = self._max_told_bytes
        while self._waiting and (not taken or len(self._waiting[0].tokens) <= room):
            taken.append(self._waiting.popleft())
            room -= len(taken[-1].tokens)
            self._num_bytes -= len(taken[-1].tokens)
        return taken

    def clear(self) -> None:
        """Forget all of it."""
        self._waiting.clear()
        self._num_bytes = 0
