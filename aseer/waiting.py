"""The requests that wait for their next chunk, in a policy's order and by age.

`WaitingQueue` (C++, `csrc/waiting.h`) keeps groups ordered by the rank of their first
request, and in each group its requests: when a group's length estimate changes, one
entry moves.

A *round* is one search for work that fits. A request that fits nowhere is passed over
for the round, and its group with it (siblings are alike), until `MAX_PASSED` groups
were. How many tokens the first request of a group needs is remembered, so that the next
rounds, which usually meet it again and can offer no more, pass it over unseen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aseer._core import MAX_PASSED, WaitingQueue

if TYPE_CHECKING:
    from aseer.types import GroupId, RequestId

__all__ = ["MAX_PASSED", "Rank", "Waiting", "WaitingQueue"]

Rank = tuple[int, ...]  # at most 4


class Waiting(NamedTuple):
    """A request that waits for its next chunk, as a policy sees it.

    The queue finds the two ids by their places.

    Attributes:
        arrival: order in which requests came, kept over chunks.
        num_tokens: prompt and generated; remaining: the most it may still generate.
        known_length: the response's true length if known beforehand, else None.
        is_new: it has not generated a whole chunk's tokens yet.
    """

    request_id: RequestId
    group_id: GroupId
    arrival: int
    is_probe: bool
    num_tokens: int
    num_generated: int
    remaining: int
    divisible: bool = True
    known_length: int | None = None
    is_new: bool = False
