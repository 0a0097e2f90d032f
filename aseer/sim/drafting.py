"""What speculation yields in a simulated engine.

Drafts get better with the siblings that are there to draft from. By the paper's table
of mean acceptance lengths (n-gram drafting from n finished siblings, Seer §3.4) a token
is accepted with a probability that rises with n. `Drafting` keeps that probability for
0, 1, 2-3, 4-7, ... siblings, interpolated in log(1 + n), and asks the budget of real
rollouts (`dgds.budget.spend`) how many tokens to draft for whom in each step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from aseer.dgds.budget import spend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aseer.sim.hardware import StepTime

# References, and the mean tokens of a step with drafts of that many tokens.
PAPER_REFERENCES = (0, 1, 5, 15)
PAPER_YIELDS = (1.70, 2.04, 2.32, 2.53)
PAPER_DRAFT_TOKENS = 8
_TAIL_ROWS = 4


class Drafting:
    """Tokens a step for requests by their class, which `class_of` tells."""

    def __init__(
        self,
        group_size: int,
        *,
        grouped: bool = True,
        max_draft_tokens: int = 8,
        tail_draft_tokens: int = 16,
    ) -> None:
        """Prepare.

        Args:
            grouped: whether siblings help; else each request has its own text only.
        """
        known = [acceptance(y, PAPER_DRAFT_TOKENS) for y in PAPER_YIELDS]
        self._last_class = (group_size - 1).bit_length() if grouped else 0
        fewest = 2.0 ** np.arange(self._last_class + 1) / 2
        fewest[0] = 0
        self._acceptances = np.interp(
            np.log1p(1.4 * fewest), np.log1p(PAPER_REFERENCES), known
        )
        self._max = max_draft_tokens
        self._tail = tail_draft_tokens
        self._known: dict[tuple[int, ...], NDArray[np.float64]] = {}

    @property
    def num_classes(self) -> int:
        return self._last_class + 1

    def class_of(self, num_siblings: int) -> int:
        """Of a request with so many finished siblings."""
        return min(num_siblings.bit_length(), self._last_class)

    def rates(
        self, step_time: StepTime, counts: Sequence[int], num_kv_tokens: float
    ) -> tuple[list[float], float]:
        """How far a step takes the requests of each class.

        Args:
            counts: [num_classes] requests in the step.

        Returns:
            [num_classes] tokens a request, and the tokens drafted for all together.
        """
        # Much the same batch gets the same lengths: asking is the dearest thing here.
        key = tuple(round(6 * math.log1p(n)) for n in (*counts, num_kv_tokens))
        lengths = self._known.get(key)
        if lengths is None:
            lengths = self._known[key] = self._lengths(step_time, counts, num_kv_tokens)
        yields = expected_yield(self._acceptances, lengths)
        return yields.tolist(), float(np.dot(counts, lengths))

    def _lengths(
        self, step_time: StepTime, counts: Sequence[int], num_kv_tokens: float
    ) -> NDArray[np.float64]:
        """[num_classes] the mean draft length that the budget gives a class."""
        num_rows = sum(counts)
        longest = self._tail if num_rows <= _TAIL_ROWS else self._max
        class_of = np.repeat(np.arange(self.num_classes), counts)
        survivals = self._acceptances[class_of, None] ** np.arange(1, longest + 1)
        # The most that pays is found on a few points: seconds are smooth in between.
        drafted = np.arange(num_rows * longest + 1)
        points = np.unique(np.linspace(0, drafted[-1], 9).round())
        seconds = [step_time.seconds(num_rows + n, num_kv_tokens) for n in points]
        spent = spend(
            survivals.ravel(),
            np.arange(num_rows + 1) * longest,
            np.ones(num_rows),
            np.interp(drafted, points, seconds),
        )
        total = np.bincount(class_of, spent.lengths, minlength=self.num_classes)
        means: NDArray[np.float64] = total / np.maximum(counts, 1)
        return means


def expected_yield(
    acceptances: NDArray[np.float64], num_drafted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Tokens a step yields, its own included, when each draft token is accepted with
    that probability.
    """
    result: NDArray[np.float64] = (1 - acceptances ** (num_drafted + 1)) / (
        1 - acceptances
    )
    return result


def acceptance(wanted: float, num_drafted: int) -> float:
    """The acceptance of a token at which a step yields `wanted` tokens."""
    low, high = 0.0, 0.999999
    for _ in range(50):  # bisection
        middle = (low + high) / 2
        yielded = expected_yield(np.array([middle]), np.array([float(num_drafted)]))
        if yielded[0] < wanted:
            low = middle
        else:
            high = middle
    return low
