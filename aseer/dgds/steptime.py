"""How long an engine's step takes, learned from the steps themselves.

A step's time is modelled as

    T(rows, drafted, context) = f(rows + drafted) + a rows + b drafted + c [drafted > 0]
                                + d context + e [rows + drafted > graph_tokens]

where f is convex and piecewise linear: flat where an engine waits for memory, rising
where the engine computes. The coefficient a is what a request costs beyond its token's
computation, b and c are what verification costs, and d is what attention costs. A GPU
replays CUDA graphs for steps of up to `graph_tokens` tokens, and larger ones are
launched kernel by kernel, for e seconds more; without graphs there is no such term. No
coefficient is below zero: otherwise tokens would seem to cost nothing whenever the
machine was slower while there were fewer of them, and would be drafted without end. The
coefficients minimise the squares of relative errors over the recent steps; where
nothing was measured, they are pulled towards a straight line and towards no cost of
verification. No step is predicted to take less than half of the fastest one seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Numbers of tokens at which f may bend; before the first, f is a straight line.
_KNOTS = np.array([1 << i for i in range(3, 13)], np.float64)
# Units for numbers of tokens and rows, and of tokens of context, by which all features
# are of about the same size.
_TOKEN_UNIT = 8.0
_CONTEXT_UNIT = 1e4
_NUM_FEATURES = 2 + len(_KNOTS) + 4
_CONTEXT = _NUM_FEATURES - 1  # one more may follow: the jump behind the CUDA graphs
# A measured step counts e times less after so many further steps.
_MEMORY_STEPS = 500
# The coefficients are computed once in so many steps, since that takes longer than all
# else here; during the first `_EARLY_STEPS` after each step.
_SOLVE_EVERY = 16
_EARLY_STEPS = 64
# A table of predictions has at least so many entries, so that it is seldom made anew.
_LEAST_TABLE = 64
# A step that took more than so many times what was predicted, or so many times less, is
# counted as if it had taken just that: the machine did something else.
_OUTLIER = 1.5
# No step takes less than this share of the fastest one seen.
_LEAST = 0.5
# Strengths of the pull towards zero: on the bends of f, the costs of rows and of
# verification and the jump; and on the rest, only so that there is always a solution.
_PULL = 1e-2
_WEAK_PULL = 1e-6
_PULLS = np.array(
    [_WEAK_PULL] * 2 + [_PULL] * (len(_KNOTS) + 3) + [_WEAK_PULL, _PULL], np.float64
)


class _Step(NamedTuple):
    """A measured step."""

    num_rows: int
    num_drafted: int
    num_context_tokens: int
    step_s: float


class StepTimeModel:
    """Predicts a step's seconds; learns from every step, a few at a time."""

    def __init__(self, graph_tokens: int | None = None) -> None:
        """Know nothing yet.

        Args:
            graph_tokens: the most tokens of a step that replays CUDA graphs; None = no
                step does.
        """
        self._graph_tokens = graph_tokens
        num = _NUM_FEATURES + (graph_tokens is not None)
        self._profile = _Sums(num)
        self._recent = _Sums(num)
        self._new: list[_Step] = []
        self._floor_s = 0.0
        self._num_observed = 0
        self._coefficients: NDArray[np.float64] = np.zeros(num)
        self._tables: dict[int, NDArray[np.float64]] = {}

    def observe(
        self,
        num_rows: int,
        num_drafted: int,
        num_context_tokens: int,
        step_s: float,
        *,
        is_profile: bool = False,
    ) -> None:
        """Learn from a step of `num_rows` requests that verified `num_drafted` tokens.

        Args:
            num_context_tokens: over all rows.
            is_profile: never forgotten.
        """
        least_s = _LEAST * step_s
        self._floor_s = min(self._floor_s or least_s, least_s)
        step = _Step(num_rows, num_drafted, num_context_tokens, step_s)
        if is_profile:
            self._learn([step], self._profile)
            return
        self._new.append(step)
        if self._num_observed < _EARLY_STEPS or len(self._new) >= _SOLVE_EVERY:
            self._learn(self._new, self._recent)
            self._new = []

    def predict(
        self, num_rows: int, max_drafted: int, num_context_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds of a step with 0, 1, ... `max_drafted` drafted tokens; never falling.

        All are zero while nothing was measured.
        """
        table = self._tables.get(num_rows)
        if table is None or len(table) <= max_drafted:
            drafted = np.arange(2 * max_drafted + _LEAST_TABLE)
            table = self._features(num_rows, drafted, 0) @ self._coefficients
            self._tables[num_rows] = table
        context_s = self._coefficients[_CONTEXT] * (num_context_tokens / _CONTEXT_UNIT)
        seconds: NDArray[np.float64] = table[: max_drafted + 1] + context_s
        return np.maximum(seconds, self._floor_s, out=seconds)

    def _learn(self, steps: Sequence[_Step], sums: _Sums) -> None:
        num_rows, num_drafted, context, step_s = np.array(steps, np.float64).T
        features = self._features(num_rows, num_drafted, context)
        expected_s = step_s
        if self._num_observed >= _EARLY_STEPS:
            expected_s = np.maximum(features @ self._coefficients, self._floor_s)
            step_s = np.clip(step_s, expected_s / _OUTLIER, expected_s * _OUTLIER)
        keep = 1.0 if sums is self._profile else 1 - 1 / _MEMORY_STEPS
        sums.add(features, step_s, expected_s, keep)
        self._num_observed += len(steps)
        matrix = self._profile.matrix + self._recent.matrix
        matrix += np.diag(_PULLS[: len(matrix)] / self._floor_s**2)
        vector = self._profile.vector + self._recent.vector
        self._coefficients = _least_squares(matrix, vector)
        self._tables.clear()

    def _features(
        self,
        num_rows: NDArray[np.float64] | int,
        num_drafted: NDArray[np.float64] | NDArray[np.int64],
        num_context_tokens: NDArray[np.float64] | int,
    ) -> NDArray[np.float64]:
        """See `_smooth`; the last is whether a step is too large for CUDA graphs, if
        there are any.
        """
        smooth = _smooth(num_rows, num_drafted, num_context_tokens)
        if self._graph_tokens is None:
            return smooth
        return np.column_stack((smooth, num_rows + num_drafted > self._graph_tokens))


class _Sums:
    """The sums over measured steps that least squares needs."""

    def __init__(self, num_features: int) -> None:
        self.matrix = np.zeros((num_features, num_features))
        self.vector = np.zeros(num_features)

    def add(
        self,
        features: NDArray[np.float64],
        values: NDArray[np.float64],
        expected: NDArray[np.float64],
        keep: float,
    ) -> None:
        """Add steps in order; each multiplies the weight of earlier ones by `keep`."""
        kept = keep ** np.arange(len(values), -1, -1.0)
        # Errors are relative to the expected time. Relative to the measured time, the
        # quick steps of a noisy machine would weigh most.
        weighted = features.T * (kept[1:] / expected**2)
        self.matrix = kept[0] * self.matrix + weighted @ features
        self.vector = kept[0] * self.vector + weighted @ values


def _smooth(
    num_rows: NDArray[np.float64] | int,
    num_drafted: NDArray[np.float64] | NDArray[np.int64],
    num_context_tokens: NDArray[np.float64] | int,
) -> NDArray[np.float64]:
    """[len(num_drafted), _NUM_FEATURES], what the coefficients are multiplied with."""
    features = np.empty((len(num_drafted), _NUM_FEATURES))
    num_tokens = num_rows + num_drafted
    features[:, 0] = 1
    features[:, 1] = num_tokens / _TOKEN_UNIT
    np.subtract(num_tokens[:, None], _KNOTS, out=features[:, 2:-4])
    np.maximum(features[:, 2:-4], 0, out=features[:, 2:-4])
    features[:, 2:-4] /= _KNOTS
    features[:, -4] = num_rows / _TOKEN_UNIT
    features[:, -3] = num_drafted / _TOKEN_UNIT
    features[:, -2] = num_drafted > 0
    features[:, -1] = num_context_tokens / _CONTEXT_UNIT
    return features


def _least_squares(
    matrix: NDArray[np.float64], vector: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The x >= 0 with the least x'matrix x - 2 vector'x, or nearly.

    Coordinates that would be below zero are set to zero, until none is below zero. In
    the exact algorithm (Lawson & Hanson 1974) some might become positive again.
    """
    solution = np.zeros(len(vector))
    left = np.arange(len(vector))
    while len(left):
        some = np.linalg.solve(matrix[np.ix_(left, left)], vector[left])
        if (some >= 0).all():
            solution[left] = some
            break
        left = left[some > 0]
    return solution
