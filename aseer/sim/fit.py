"""A simulated cluster made from a real rollout's report.

In a stretch of an instance's timeline r requests took n steps in t seconds:

    n = (tokens made - drafts accepted) / r
    t = base n + per_token (tokens computed, drafted ones too) + per_kv_token (n KV)

The three prices are those, none below 0, that are off by the smallest share of t, as a
sum of squares. Stretches in which the engine did something else (a start, a pause, long
prompts: a timeline does not tell of them) stand out, and a second fit leaves them out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aseer.errors import ConfigError
from aseer.report import TimelineSample
from aseer.sim.cluster import Cluster
from aseer.sim.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_FEWEST = 8  # stretches that a fit wants
_FEWEST_STEPS = 32  # of a stretch
_OUTLIER = 4.0  # median deviations


@dataclass(frozen=True, kw_only=True)
class LinearSteps:
    """`StepTime` with a price for a step, a token in it, and a token of KV it reads.

    Attributes:
        prefill_token_s: of a prompt's token, of which steps take many at once; None =
            `token_s`, since a timeline does not tell.
    """

    base_s: float
    token_s: float
    kv_token_s: float
    prefill_token_s: float | None = None

    def seconds(self, num_tokens: float, num_kv_tokens: float) -> float:
        """See `StepTime`."""
        return self.base_s + self.token_s * num_tokens + self.kv_token_s * num_kv_tokens

    def prefill_s(self, num_tokens: int) -> float:
        """See `StepTime`."""
        price = self.prefill_token_s
        return (self.token_s if price is None else price) * num_tokens


def fit_steps(
    timeline: Sequence[TimelineSample], num_kv_tokens: Mapping[int, int]
) -> LinearSteps:
    """The step times at which instances made their tokens.

    Args:
        num_kv_tokens: KV capacity of each instance, in tokens.

    Raises:
        ConfigError: too little happened to tell.
    """
    samples: dict[int, list[TimelineSample]] = defaultdict(list)
    for sample in timeline:
        samples[sample.instance_id].append(sample)
    rows = [
        row
        for instance_id, of_one in samples.items()
        for row in _stretches(of_one, num_kv_tokens[instance_id])
    ]
    if len(rows) < _FEWEST:
        raise ConfigError(
            f"the timeline has {len(rows)} stretches with work, and a fit wants at "
            f"least {_FEWEST}; give the report of a longer rollout"
        )
    table = np.array(rows)
    prices = _nonnegative(table)
    off = np.abs(table @ prices - 1)
    prices = _nonnegative(table[off <= _OUTLIER * max(float(np.median(off)), 1e-6)])
    base_s, token_s, kv_token_s = prices.tolist()
    return LinearSteps(base_s=base_s, token_s=token_s, kv_token_s=kv_token_s)


def _stretches(samples: Sequence[TimelineSample], num_kv_tokens: int) -> list[Floats]:
    """Steps, tokens and KV tokens read, each by the second.

    A stretch goes on until it has so many steps that it hardly matters when exactly
    the tokens at its ends were reported.
    """
    rows = []
    start, busy, read = 0, 0.0, 0.0  # request-seconds, KV token-seconds
    for end in range(1, len(samples)):
        a, b = samples[end - 1], samples[end]
        if min(_running(a), _running(b)) < 1:
            start, busy, read = end, 0.0, 0.0
            continue
        passed = b.t_s - a.t_s
        busy += passed * (_running(a) + _running(b)) / 2
        read += passed * (a.kv_used + b.kv_used) / 2 * num_kv_tokens
        a = samples[start]
        passed = b.t_s - a.t_s
        accepted = b.num_accepted_tokens - a.num_accepted_tokens
        made = b.num_output_tokens - a.num_output_tokens - accepted
        if passed <= 0 or made * passed < _FEWEST_STEPS * busy:
            continue
        steps = made * passed / busy
        computed = made + b.num_drafted_tokens - a.num_drafted_tokens
        rows.append(np.array([steps, computed, steps * read / passed]) / passed)
        start, busy, read = end, 0.0, 0.0
    return rows


def _running(sample: TimelineSample) -> int:
    return sample.num_running - sample.num_waiting


def _nonnegative(table: Floats) -> Floats:
    """[3] prices >= 0 at which each row of the table comes nearest to 1."""
    best, least = np.zeros(3), float(len(table))
    scale = np.abs(table).max(axis=0) + 1e-300
    for which in map(list, chain(*(combinations(range(3), n) for n in (1, 2, 3)))):
        some = np.linalg.lstsq(table[:, which] / scale[which], np.ones(len(table)))[0]
        error = float(np.sum((table[:, which] / scale[which] @ some - 1) ** 2))
        if np.all(some >= 0) and error < least:
            best, least = np.zeros(3), error
            best[which] = some / scale[which]
    return best


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A real rollout, ready to be simulated.

    Attributes:
        report: as the rollout saved it.
        speculated: drafts were verified; the simulator's are others.
    """

    workload: Workload
    cluster: Cluster
    report: Mapping[str, Any]
    speculated: bool


def read_report(path: Path | str, *, max_num_seqs: int = 256) -> Measured:
    """Make a cluster and a workload of a saved `RolloutReport`.

    Args:
        path: of its `to_dict()` as JSON, or of the report.json of `aseer demo`.
        max_num_seqs: requests an engine ran at once, which no report tells.

    Raises:
        ConfigError: the file is no such report, or a fit is not possible.
    """
    try:
        report = json.loads(Path(path).read_text())
        timeline = [TimelineSample(**sample) for sample in report["timeline"]]
        instances = report["instances"]
        capacity = {
            i["instance_id"]: i["num_kv_blocks"] * i["block_size"] for i in instances
        }
        lengths: dict[str, list[int]] = defaultdict(list)
        for completion in report["completions"]:
            lengths[completion["group_id"]].append(completion["num_output_tokens"])
        num_prompt_tokens = report["num_prompt_tokens"] // report["num_responses"]
        block_size = instances[0]["block_size"]
        speculated = report["speculation"] is not None
    except (OSError, ValueError, TypeError, LookupError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{path} is not a rollout's report ({type(error).__name__}: {error}); give "
            "the report.json of `aseer demo`, or a RolloutReport.to_dict() as JSON"
        ) from error
    members = [[n for n in group if n > 0] for group in lengths.values()]
    members = [group for group in members if group]
    return Measured(
        workload=Workload(
            name=Path(path).stem,
            lengths=members,
            num_prompt_tokens=[num_prompt_tokens] * len(members),
            max_tokens=max((n for group in members for n in group), default=1),
        ),
        cluster=Cluster(
            num_instances=len(instances),
            step_time=fit_steps(timeline, capacity),
            num_kv_tokens=min(capacity.values()),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            shares_prompts=True,  # as vLLM does by default
        ),
        report=report,
        speculated=speculated,
    )
