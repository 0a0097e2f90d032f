"""The suffix trees of many groups, grown and drafted from in batch calls.

`SuffixForest` is what engines use: one call a step appends for, or drafts for, every
request of a batch. `SuffixTree` is one group of it, for reading and for tests.

A tree holds its group's prompt once and every request's tokens after it. It answers
with what followed the longest suffixes of a request's text, prompt included, in any
text of the group; no context spans two requests. What it answers depends on the set
of texts alone, not on the order in which they were appended.

Ragged batches are flat: row i of `tokens` [num_tokens] int32 is
`tokens[offsets[i]:offsets[i + 1]]`, with `offsets` [num_rows + 1] int64. Arrays are
contiguous, read and not kept; those returned are the caller's. The GIL is released,
and a lock makes a forest safe to share between threads.

Cost: O(1) amortised an appended token and O(1) a drafted one, whatever the size of
the tree; see csrc/cst.h for what is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NewType

import numpy as np

from aseer.dgds._cst import SuffixForest as _NativeForest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DEFAULT_MAX_MATCH = 24
PROMPT_WRITER = 1 << 31

GroupHandle = NewType("GroupHandle", int)
RequestHandle = NewType("RequestHandle", int)


class Drafts(NamedTuple):
    """Drafts of a batch, a path a row."""

    tokens: NDArray[np.int32]
    """[num_drafted], all rows one after the other."""
    offsets: NDArray[np.int64]
    """[num_rows + 1]."""
    confidences: NDArray[np.float32]
    """[num_drafted]: that the token, and so all before it in its row, is accepted."""


class DraftTrees(NamedTuple):
    """Drafts of a batch, a tree of paths a row; parents come before children."""

    tokens: NDArray[np.int32]
    """[num_drafted]."""
    parents: NDArray[np.int32]
    """[num_drafted]: position of the parent in the row; -1: it follows the text."""
    offsets: NDArray[np.int64]
    """[num_rows + 1]."""
    confidences: NDArray[np.float32]
    """[num_drafted]: that the whole path to the token is accepted."""


class Continuation(NamedTuple):
    """A token that followed a context."""

    token: int
    times: int
    writers: int
    """Bit i: request slot i mod 31 of the group wrote it; bit 31: the prompt did."""


class Order(NamedTuple):
    """One suffix of a request's text, the longest of those with equal occurrences."""

    match_length: int
    continuations: list[Continuation]
    """Most frequent first; ties go to the lower token id."""


class SuffixForest:
    """Suffix trees of many groups; what one tree learns about drafting serves all.

    Args:
        max_match: the longest context that is told apart, in tokens, in 1..255.

    Raises:
        KeyError: a handle was closed, or never given; in every method.
        ValueError: shapes of arrays disagree, or tokens are negative.

    A call that raises has changed nothing.
    """

    def __init__(self, *, max_match: int = DEFAULT_MAX_MATCH) -> None:
        self._native = _NativeForest(max_match=max_match)

    def open_group(self, prompt: NDArray[np.int32]) -> GroupHandle:
        """Plant a tree that holds `prompt` [num_tokens]."""
        return GroupHandle(self._native.open_group(prompt))

    def open_request(self, group: GroupHandle) -> RequestHandle:
        """Start a request at the end of the group's prompt."""
        return RequestHandle(self._native.open_request(group))

    def close_group(self, group: GroupHandle) -> None:
        """Free a tree and forget its requests."""
        self._native.close_group(group)

    def close_requests(self, requests: NDArray[np.int64]) -> None:
        """Forget requests as if they had never been.

        A finished request stays open: its text serves its siblings until the group is
        closed. Cost: O(tokens that stay) for each group touched, which is rebuilt.
        """
        self._native.close_requests(requests)

    def append(
        self,
        requests: NDArray[np.int64],
        tokens: NDArray[np.int32],
        offsets: NDArray[np.int64],
        starts: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """Append a row of tokens to each request and learn from what was drafted.

        Args:
            requests: [num_rows].
            tokens: [num_tokens].
            offsets: [num_rows + 1].
            starts: [num_rows], how many tokens precede the row in its request, prompt
                excluded; None: as many as there are. Tokens known already are
                skipped, and a row that would leave a gap is ignored, so rows may come
                late, twice and in any order.

        Returns:
            [num_rows], the tokens of each request now, prompt excluded.
        """
        return self._native.append(requests, tokens, offsets, starts)

    def follow(
        self,
        requests: NDArray[np.int64],
        texts: NDArray[np.int32],
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        num_tokens: NDArray[np.int32],
    ) -> int:
        """Append to each request the tokens that only an engine's table of texts has.

        Args:
            requests: [num_requests].
            texts: [num_rows, num_columns]; rows need not lie next to each other.
            rows: [num_requests], each request's.
            starts: [num_requests], tokens in its row before its first: its prompt.
            num_tokens: [num_rows or more], how many of a row's tokens are known.

        Returns:
            How many requests have more tokens than their row, and so another text.
            Such requests are left as they are.
        """
        return self._native.follow(requests, texts, rows, starts, num_tokens)

    def draft(
        self,
        requests: NDArray[np.int64],
        max_draft_tokens: NDArray[np.int32],
        *,
        min_confidence: float = 0.0,
    ) -> Drafts:
        """Draft the likeliest continuation of each request; empty if nothing matches.

        A forecast is computed once. As long as the request generates the forecast
        tokens, the rest of the forecast stays valid, whatever siblings have written
        since, and a draft adds to it. A token that was not forecast ends the forecast.

        Args:
            requests: [num_rows].
            max_draft_tokens: [num_rows]; 0 disables.
            min_confidence: a row ends before the token that falls below it.
        """
        found = self._native.draft(requests, max_draft_tokens, min_confidence)
        # As `Drafts._make` does, without its call, whose time would count here.
        return tuple.__new__(Drafts, found)

    def draft_tree(
        self,
        requests: NDArray[np.int64],
        max_draft_tokens: NDArray[np.int32],
        *,
        top_k: int,
        min_confidence: float = 0.0,
    ) -> DraftTrees:
        """Draft the `top_k` likeliest paths of every length, found by beam search.

        `max_draft_tokens` [num_rows] bounds the depth of each row, which holds at most
        top_k times as many tokens. Nothing is learned from these drafts.
        """
        return DraftTrees(
            *self._native.draft_tree(
                requests,
                max_draft_tokens,
                top_k=top_k,
                min_confidence=min_confidence,
            )
        )

    def orders(self, request: RequestHandle) -> list[Order]:
        """List what followed each suffix of a request's text, longest suffix first."""
        return [
            Order(length, [Continuation(*edge) for edge in edges])
            for length, edges in self._native.continuations(request)
        ]

    def tokens(self, request: RequestHandle, start: int = 0) -> NDArray[np.int32]:
        """Return a copy of a request's tokens from `start` on, prompt excluded."""
        return self._native.tokens(request, start)

    def requests(self, group: GroupHandle) -> NDArray[np.int64]:
        """List a group's requests in the order of their opening."""
        return self._native.requests(group)

    @property
    def num_groups(self) -> int:
        """Number of open groups."""
        return self._native.num_groups

    @property
    def num_tokens(self) -> int:
        """Number of tokens held, each group's prompt once."""
        return self._native.num_tokens

    @property
    def memory_bytes(self) -> int:
        """Bytes held by trees and requests, spare capacity included."""
        return self._native.memory_bytes


class SuffixTree:
    """One group's tree: a forest of one, addressed request by request."""

    def __init__(
        self, prompt: Sequence[int] = (), *, max_match: int = DEFAULT_MAX_MATCH
    ) -> None:
        self.forest = SuffixForest(max_match=max_match)
        self._group = self.forest.open_group(np.asarray(prompt, np.int32))

    def open(self) -> RequestHandle:
        """Start a request at the end of the prompt."""
        return self.forest.open_request(self._group)

    def close(self, request: RequestHandle) -> None:
        """Forget a request as if it had never been."""
        self.forest.close_requests(np.array([request]))

    def append(self, request: RequestHandle, tokens: Sequence[int]) -> None:
        """Append tokens to a request."""
        row = np.asarray(tokens, np.int32)
        self.forest.append(np.array([request]), row, np.array([0, len(row)]))

    def draft(
        self,
        request: RequestHandle,
        max_draft_tokens: int,
        *,
        min_confidence: float = 0.0,
    ) -> list[tuple[int, float]]:
        """Draft the likeliest continuation: tokens, each with its confidence."""
        drafts = self.forest.draft(
            np.array([request]),
            np.array([max_draft_tokens], np.int32),
            min_confidence=min_confidence,
        )
        return list(
            zip(drafts.tokens.tolist(), drafts.confidences.tolist(), strict=True)
        )

    def orders(self, request: RequestHandle) -> list[Order]:
        """List what followed each suffix of a request's text, longest suffix first."""
        return self.forest.orders(request)
