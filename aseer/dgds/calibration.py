"""From confidences to probabilities: which share of such tokens is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Calibration:
    """Which share of the tokens of a confidence survives.

    The mean over recent tokens of about that confidence, beginning with the confidence
    itself; between means, straight lines. The share never falls as confidence rises.
    """

    _NUM_BINS = 12
    # The confidence itself counts as so many tokens.
    _PRIOR_TOKENS = 10.0
    # A token counts e times less after so many further tokens.
    _MEMORY_TOKENS = 4000.0
    # Tokens from one fit to the next: a fit takes longer than all else here.
    _FIT_EVERY = 256

    def __init__(self) -> None:
        centres = (np.arange(self._NUM_BINS) + 0.5) / self._NUM_BINS
        self._believed = self._PRIOR_TOKENS * centres
        self._num = np.zeros(self._NUM_BINS)
        self._said = np.zeros(self._NUM_BINS)
        self._survived = np.zeros(self._NUM_BINS)
        self._fit()

    def learn(
        self, confidences: NDArray[np.float32], survived: NDArray[np.bool_]
    ) -> None:
        """Learn which tokens of these confidences survived."""
        bins = np.minimum(
            (confidences * self._NUM_BINS).astype(np.int64), self._NUM_BINS - 1
        )
        keep = max(0.0, 1 - len(bins) / self._MEMORY_TOKENS)
        for sums, values in (
            (self._num, None),
            (self._said, confidences),
            (self._survived, survived),
        ):
            sums *= keep
            sums += np.bincount(bins, values, minlength=self._NUM_BINS)
        self._num_new += len(bins)
        if self._num_new >= self._FIT_EVERY:
            self._fit()

    def survivals(self, confidences: NDArray[np.float32]) -> NDArray[np.float64]:
        """[num_tokens], the calibrated survivals of these confidences."""
        survivals: NDArray[np.float64] = np.interp(confidences, self._x, self._y)
        return survivals

    def _fit(self) -> None:
        self._num_new = 0
        total = self._num + self._PRIOR_TOKENS
        said = (self._said + self._believed) / total
        true = rising_fit((self._survived + self._believed) / total, total)
        self._x = np.concatenate(([0.0], said, [1.0]))
        self._y = np.concatenate(([0.0], true, np.minimum(1.0, true[-1:] / said[-1])))


def rising_fit(
    values: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The non-decreasing sequence nearest to `values` (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, other, length = pools.pop()
            both = other + pool[1]
            pool = ((mean * other + pool[0] * pool[1]) / both, both, length + pool[2])
        pools.append(pool)
    return np.repeat([p[0] for p in pools], [p[2] for p in pools])
