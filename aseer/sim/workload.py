"""What is to be rolled out: groups, and how long each of their responses will be.

Lengths of the paper's workloads are not published, only their mean and maximum (Seer,
Table 3) and a picture of how alike siblings are (Figure 4). `lognormal` draws from the
family that such lengths are usually found in: a group's typical length and a member's
distance from it are both lognormal, cut off at the maximum, and the scale is chosen so
that the mean comes out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aseer.data import trace
from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A rollout's groups.

    Attributes:
        lengths: [num_groups][group size], tokens of every response.
        num_prompt_tokens: [num_groups].
        max_tokens: that a response may have; nobody knows the lengths beforehand.
    """

    name: str
    lengths: Sequence[Sequence[int]]
    num_prompt_tokens: Sequence[int]
    max_tokens: int

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError(f"workload {self.name!r} has no group")
        if len(self.lengths) != len(self.num_prompt_tokens):
            raise ConfigError("lengths and num_prompt_tokens have different sizes")
        for group, members in enumerate(self.lengths):
            if not members or min(members) < 1 or max(members) > self.max_tokens:
                raise ConfigError(
                    f"group {group} has lengths {list(members)}; give at least one, "
                    f"each from 1 to max_tokens={self.max_tokens}"
                )

    @property
    def num_requests(self) -> int:
        return sum(len(members) for members in self.lengths)

    @property
    def num_tokens(self) -> int:
        """Output tokens of the whole rollout."""
        return sum(sum(members) for members in self.lengths)


def lognormal(
    *,
    name: str,
    num_groups: int,
    group_size: int,
    mean: float,
    max_tokens: int,
    sigma: float = 0.8,
    correlation: float = 0.85,
    num_prompt_tokens: int = 512,
    seed: int = 0,
    epoch: int = 0,
) -> Workload:
    """Draw a workload.

    Args:
        mean: of the lengths, after they are cut off at `max_tokens`.
        sigma: standard deviation of the logarithm of a length.
        correlation: of siblings' logarithms (the share of sigma^2 between groups).
        epoch: of the same prompts with other responses.
    """
    if not 0 < mean < max_tokens:
        raise ConfigError(f"mean={mean} must be above 0 and below {max_tokens}")
    rng = np.random.default_rng(seed)
    between = sigma * correlation**0.5 * rng.standard_normal((num_groups, 1))
    within = sigma * (1 - correlation) ** 0.5
    if epoch:
        rng = np.random.default_rng((seed, epoch))
    shape = np.exp(between + within * rng.standard_normal((num_groups, group_size)))
    lengths = _scaled(shape, mean, max_tokens)
    return Workload(
        name=name,
        lengths=lengths.tolist(),
        num_prompt_tokens=[num_prompt_tokens] * num_groups,
        max_tokens=max_tokens,
    )


def _scaled(
    shape: NDArray[np.float64], mean: float, max_tokens: int
) -> NDArray[np.int64]:
    """The lengths of that shape, cut off, whose mean is as asked for."""
    low, high = 0.0, max_tokens / float(shape.min())
    for _ in range(60):  # bisection
        scale = (low + high) / 2
        if np.minimum(scale * shape, max_tokens).mean() < mean:
            low = scale
        else:
            high = scale
    return np.clip(np.rint(high * shape), 1, max_tokens).astype(np.int64)


def paper(name: str, *, seed: int = 0, scale: float = 1.0, epoch: int = 0) -> Workload:
    """One iteration of a workload of Seer's Table 3: a key of `PAPER`.

    Args:
        scale: of the number of groups, for quicker runs.
        epoch: of the same prompts.
    """
    settings = PAPER[name]
    num_groups = max(1, round(scale * settings["num_groups"]))
    return lognormal(
        name=name, seed=seed, epoch=epoch, **{**settings, "num_groups": num_groups}
    )


# Prompts and sigma are ours; sigma such that the longest reach the maximum.
PAPER: dict[str, dict[str, Any]] = {
    "moonlight": {
        "num_groups": 400,
        "group_size": 8,
        "mean": 22_386,
        "max_tokens": 65_536,
        "sigma": 0.75,
        "num_prompt_tokens": 512,
    },
    "qwen2-vl-72b": {
        "num_groups": 600,
        "group_size": 16,
        "mean": 7_615,
        "max_tokens": 40_960,
        "sigma": 0.9,
        "num_prompt_tokens": 1_500,
    },
    "kimi-k2": {
        "num_groups": 800,
        "group_size": 8,
        "mean": 38_959,
        "max_tokens": 98_304,
        "sigma": 0.75,
        "num_prompt_tokens": 512,
    },
}


def load(path: Path | str, *, max_tokens: int | None = None) -> Workload:
    """Read a workload from a recorded rollout (`data/trace.py`), or from lengths alone.

    Of lengths there is a JSON list with one object a group, which has `lengths` (tokens
    of every response) and `num_prompt_tokens`.

    Raises:
        ConfigError: the file is not like that.
    """
    try:
        groups, settings = trace.read(path)
        lengths = [
            g["lengths"] if "lengths" in g else [len(r) for r in g["responses"]]
            for g in groups
        ]
        prompts = [
            g["num_prompt_tokens"] if "num_prompt_tokens" in g else len(g["prompt"])
            for g in groups
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a workload ({type(error).__name__}: {error}); give a JSON "
            'list with an object a group: {"lengths": [...], "num_prompt_tokens": n}'
        ) from error
    longest = max((n for members in lengths for n in members), default=0)
    return Workload(
        name=Path(path).stem,
        lengths=lengths,
        num_prompt_tokens=prompts,
        max_tokens=max_tokens or settings.get("max_tokens") or longest,
    )


def save(workload: Workload, path: Path | str) -> None:
    """Write a workload as `load` reads it."""
    groups = [
        {"num_prompt_tokens": prompt, "lengths": list(members)}
        for prompt, members in zip(
            workload.num_prompt_tokens, workload.lengths, strict=True
        )
    ]
    Path(path).write_text(json.dumps(groups))
