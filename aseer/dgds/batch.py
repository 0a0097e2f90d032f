"""Requests that run together on an engine, as its drafter sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aseer.dgds.replica import RequestKey


@dataclass(slots=True, eq=False)
class Row:
    """A chunk that runs here.

    Attributes:
        base: tokens before the request's text, which are the group's prompt.
        end: the most tokens that the row may have, prompt included.
        may_stop_at: number of tokens from which on the request may stop. No draft
            crosses that number: for all tokens of a draft vLLM decides by the length
            before the draft whether stop tokens are forbidden.
        drafted: confidences of the tokens that were drafted last.
        profile: how many tokens to draft whatever they are, to measure a step's time.
    """

    key: RequestKey
    handle: int
    base: int
    end: int
    may_stop_at: int
    weight: float
    drafted: NDArray[np.float32]
    profile: int | None = None


NOTHING = np.empty(0, np.float32)


class Batch:
    """Rows that run together, and what stays the same as long as the batch does.

    Attributes:
        req_ids: vLLM's ids of the whole batch; None if some requests have not sampled,
            since in the next step it may be others that have not.
        rows: the requests that get drafts and have sampled.
        places: [num_rows], where in the batch the rows are.
        handles, bases, ends, stops, weights: [num_rows], the fields of `Row`; `ends`
            without the last token, which is sampled without a draft.
        num_context: tokens of all requests in the batch.
        num_free: how many tokens every row may draft at least.
    """

    def __init__(
        self,
        req_ids: Sequence[str] | None,
        places: Sequence[int],
        rows: Sequence[Row],
        num_context: int = 0,
    ) -> None:
        num = len(rows)
        self.req_ids = None if req_ids is None else list(req_ids)
        self.rows = list(rows)
        self.places = np.array(places, np.int64)
        self.handles = np.fromiter((r.handle for r in rows), np.int64, num)
        self.bases = np.fromiter((r.base for r in rows), np.int64, num)
        self.ends = np.fromiter((r.end - 1 for r in rows), np.int64, num)
        self.stops = np.fromiter((r.may_stop_at for r in rows), np.int64, num)
        self.weights = np.fromiter((r.weight for r in rows), np.float64, num)
        self.is_profile = bool(rows) and rows[0].profile is not None
        self.num_context = num_context
        self.num_free = 0
        self._full: dict[int, NDArray[np.int32]] = {}

    def grow(self, sampled: Sequence[Sequence[int]]) -> None:
        """Count the tokens that were sampled in a step."""
        sizes = list(map(len, sampled))
        self.num_context += sum(sizes)
        self.num_free -= max(sizes, default=0)

    def room(self, num_tokens: NDArray[np.int32], most: int) -> NDArray[np.int32]:
        """[num_rows], how many tokens each row may draft, at most `most`.

        Args:
            num_tokens: tokens of each request in the batch, by place.
        """
        if self.num_free < most:
            texts = num_tokens[self.places]
            stops = np.minimum(self.stops, self.ends)
            ends = np.where(texts < self.stops, stops, self.ends)
            # Every step samples one token more than it accepts.
            free = np.maximum(ends - texts - 1, 0)
            self.num_free = int(free.min())
            if self.num_free < most:
                room: NDArray[np.int32] = np.minimum(free, most).astype(np.int32)
                return room
        if most not in self._full:
            self._full[most] = np.full(len(self.rows), most, np.int32)
        return self._full[most]
