"""What a confidence comes to: the share of such tokens that are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Calibration:
    """What share of tokens of a confidence really survives.

    The mean over the recent tokens of about that confidence, from a start that believes
    the confidence; in between, straight lines. It never falls as confidence rises.
    """

    _NUM_BINS = 12
    _PRIOR_TOKENS = 10.0
    _MEMORY_TOKENS = 4000.0
    _FIT_EVERY = 256  # tokens: a fit takes longer than all else here

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
        """Tokens of these confidences survived, or did not."""
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
        """[num_tokens], calibrated."""
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
    """The never falling sequence nearest to `values` (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, other, length = pools.pop()
            both = other + pool[1]
            pool = ((mean * other + pool[0] * pool[1]) / both, both, length + pool[2])
        pools.append(pool)
    return np.repeat([p[0] for p in pools], [p[2] for p in pools])
