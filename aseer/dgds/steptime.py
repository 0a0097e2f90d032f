"""How long an engine's step takes, learned from the steps themselves.

A step's time is modelled as

    T(rows, drafted, context) = f(rows + drafted) + a rows + b drafted + c [drafted > 0]
                                + d context

with f convex and piecewise linear: flat where an engine waits for memory, rising where
it computes. a is what a request costs beyond its token's computation, b and c what
verification does, d is attention's. No part is less than zero: tokens that seem to cost
nothing, because the machine was slower when there were fewer, would be drafted without
end. The coefficients are the least squares of relative errors over the recent steps,
with a pull towards straight lines and towards no costs of verification where nothing
was measured. No step is believed to take less than half of the fastest one seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# f's bends; before the first it is a straight line.
_KNOTS = np.array([1 << i for i in range(3, 13)], np.float64)
# Of tokens, rows, drafted tokens and tokens of context, to have features of like size.
_TOKEN_UNIT = 8.0
_CONTEXT_UNIT = 1e4
_NUM_FEATURES = 2 + len(_KNOTS) + 4
_MEMORY_STEPS = 500
_SOLVE_EVERY = 16
_EARLY_STEPS = 64  # with a solution after each
_OUTLIER = 1.5  # times what was predicted, or so many times less
_LEAST = 0.5  # of the fastest step: what any step takes at least
_PULL = 1e-2
_WEAK_PULL = 1e-6
_PULLS = np.array(
    [_WEAK_PULL] * 2 + [_PULL] * (len(_KNOTS) + 3) + [_WEAK_PULL], np.float64
)


class StepTimeModel:
    """Predicts a step's seconds; learns from every step."""

    def __init__(self) -> None:
        self._profile = _Sums()
        self._recent = _Sums()
        self._floor_s = 0.0
        self._num_observed = 0
        self._coefficients: NDArray[np.float64] = np.zeros(_NUM_FEATURES)

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
        features = _features(num_rows, np.array([num_drafted]), num_context_tokens)[0]
        least_s = _LEAST * step_s
        self._floor_s = min(self._floor_s or least_s, least_s)
        expected_s = step_s
        if self._num_observed >= _EARLY_STEPS:
            expected_s = max(float(features @ self._coefficients), self._floor_s)
            step_s = min(max(step_s, expected_s / _OUTLIER), expected_s * _OUTLIER)
        sums = self._profile if is_profile else self._recent
        if not is_profile:
            self._recent.decay(1 - 1 / _MEMORY_STEPS)
        sums.add(features, step_s, expected_s)
        if self._num_observed < _EARLY_STEPS or not self._num_observed % _SOLVE_EVERY:
            self._solve()
        self._num_observed += 1

    def predict(
        self, num_rows: int, max_drafted: int, num_context_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds of a step with 0, 1, ... `max_drafted` drafted tokens; never falling.

        Zeros while nothing was measured.
        """
        drafted = np.arange(max_drafted + 1)
        seconds: NDArray[np.float64] = (
            _features(num_rows, drafted, num_context_tokens) @ self._coefficients
        )
        return np.maximum(seconds, self._floor_s, out=seconds)

    def _solve(self) -> None:
        matrix = self._profile.matrix + self._recent.matrix
        matrix += np.diag(_PULLS / self._floor_s**2)
        vector = self._profile.vector + self._recent.vector
        self._coefficients = _least_squares(matrix, vector)


class _Sums:
    """What least squares needs to know of the steps."""

    def __init__(self) -> None:
        self.matrix = np.zeros((_NUM_FEATURES, _NUM_FEATURES))
        self.vector = np.zeros(_NUM_FEATURES)

    def decay(self, factor: float) -> None:
        self.matrix *= factor
        self.vector *= factor

    def add(self, features: NDArray[np.float64], value: float, expected: float) -> None:
        # By what was measured itself, quick steps of a noisy machine would weigh most.
        weight = 1 / expected**2
        self.matrix += weight * np.outer(features, features)
        self.vector += weight * value * features


def _features(
    num_rows: int, num_drafted: NDArray[np.int64], num_context_tokens: int
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

    What would be less than zero is left out until nothing is; none comes back, as in
    the exact algorithm (Lawson & Hanson 1974) some might.
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
