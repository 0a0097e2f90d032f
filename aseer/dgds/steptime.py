"""How long an engine's step takes, learned from the steps themselves.

A step's time is modelled as

    T(rows, drafted, context) = f(rows + drafted) + a [drafted > 0] + b drafted
                                + c context

with f piecewise linear between powers of two: flat where an engine waits for memory,
rising where it computes. a and b are what verification costs beyond the tokens' own
computation, c is attention's. The coefficients are the least squares of relative errors
over the recent steps, with a pull towards straight lines where nothing was measured.
No step is believed to take less than half of the fastest one seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KNOTS = np.array([1 << i for i in range(14)], np.float64)
_NUM_FEATURES = len(_KNOTS) + 3
_MEMORY_STEPS = 500
_SOLVE_EVERY = 16
_OUTLIER = 1.5  # times what was predicted, or so many times less
_LEAST = 0.5  # of the fastest step: what any step takes at least
_STRAIGHTNESS = 1e-2
_RIDGE = 1e-6
_CONTEXT_UNIT = 1e4  # tokens
_DRAFT_UNIT = 8.0


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
        features = _features(num_rows, num_drafted, num_context_tokens)
        least_s = _LEAST * step_s
        self._floor_s = min(self._floor_s or least_s, least_s)
        expected_s = step_s
        if self._num_observed > 3 * _SOLVE_EVERY:
            expected_s = max(float(features @ self._coefficients), self._floor_s)
            step_s = min(max(step_s, expected_s / _OUTLIER), expected_s * _OUTLIER)
        sums = self._profile if is_profile else self._recent
        if not is_profile:
            self._recent.decay(1 - 1 / _MEMORY_STEPS)
        sums.add(features, step_s, expected_s)
        if self._num_observed < _SOLVE_EVERY or not self._num_observed % _SOLVE_EVERY:
            self._solve()
        self._num_observed += 1

    def predict(
        self, num_rows: int, max_drafted: int, num_context_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds of a step with 0, 1, ... `max_drafted` drafted tokens; never falling.

        Zeros while nothing was measured.
        """
        drafted = np.arange(max_drafted + 1)
        of_knots = self._coefficients[:-3]
        of_any, of_drafted, of_context = self._coefficients[-3:].tolist()
        seconds: NDArray[np.float64] = np.interp(num_rows + drafted, _KNOTS, of_knots)
        seconds += of_context * num_context_tokens / _CONTEXT_UNIT
        seconds += of_drafted / _DRAFT_UNIT * drafted
        seconds[1:] += of_any
        np.maximum(seconds, self._floor_s, out=seconds)
        np.maximum.accumulate(seconds, out=seconds)
        return seconds

    def _solve(self) -> None:
        matrix = self._profile.matrix + self._recent.matrix
        matrix += _straightness(self._coefficients, self._floor_s)
        vector = self._profile.vector + self._recent.vector
        self._coefficients = np.asarray(np.linalg.solve(matrix, vector), np.float64)


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
    num_rows: int, num_drafted: int, num_context_tokens: int
) -> NDArray[np.float64]:
    """[_NUM_FEATURES], what the coefficients are multiplied with."""
    num_tokens = min(max(num_rows + num_drafted, 1), 1 << (len(_KNOTS) - 1))
    left = min(num_tokens.bit_length() - 1, len(_KNOTS) - 2)
    share = num_tokens / (1 << left) - 1
    features = np.zeros(_NUM_FEATURES)
    features[left] = 1 - share
    features[left + 1] = share
    features[-3] = num_drafted > 0
    features[-2] = num_drafted / _DRAFT_UNIT
    features[-1] = num_context_tokens / _CONTEXT_UNIT
    return features


def _bends() -> NDArray[np.float64]:
    """[knots - 2, features], how far f is, at a knot, from the line through the two
    before.
    """
    bends = np.zeros((len(_KNOTS) - 2, _NUM_FEATURES))
    ratios = np.diff(_KNOTS)[1:] / np.diff(_KNOTS)[:-1]
    for i, ratio in enumerate(ratios):
        bends[i, i : i + 3] = ratio, -1 - ratio, 1
    return bends


_BENDS = _bends()


def _straightness(
    coefficients: NDArray[np.float64], floor_s: float
) -> NDArray[np.float64]:
    """The squares of the bends, each relative to what f is there."""
    seconds = np.maximum(coefficients[2 : len(_KNOTS)], floor_s)
    ridge: NDArray[np.float64] = np.eye(_NUM_FEATURES) * (_RIDGE / floor_s**2)
    ridge += _BENDS.T @ ((_STRAIGHTNESS / seconds**2)[:, None] * _BENDS)
    return ridge
