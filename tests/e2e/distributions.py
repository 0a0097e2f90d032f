"""Whether two rollouts of the same groups are samples of the same distribution, or one
is of a distribution that is known.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import aseer

    Tokens = tuple[int, ...]

_NUM_TOKENS = 12  # the commonest, whose shares are compared
# Of 16 statistics at 4.5 standard errors, one is a false alarm in 9,000 runs.
_MOST = 4.5


def assert_alike(one: list[aseer.Response], other: list[aseer.Response]) -> None:
    """Statistics of whole responses do not differ more than chance lets them."""
    differences = in_standard_errors(one, other)
    worst = max(differences, key=lambda name: abs(differences[name]))
    assert abs(differences[worst]) < _MOST, (worst, differences)


def in_standard_errors(
    one: list[aseer.Response], other: list[aseer.Response]
) -> dict[str, float]:
    """How far the means of each statistic are apart, group by group."""
    common = np.bincount([t for r in one for t in r.token_ids]).argsort()[-_NUM_TOKENS:]
    statistics: dict[str, Any] = {
        "length": lambda r: len(r.token_ids),
        "finished": lambda r: r.finish_reason == "stop",
        "logprob": lambda r: np.mean(r.logprobs),
        "squared logprob": lambda r: np.mean(np.square(r.logprobs)),
        **{
            f"share of token {t}": lambda r, t=t: (
                r.token_ids.count(t) / len(r.token_ids)
            )
            for t in common.tolist()
        },
    }
    return {name: _apart(one, other, value) for name, value in statistics.items()}


def _apart(
    one: list[aseer.Response], other: list[aseer.Response], statistic: Any
) -> float:
    """The sum of the groups' differences of means, over its standard error."""
    apart = variance = 0.0
    for group_id in {r.group_id for r in one}:
        sides = [
            np.array([float(statistic(r)) for r in side if r.group_id == group_id])
            for side in (one, other)
        ]
        apart += sides[1].mean() - sides[0].mean()
        variance += sum(side.var(ddof=1) / len(side) for side in sides)
    if not variance:  # the same in every response of a side
        return float(np.sign(apart)) * np.inf if apart else 0.0
    return apart / np.sqrt(variance)


def exact(
    model: Any, prompt: list[int], allowed: list[int], length: int, temperature: float
) -> dict[Tokens, float]:
    """The probability of every response of so many tokens out of the allowed ones.

    Args:
        model: of transformers.
    """
    import torch

    texts = list(itertools.product(allowed, repeat=length))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *text] for text in texts])).logits
    logits = logits[:, len(prompt) - 1 : -1, allowed] / temperature
    places = torch.tensor([[allowed.index(token) for token in text] for text in texts])
    logprobs = torch.log_softmax(logits, -1).gather(2, places[:, :, None])
    return dict(zip(texts, logprobs.sum((1, 2)).exp().tolist(), strict=True))


def p_value(drawn: Sequence[Tokens], probabilities: Mapping[Tokens, float]) -> float:
    """Of Pearson's chi-square test; what is expected less than five times is pooled."""
    counts = Counter(drawn)
    expected = {text: p * len(drawn) for text, p in probabilities.items()}
    assert counts.keys() <= expected.keys()
    cells = [(counts[text], many) for text, many in expected.items() if many >= 5]
    few = [text for text, many in expected.items() if many < 5]
    if few:
        cells.append((sum(counts[t] for t in few), sum(expected[t] for t in few)))
    statistic = sum((seen - many) ** 2 / many for seen, many in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty's cube-root approximation of the tail.
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))
