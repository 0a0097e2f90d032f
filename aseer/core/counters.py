"""Sums over a rollout, for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aseer.buffer import Request
    from aseer.types import Chunk


class Moves:
    """Chunks on another instance than the one before, within a node or between nodes,
    by what they computed when they started: one token, or more.
    """

    def __init__(self) -> None:
        self.num_found = 0
        self.num_recomputed = 0

    @property
    def share_lost(self) -> float:
        """Of the moves, those that did not find their KV."""
        lost = self.num_recomputed
        return lost / (self.num_found + lost) if lost else 0.0

    def count(self, chunk: Chunk, num_cached: int) -> None:
        """A chunk that moved found so many tokens' KV when it started."""
        at_start = (len(chunk.prompt) + len(chunk.generated)) // 4
        is_found = num_cached >= at_start - 1
        self.num_found += is_found
        self.num_recomputed += not is_found


class Counters:
    """Sums over a rollout, for its report."""

    def __init__(self) -> None:
        self.num_output_tokens = 0
        # Tokens taken of reports, and chunks that ended in one; they never fall.
        self.num_reported_tokens = 0
        self.num_reported_ends = 0
        self.num_prompt_tokens = 0
        self.num_chunks = 0
        self.num_migrations = 0
        self.num_recomputed_tokens = 0
        self.num_cached_tokens = 0
        self.num_retries = 0
        self.num_finished = 0
        # Of responses that a journal had, and of tokens in them; and of tokens of
        # requests that went on from there.
        self.num_replayed = 0
        self.num_replayed_tokens = 0
        self.num_resumed_tokens = 0
        self.num_groups = 0
        self.num_groups_finished = 0
        # Of the migrations, those to another node.
        self.num_node_migrations = 0
        self.moves = Moves()
        self.node_moves = Moves()

    def count_past(self, request: Request) -> None:
        """A request has come, with what a journal had of it, which may be nothing."""
        if request.state.is_finished:
            self.num_replayed += 1
            self.num_replayed_tokens += request.num_generated
        else:
            self.num_resumed_tokens += request.num_generated

    def count_finished(self, request: Request) -> None:
        """A request is over."""
        self.num_finished += 1
        self.num_cached_tokens += request.num_cached_tokens
        self.num_recomputed_tokens += request.num_recomputed_tokens
        self.num_retries += request.num_retries
        self.num_prompt_tokens += request.group.num_prompt_tokens
