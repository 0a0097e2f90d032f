"""The Seer paper's ablation, on simulated clusters of its size, beside its figures.

For each workload of its Table 3: groups in turn on undivided engines (its veRL),
divided rollout, context-aware scheduling as the paper has it, what aseer adds to that,
and grouped drafts. Then rollouts that come back to their prompts (`length_priors`):
they know each group's longest response of the last epoch, whose lengths are drawn anew
for the same groups; "drifted", each group's have changed by a factor of their own
since. Last what nobody has, to know what knowledge is worth: all lengths of a group
told as soon as its first response is finished, the longest length of each group told at
the start, and the oracle, which knows every length. Speedups and tail times are
relative to the first arm, and ratios to the oracle of the same seed, with drafts or
without.

Expected: the order of the paper's arms, and its pathologies in the first (idle engines,
thousands of preemptions, a long tail) where KV is short. Not its seconds: the roofline
knows nothing of what its engines lost to communication and framework. Drafts gain more
than the paper's: in the simulator verifying a token costs its FLOPs and nothing else.

Rollouts that `--runs FILE` has from an earlier call are not simulated again, so that
many seeds can be done bit by bit; the result says which commits they are of.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import commit, print_result, quantiles, result_line

from aseer.policies import POLICIES, Policy
from aseer.sim import GPUS, MODELS, Cluster, Roofline, simulate
from aseer.sim import workload as workloads

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.core.waiting import Rank, Waiting
    from aseer.sim import Workload

# Instances and GPUs of each (Table 3), and speedups over its veRL (its ablation).
CLUSTERS = {"moonlight": (32, 1), "qwen2-vl-72b": (16, 8), "kimi-k2": (8, 32)}
PAPER = {
    "moonlight": {"divided": 1.41, "+ context-aware": 1.47, "+ grouped drafts": 1.90},
    "qwen2-vl-72b": {
        "divided": 1.42,
        "+ context-aware": 1.56,
        "+ grouped drafts": 2.04,
        "oracle": 1.63,
    },
    "kimi-k2": {"divided": 1.16, "+ context-aware": 1.27, "+ grouped drafts": 1.53},
}
# "priors" is how far groups drifted since: standard deviation of the logarithm.
LOAD_BYTES_PER_S = 50e9  # one of a node's 400 Gb/s links


def rank_told(request: Waiting, length_estimate: int) -> Rank:
    """By true lengths, once the group's first response is finished."""
    length = request.known_length
    assert length is not None
    if length_estimate >= request.num_generated + request.remaining:  # none is
        priority = 0 if request.is_probe else 1
        return (priority, request.num_generated - length_estimate, request.arrival)
    return (1, request.num_generated - length, request.arrival)


def rank_paper(request: Waiting, length_estimate: int) -> Rank:
    """Seer's Algorithm 2: of those alike, whoever has the fewest tokens."""
    if request.is_probe:
        return (0, request.num_generated, request.arrival)
    return (1, -length_estimate, request.num_generated, request.arrival)


CONTEXT = POLICIES["context-aware"]
PAPERS = Policy("context-aware", rank_paper, "affinity")
ORACLE = {"policy": "longest-first", "starvation_interval": 32}
ARMS: dict[str, dict[str, Any]] = {
    "groups in turn": {"policy": "group-round-robin"},
    "least loaded (today)": {"policy": "least-loaded"},
    "divided": {"policy": "fcfs", "starvation_interval": 32},
    "+ context-aware": {"policy": PAPERS, "starvation_interval": 32},
    "+ starved less often": {"policy": PAPERS, "starvation_interval": 256},
    "+ who runs goes on": {"starvation_interval": 256},
    "+ chunks of 1024": {"chunk_size": 1024, "starvation_interval": 256},
    "+ grouped drafts": {"drafting": "grouped", "starvation_interval": 256},
    "+ priors": {"priors": 0.0, "starvation_interval": 256},
    "+ priors, drifted": {"priors": 0.3, "starvation_interval": 256},
    "+ priors, drafts": {
        "priors": 0.0,
        "drafting": "grouped",
        "starvation_interval": 256,
    },
    "told at first finish": {
        "policy": replace(CONTEXT, rank=rank_told, if_unlike=None),
        "known": "lengths",
        "starvation_interval": 256,
    },
    "longest of group known": {**ORACLE, "known": "longest"},
    "oracle": ORACLE,
    "oracle + drafts": {**ORACLE, "drafting": "grouped"},
}


# Whose throughput is compared with whose, over the seeds.
PAIRS = (
    ("+ starved less often", "+ context-aware"),
    ("+ who runs goes on", "+ starved less often"),
    ("+ chunks of 1024", "+ who runs goes on"),
    ("+ who runs goes on", "oracle"),
    ("+ priors", "+ who runs goes on"),
    ("+ priors, drifted", "+ who runs goes on"),
    ("+ priors, drafts", "+ grouped drafts"),
    ("told at first finish", "oracle"),
    ("+ grouped drafts", "oracle + drafts"),
)


def known_lengths(work: Workload, known: str | None) -> list[list[int]] | None:
    """What an arm is told of the lengths."""
    if known == "longest":
        return [[max(lengths)] * len(lengths) for lengths in work.lengths]
    return [list(lengths) for lengths in work.lengths] if known else None


def length_priors(
    name: str, seed: int, scale: float, drift: float | None
) -> list[int] | None:
    """The longest response of each group in the last epoch."""
    if drift is None:
        return None
    last = workloads.paper(name, seed=seed, scale=scale, epoch=1)
    factors = np.exp(
        drift * np.random.default_rng(seed).standard_normal(len(last.lengths))
    )
    return [round(f * max(n)) for f, n in zip(factors, last.lengths, strict=True)]


def make_cluster(name: str, scale: float) -> Cluster:
    """The paper's, or a share of it."""
    num_instances, num_gpus = CLUSTERS[name]
    shape = Roofline(model=MODELS[name], gpu=GPUS["H800"], num_gpus=num_gpus)
    return Cluster(
        num_instances=max(1, round(scale * num_instances)),
        step_time=shape,
        num_kv_tokens=shape.kv_tokens(),
        kv_bytes_per_token=shape.model.kv_bytes_per_token,
        load_bytes_per_s=LOAD_BYTES_PER_S,
    )


def run_arm(name: str, seed: int, scale: float, arm: str) -> dict[str, Any]:
    """One rollout's figures."""
    settings = dict(ARMS[arm])
    work = workloads.paper(name, seed=seed, scale=scale)
    known = known_lengths(work, settings.pop("known", None))
    priors = length_priors(name, seed, scale, settings.pop("priors", None))
    started = time.perf_counter()
    report = simulate(
        work,
        make_cluster(name, scale),
        known_lengths=known,
        length_priors=priors,
        **settings,
    )
    return {
        "wall_s": report.wall_s,
        "tail_s": report.tail_s,
        "idle": report.idle_fraction,
        "preemptions": report.num_preemptions,
        "simulated_in_s": time.perf_counter() - started,
    }


class Runs:
    """Rollouts by what was simulated, kept in a file with a line each."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._known: dict[str, dict[str, Any]] = {}
        self.commits: set[str | None] = set()
        if self._path is not None and self._path.exists():
            for line in self._path.read_text().splitlines():
                run = json.loads(line)
                self._known[run["key"]] = run

    def get(self, name: str, seed: int, scale: float, arm: str) -> dict[str, Any]:
        """As kept, or else simulated now."""
        key = json.dumps([name, seed, scale, arm])
        run = self._known.get(key)
        if run is None:
            figures = run_arm(name, seed, scale, arm)
            run = {"key": key, "commit": commit(), "figures": figures}
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
        self.commits.add(run["commit"])
        found: dict[str, Any] = run["figures"]
        return found


def rollouts_of(
    name: str, args: argparse.Namespace, runs: Runs
) -> dict[str, list[dict[str, Any]]]:
    """Every arm's rollouts, by seed."""
    figures: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for arm in ARMS:
            figures[arm].append(runs.get(name, seed, args.scale, arm))
        print(f"{name}: seed {seed} done", flush=True)
    return figures


def ratios(figures: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean ratios of throughput, with their standard errors."""
    rows = []
    for arm, base in PAIRS:
        both = zip(figures[base], figures[arm], strict=True)
        values = [b["wall_s"] / a["wall_s"] for b, a in both]
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        row: dict[str, Any] = {
            "arm": arm,
            "over": base,
            "mean": round(float(np.mean(values)), 4),
            "standard_error": None if error is None else round(float(error), 4),
        }
        rows.append(row)
    return rows


def summary(
    name: str, figures: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """A row an arm."""
    bases = figures["groups in turn"]
    rows = []
    for arm, rollouts in figures.items():
        both = list(zip(bases, rollouts, strict=True))
        drafts = ARMS[arm].get("drafting")
        oracles = figures["oracle + drafts" if drafts else "oracle"]
        over_oracle = zip(oracles, rollouts, strict=True)
        row: dict[str, Any] = {
            "arm": arm,
            "speedup": quantiles([b["wall_s"] / r["wall_s"] for b, r in both]),
            "paper": PAPER[name].get(arm),
            "of_oracle": quantiles([o["wall_s"] / r["wall_s"] for o, r in over_oracle]),
            "tail": quantiles([r["tail_s"] / b["tail_s"] for b, r in both]),
            "idle": quantiles([r["idle"] for r in rollouts]),
            "preemptions": quantiles([r["preemptions"] for r in rollouts], 0),
            "simulated_in_s": quantiles([r["simulated_in_s"] for r in rollouts], 1),
        }
        rows.append(row)
        print(
            f"{name:14s} {arm:22s} speedup {row['speedup']['median']:.2f} "
            f"(paper {row['paper'] or '-'}), {row['of_oracle']['median']:.3f} of the "
            f"oracle, tail {row['tail']['median']:.2f}, "
            f"idle {row['idle']['median']:.2f}, "
            f"preemptions {row['preemptions']['median']:.0f}",
            flush=True,
        )
    return rows


def markdown(
    by_workload: dict[str, list[dict[str, Any]]],
    name: Callable[[dict[str, Any]], str],
    cell: Callable[[dict[str, Any]], str],
) -> str:
    """Rows of all workloads as a table."""
    lines = ["| | " + " | ".join(by_workload) + " |"]
    lines.append("|---" * (1 + len(by_workload)) + "|")
    for rows in zip(*by_workload.values(), strict=True):
        cells = [name(rows[0]), *map(cell, rows)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def medians(row: dict[str, Any]) -> str:
    """Speedup (the paper's), share of the oracle, tail."""
    speedup, of_oracle, tail = (
        row[key]["median"] for key in ("speedup", "of_oracle", "tail")
    )
    paper = f" ({row['paper']:.2f})" if row["paper"] else ""
    return f"{speedup:.2f}{paper}, {of_oracle:.1%}, {tail:.2f}"


def mean(row: dict[str, Any]) -> str:
    """A ratio with its standard error."""
    error = row["standard_error"]
    return f"{row['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def draw_lengths(path: str, scale: float) -> None:
    """The workloads' lengths as a picture, like the paper's Figure 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(len(CLUSTERS)), CLUSTERS, strict=True):
        work = workloads.paper(name, scale=scale)
        columns = list(zip(*work.lengths[:80], strict=True))
        image = axes.imshow(columns, aspect="auto", cmap="viridis", vmin=0)
        axes.set_title(f"{name}: a column a group, a cell a response", fontsize=9)
        axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, label="tokens", pad=0.01)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=sorted(CLUSTERS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of groups, instances")
    parser.add_argument("--smoke", action="store_true", help="seconds")
    parser.add_argument("--runs", metavar="FILE", help="keep rollouts there; go on")
    parser.add_argument("--lengths", metavar="PNG", help="only draw the lengths")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    if args.lengths:
        draw_lengths(args.lengths, args.scale)
        return
    if args.smoke:
        args.workload, args.scale, args.seeds = "qwen2-vl-72b", 1 / 16, 1
    names = [args.workload] if args.workload else sorted(CLUSTERS)
    runs = Runs(args.runs)
    rollouts = {name: rollouts_of(name, args, runs) for name in names}
    figures: dict[str, Any] = {
        "workloads": {name: summary(name, rollouts[name]) for name in names},
        "ratios": {name: ratios(rollouts[name]) for name in names},
    }
    print(markdown(figures["workloads"], lambda row: row["arm"], medians))
    print(
        markdown(figures["ratios"], lambda row: f"{row['arm']} / {row['over']}", mean)
    )
    figures["simulated_at_commits"] = sorted(map(str, runs.commits))
    kept = ("workload", "first_seed", "seeds", "scale")
    settings = {k: v for k, v in vars(args).items() if k in kept}
    line = result_line("simulate", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
