"""A limit on what one step verifies, so that verification never runs out of memory.

Each drafted token adds a row of logits, and model runner V1 samples from all rows of a
step at once, in float32. When it starts, vLLM measures the memory that sampling takes
with the most requests and hardly a draft, and gives the rest of the device to the KV
cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aseer.dgds.budget import Budget, Candidates, Outcome

# One tensor of a step's logits in float32. Sampling holds about four at a time, and
# vLLM leaves some ten percent of a device of tens of GB free.
MAX_LOGITS_BYTES = 1 << 30


def max_rows_verified(vocab_size: int) -> int:
    """The most rows of logits that one step may sample from."""
    return MAX_LOGITS_BYTES // (4 * vocab_size)


class CappedBudget:
    """A budget with a limit: no step verifies more rows of logits than have room."""

    def __init__(self, budget: Budget, vocab_size: int) -> None:
        self._budget = budget
        self._max_rows = max_rows_verified(vocab_size)

    def max_draft_tokens(self, num_rows: int) -> int:
        """See `Budget`."""
        if num_rows >= self._max_rows:
            return 0
        return self._budget.max_draft_tokens(num_rows)

    def choose(self, candidates: Candidates) -> NDArray[np.int64]:
        """See `Budget`; if it is too much, the ends of the longest drafts are cut."""
        lengths = self._budget.choose(candidates)
        room = max(0, self._max_rows - candidates.num_rows)
        if int(lengths.sum()) <= room:
            return lengths
        longest = 0
        while int(np.minimum(lengths, longest + 1).sum()) <= room:
            longest += 1
        return np.minimum(lengths, longest)

    def learn(self, outcome: Outcome) -> None:
        """See `Budget`."""
        self._budget.learn(outcome)

    def pay(self, num_rows: int, look_s: float) -> None:
        """See `Budget`."""
        self._budget.pay(num_rows, look_s)

    def settle(
        self, num_rows: int, num_sampled: int, num_context_tokens: int, step_s: float
    ) -> None:
        """See `Budget`."""
        self._budget.settle(num_rows, num_sampled, num_context_tokens, step_s)
