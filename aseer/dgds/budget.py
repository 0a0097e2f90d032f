"""How many tokens to draft for each request of the next step.

The worth of a drafted token is its *survival*: the probability that the token and all
before it in its draft are accepted. Its cost is the time by which it lengthens the
step. `AdaptiveBudget` takes tokens in descending order of weight x survival, as long as
the step's tokens a second still rise; it drafts nothing where a step without drafts
yields more (I7). `FixedBudget` and `PaperBudget` are there to compare with.

Survivals come from the trees' confidences, calibrated by what was accepted. Pure: step
times and acceptances are arguments.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from aseer.dgds._cst import spend as _spend
from aseer.dgds.calibration import Calibration

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aseer.dgds.steptime import StepTimeModel
    from aseer.inputs.speculation import SpeculationConfig

# Tokens of less confidence are hardly ever worth their time, and are not looked at.
MIN_CONFIDENCE = 0.02
# A step with drafts must yield so much more than a step without. Drafts whose price is
# underestimated are chosen more often than others, so without a margin steps would be
# slower than they seem.
_MARGIN = 0.05
# In a step of at most so many requests drafts may be `tail_draft_tokens` long.
_TAIL_ROWS = 4
# Looking for drafts takes time as well. While a look costs more than drafts save, most
# steps do without one, but at most so many in a row, so that a change is noticed.
_MOST_UNSEEN_STEPS = 15
# Means are over about so many recent looks.
_MEMORY_LOOKS = 32
# Drafts are charged at most this share of a plain step as a loss: a step that took even
# longer was delayed by the machine.
_WORST = 0.5


class Candidates(NamedTuple):
    """What could be drafted for a step: one row for each request.

    Attributes:
        confidences: [num_tokens], how likely a token and all before it in its row are
            accepted, so they never rise along a row.
        offsets: [num_rows + 1], where each row begins; the last is the end.
        weights: [num_rows], what a token of the row is worth.
        num_context_tokens: tokens of context, over all rows.
    """

    confidences: NDArray[np.float32]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float64]
    num_context_tokens: int

    @property
    def num_rows(self) -> int:
        return len(self.weights)


class Outcome(NamedTuple):
    """What became of a step's drafts.

    Attributes:
        confidences: [num_tokens], of the drafted tokens, one draft after the other.
        num_drafted, num_accepted: [num_drafts], tokens of each draft.
    """

    confidences: NDArray[np.float32]
    num_drafted: NDArray[np.int64]
    num_accepted: NDArray[np.int64]

    @property
    def survived(self) -> NDArray[np.bool_]:
        """[num_tokens], whether each was accepted."""
        starts = np.cumsum(self.num_drafted) - self.num_drafted
        position = np.arange(len(self.confidences)) - np.repeat(
            starts, self.num_drafted
        )
        return position < np.repeat(self.num_accepted, self.num_drafted)


class Budget(Protocol):
    """Chooses draft lengths."""

    def max_draft_tokens(self, num_rows: int) -> int:
        """The most tokens to look for, for each request of the next step."""
        ...

    def choose(self, candidates: Candidates) -> NDArray[np.int64]:
        """[num_rows], how many tokens of each row to draft."""
        ...

    def learn(self, outcome: Outcome) -> None:
        """Learn what became of the last step's drafts."""
        ...

    def pay(self, num_rows: int, look_s: float) -> None:
        """Learn how long a look for drafts took, `choose` included."""
        ...

    def settle(
        self, num_rows: int, num_sampled: int, num_context_tokens: int, step_s: float
    ) -> None:
        """Learn how long a step with drafts took, and how many tokens it sampled."""
        ...


class FixedBudget:
    """Drafts all there is, up to a length."""

    def __init__(self, max_draft_tokens: int) -> None:
        self._max = max_draft_tokens

    def max_draft_tokens(self, num_rows: int) -> int:
        """See `Budget`."""
        return self._max

    def choose(self, candidates: Candidates) -> NDArray[np.int64]:
        """See `Budget`."""
        return np.diff(candidates.offsets)

    def learn(self, outcome: Outcome) -> None:
        """See `Budget`."""

    def pay(self, num_rows: int, look_s: float) -> None:
        """See `Budget`."""

    def settle(
        self, num_rows: int, num_sampled: int, num_context_tokens: int, step_s: float
    ) -> None:
        """See `Budget`."""


class AdaptiveBudget:
    """Drafts while the gain pays for the time."""

    def __init__(
        self, model: StepTimeModel, max_draft_tokens: int, tail_draft_tokens: int
    ) -> None:
        self._model = model
        self._max = max_draft_tokens
        self._tail = tail_draft_tokens
        self._calibration = Calibration()
        # By the logarithm of the number of requests.
        self._worths: defaultdict[int, _Worth] = defaultdict(_Worth)
        self._num_unseen = 0  # steps to come without a look

    def max_draft_tokens(self, num_rows: int) -> int:
        """See `Budget`; 0 while looking costs more than it saves."""
        if self._num_unseen:
            self._num_unseen -= 1
            return 0
        return self._tail if num_rows <= _TAIL_ROWS else self._max

    def choose(self, candidates: Candidates) -> NDArray[np.int64]:
        """See `Budget`."""
        num_tokens = len(candidates.confidences)
        step_s = self._model.predict(
            candidates.num_rows, num_tokens, candidates.num_context_tokens
        )
        survivals = self._calibration.survivals(candidates.confidences)
        spent = spend(survivals, candidates.offsets, candidates.weights, step_s)
        self._worth(candidates.num_rows).find(spent.saved_s, float(step_s[0]))
        return spent.lengths

    def learn(self, outcome: Outcome) -> None:
        """See `Budget`."""
        self._calibration.learn(outcome.confidences, outcome.survived)

    def pay(self, num_rows: int, look_s: float) -> None:
        """See `Budget`."""
        self._num_unseen = self._worth(num_rows).pay(look_s)

    def settle(
        self, num_rows: int, num_sampled: int, num_context_tokens: int, step_s: float
    ) -> None:
        """See `Budget`. Measured savings count, since promises are too high: the drafts
        that are chosen are those that promise most.
        """
        plain_s = float(self._model.predict(num_rows, 0, num_context_tokens)[0])
        saved_s = plain_s * num_sampled / num_rows - step_s
        self._worth(num_rows).settle(max(saved_s, -_WORST * plain_s))

    def _worth(self, num_rows: int) -> _Worth:
        return self._worths[num_rows.bit_length()]


@dataclass(slots=True)
class _Mean:
    """The mean of recent values; the value it starts with counts as one of them."""

    value: float
    num: int = 1

    def add(self, value: float) -> None:
        self.num = min(self.num + 1, _MEMORY_LOOKS)
        self.value += (value - self.value) / self.num


class _Worth:
    """Whether a look for drafts pays, in steps of about the same number of requests.

    Steps whose drafts pay come in runs, as when a request repeats what a sibling wrote.
    So the share of looks that find such drafts is kept separately for looks that follow
    a find and for looks that do not.
    """

    def __init__(self) -> None:
        self._found = True  # whether the last look found drafts that pay
        # The share of looks that find some: after a look that did not, and after one
        # that did.
        self._shares = _Mean(1.0), _Mean(1.0)
        self._look_s = 0.0
        self._saved_s = _Mean(0.0)  # by drafts that pay

    def find(self, promised_s: float, plain_s: float) -> None:
        """Learn that a look found drafts.

        Args:
            promised_s: what they promise to save; 0 = the look found none.
            plain_s: what a step without drafts takes.
        """
        self._shares[self._found].add(promised_s > 0)
        self._found = promised_s > 0
        if self._saved_s.num == 1:  # nothing was measured yet
            self._saved_s.value = promised_s or plain_s

    def pay(self, look_s: float) -> int:
        """Learn how long the look took; returns how many steps to do without one."""
        self._look_s += (look_s - self._look_s) / _MEMORY_LOOKS
        saved_s = self._shares[self._found].value * self._saved_s.value
        if self._look_s < (_MOST_UNSEEN_STEPS + 1) * saved_s:
            return int(self._look_s / saved_s)
        return _MOST_UNSEEN_STEPS

    def settle(self, saved_s: float) -> None:
        """Learn how much drafts saved."""
        self._saved_s.add(saved_s)


class Spent(NamedTuple):
    """A step's drafts.

    Attributes:
        lengths: [num_rows], how many tokens of each row to draft.
        saved_s: how much longer steps without drafts would take for the same tokens.
    """

    lengths: NDArray[np.int64]
    saved_s: float


def spend(
    survivals: NDArray[np.float64],
    offsets: NDArray[np.int64],
    weights: NDArray[np.float64],
    step_s: NDArray[np.float64],
    *,
    margin: float = _MARGIN,
) -> Spent:
    """Share out a step's draft tokens so that the step yields the most worth a second.

    Every row yields a token without a draft. For every k, the k worthiest tokens are a
    choice. Admitted are the choices that yield more tokens a second than no draft does,
    by `margin`; taken is the admitted one with the most weighted tokens a second.

    Args:
        survivals: [num_tokens], never rising along a row.
        offsets: [num_rows + 1]. weights: [num_rows].
        step_s: [num_tokens + 1], a step's seconds by the number of drafted tokens.

    Raises:
        ValueError: sizes disagree.
    """
    return Spent(*_spend(survivals, offsets, weights, step_s, margin))


class PaperBudget:
    """The rule of Seer's Algorithm 1, as printed.

    The draft length g with the least time a token, by the mean acceptance a at this
    batch, gives a budget of g tokens a request. It is shared between probes and the
    rest: whichever class has the larger *drop* of acceptance from its next position to
    the one after gets that position, the rest's drop being multiplied by the weight.

    Source: Seer §3.4, App. A.2. `beta[0]`, undefined there, is 1. See
    `AdaptiveBudget` for what is better.
    """

    def __init__(
        self, model: StepTimeModel, max_draft_tokens: int, probe_weight: float
    ) -> None:
        self._model = model
        self._max = max_draft_tokens
        self._probe_weight = probe_weight
        self._num_drafted = np.full(max_draft_tokens, 10.0)
        self._num_accepted = 10.0 * 0.6 ** np.arange(1, max_draft_tokens + 1)

    def max_draft_tokens(self, num_rows: int) -> int:
        """See `Budget`."""
        return self._max

    def choose(self, candidates: Candidates) -> NDArray[np.int64]:
        """See `Budget`."""
        num_rows = candidates.num_rows
        step_s = self._model.predict(
            num_rows, num_rows * self._max, candidates.num_context_tokens
        )
        is_probe = candidates.weights > 1
        probe, rest = self._lengths(
            int(is_probe.sum()), int(num_rows - is_probe.sum()), step_s[::num_rows]
        )
        lengths: NDArray[np.int64] = np.diff(candidates.offsets)
        np.minimum(lengths, np.where(is_probe, probe, rest), out=lengths)
        return lengths

    def _lengths(
        self, num_probes: int, num_rest: int, step_s: NDArray[np.float64]
    ) -> tuple[int, int]:
        survival = self._num_accepted / self._num_drafted
        acceptance = min(float(survival[0]), 0.999)
        lengths = np.arange(self._max + 1)
        tokens = (1 - acceptance ** (lengths + 1)) / (1 - acceptance)
        best = int(np.argmin(step_s / tokens))
        left = best * (num_probes + num_rest)
        beta = np.concatenate(([1.0], survival, [survival[-1]]))
        drops = -np.diff(beta)
        probe = rest = 0
        while left > 0:
            gain_probe = drops[probe] if num_probes and probe < self._max else -1.0
            gain_rest = drops[rest] if num_rest and rest < self._max else -1.0
            if max(gain_probe, gain_rest) < 0:
                break
            if gain_probe >= self._probe_weight * gain_rest:
                probe, left = probe + 1, left - num_probes
            else:
                rest, left = rest + 1, left - num_rest
        return probe, rest

    def learn(self, outcome: Outcome) -> None:
        """See `Budget`."""
        positions = np.arange(1, self._max + 1)
        for sums, lengths in (
            (self._num_drafted, outcome.num_drafted),
            (self._num_accepted, outcome.num_accepted),
        ):
            sums *= 0.999
            sums += (lengths[:, None] >= positions).sum(axis=0)

    def pay(self, num_rows: int, look_s: float) -> None:
        """See `Budget`."""

    def settle(
        self, num_rows: int, num_sampled: int, num_context_tokens: int, step_s: float
    ) -> None:
        """See `Budget`."""


def make_budget(settings: SpeculationConfig, model: StepTimeModel) -> Budget:
    """The budget that the settings name."""
    if settings.budget == "fixed":
        return FixedBudget(settings.max_draft_tokens)
    if settings.budget == "paper":
        return PaperBudget(model, settings.max_draft_tokens, settings.probe_weight)
    return AdaptiveBudget(model, settings.max_draft_tokens, settings.tail_draft_tokens)
