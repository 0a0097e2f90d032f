"""What becomes of context-aware scheduling where siblings are not alike, simulated.

Lengths are lognormal, from siblings that are all but equal to siblings that have
nothing in common, or recorded (`--traces`, see `aseer record`). Two small engines have
KV for a third of the requests that they may run, so that order counts. The arms: first
come first served, the order for siblings that are alike, whatever they are, the order
for siblings that are not, the default, which takes the one or the other by what it
sees, and the oracle. Speedups and tail times are relative to verl today (undivided, to
the least loaded), of the same seed; a seed draws lengths, or shuffles recorded groups.

Expected: the default is as good as the better of the two, less what it loses until it
knows.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import print_result, quantiles, result_line

from aseer.policies import POLICIES
from aseer.sim import Cluster, simulate
from aseer.sim import workload as workloads
from aseer.sim.fit import LinearSteps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aseer.config import PolicyName
    from aseer.policies import Policy
    from aseer.sim import Workload

GROUPS = 32
GROUP_SIZE = 8
MAX_TOKENS = 1024
CHUNK_SIZE = 64
MAX_NUM_SEQS = 32
KV_SHARE = 1 / 3
SIGMA = 1.2
CORRELATIONS = (0.95, 0.85, 0.7, 0.5, 0.2, 0.0)
# About what SmolLM2's shape takes on one core.
STEPS = LinearSteps(base_s=0.011, token_s=0.00055, kv_token_s=0.0)
LOAD_TOKENS_PER_S = 20_000.0

CONTEXT = POLICIES["context-aware"]
assert CONTEXT.if_unlike is not None
ARMS: dict[str, Policy | PolicyName] = {
    "divided": "fcfs",
    "as if alike": replace(CONTEXT, if_unlike=None),
    "as if unlike": CONTEXT.if_unlike,
    "context-aware": CONTEXT,
    "oracle": "longest-first",
}


def cluster_for(workload: Workload) -> Cluster:
    """Two engines that have KV for a third of what they may run."""
    needs = [
        prompt + length
        for prompt, lengths in zip(
            workload.num_prompt_tokens, workload.lengths, strict=True
        )
        for length in lengths
    ]
    num_kv_tokens = round(KV_SHARE * MAX_NUM_SEQS * statistics.mean(needs))
    return Cluster(
        num_instances=2,
        step_time=STEPS,
        num_kv_tokens=max(num_kv_tokens, max(needs) + CHUNK_SIZE),
        max_num_seqs=MAX_NUM_SEQS,
        kv_bytes_per_token=1.0,
        load_bytes_per_s=LOAD_TOKENS_PER_S,
    )


def drawn(correlation: float, seeds: int) -> Iterator[Workload]:
    """Lognormal lengths."""
    for seed in range(seeds):
        yield workloads.lognormal(
            name=f"correlation {correlation}",
            num_groups=GROUPS,
            group_size=GROUP_SIZE,
            mean=MAX_TOKENS / 5,
            max_tokens=MAX_TOKENS,
            sigma=SIGMA,
            correlation=correlation,
            num_prompt_tokens=64,
            seed=seed,
        )


def recorded(path: str, seeds: int) -> Iterator[Workload]:
    """Recorded lengths, the groups in another order for every seed."""
    workload = workloads.load(path)
    for seed in range(seeds):
        order = list(range(len(workload.lengths)))
        random.Random(seed).shuffle(order)
        yield replace(
            workload,
            lengths=[workload.lengths[i] for i in order],
            num_prompt_tokens=[workload.num_prompt_tokens[i] for i in order],
        )


def figures_of(work: Iterator[Workload]) -> dict[str, Any]:
    """Every arm's speedup and tail, and its share of the oracle's throughput."""
    rows: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
    for workload in work:
        cluster = cluster_for(workload)
        today = simulate(workload, cluster, policy="least-loaded")
        reports = {
            arm: simulate(workload, cluster, policy=policy, chunk_size=CHUNK_SIZE)
            for arm, policy in ARMS.items()
        }
        best_s = reports["oracle"].wall_s
        for arm, report in reports.items():
            rows[arm].append(
                (
                    today.wall_s / report.wall_s,
                    best_s / report.wall_s,
                    report.tail_s / today.tail_s,
                )
            )
    return {
        arm: dict(
            zip(
                ("speedup", "of_oracle", "tail"),
                map(quantiles, zip(*values, strict=True)),
                strict=True,
            )
        )
        for arm, values in rows.items()
    }


def table(by_workload: Mapping[str, Mapping[str, Any]]) -> str:
    """Medians."""
    lines = ["| | " + " | ".join(ARMS) + " |", "|---" * (1 + len(ARMS)) + "|"]
    for name, figures in by_workload.items():
        cells = [
            f"{row['speedup']['median']:.2f}, {row['of_oracle']['median']:.0%}, "
            f"{row['tail']['median']:.2f}"
            for row in figures.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", nargs="*", default=[], help="recorded rollouts")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="seconds")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    if args.smoke:
        args.seeds = 1
    by_workload: dict[str, dict[str, Any]] = {}
    for path in args.traces:
        name = Path(path).name.removesuffix(".gz").removesuffix(".json")
        by_workload[name] = figures_of(recorded(path, args.seeds))
    for correlation in CORRELATIONS:
        name = f"correlation {correlation}"
        by_workload[name] = figures_of(drawn(correlation, args.seeds))
        print(f"{name}: done", flush=True)
    print(table(by_workload))
    settings = {
        "traces": [Path(path).name for path in args.traces],
        "seeds": args.seeds,
        "chunk_size": CHUNK_SIZE,
        "max_num_seqs": MAX_NUM_SEQS,
        "sigma": SIGMA,
    }
    figures = {"workloads": by_workload}
    print_result(
        result_line("order", settings=settings, figures=figures), save_as=args.save
    )


if __name__ == "__main__":
    main()
