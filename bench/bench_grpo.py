"""Does training on aseer's rollouts learn what it learns on plain vLLM's, and how fast?

Runs `examples/grpo/train.py` for every seed on every sampler, a seed's from one warm
start made with that seed, and compares their metrics: `vllm` is plain vLLM, `aseer` the
library as it comes, `aseer+dgds` with drafts from siblings; the two called `divided`
have chunks of 64 tokens and a KV pool, which responses of this length do not need, but
which must not change what is learnt either. Runs are kept in a directory, and go on
there after an interruption.

Reported for each sampler: the reward on held-out problems before and after, by seed;
the rollout's share of an iteration; tokens per second of rollouts, and of the trainer's
steps, which tell how fast the machine was meanwhile; tokens per second, reward, and
acceptance length by thirds of the training. Rewards after training are means over the
last evaluations, and compared over seeds with their standard error.

Expected: rewards differ by no more than seeds do, since all sample from the same
distribution. The rollout's share is about a half, and hardly differs: responses of this
task are short, and all of a rollout run at once on engines that compute-bound steps
fill, so there is little for scheduling to gain, and division can only cost.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, print_result, quantiles, result_line

ARMS = {
    "vllm": ["--engine", "vllm"],
    "aseer": [],
    "aseer+dgds": ["--speculation", "dgds"],
    "divided": ["--chunk-size", "64"],
    "divided+dgds": ["--chunk-size", "64", "--speculation", "dgds"],
}
DEFAULT_ARMS = ["vllm", "aseer", "aseer+dgds"]
LAST = 3  # evaluations that make the reward after training
Rows = list[dict[str, float]]


def train(
    folder: Path, warm: Path, seed: int, arm: str, options: list[str], deadline_s: float
) -> None:
    """Run the example to its end, or go on with it; what it prints goes to a file."""
    script = ROOT / "examples" / "grpo" / "train.py"
    words = ["--seed", str(seed), "--warm", str(warm), "--out", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("a") as log:
        subprocess.run(
            [sys.executable, str(script), *words, *ARMS[arm], *options],
            stdout=log,
            stderr=log,
            check=True,
            timeout=deadline_s,
        )


def rows_of(folder: Path) -> Rows:
    """A run's metrics by iteration, the empty ones left out."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def held_out(rows: Rows) -> list[float]:
    return [row["eval"] for row in rows if "eval" in row]


def thirds(rows: Rows, name: str) -> list[float]:
    """Medians of a metric over the training's three thirds."""
    values = [row[name] for row in rows if name in row]
    size = math.ceil(len(values) / 3)
    parts = [values[k : k + size] for k in range(0, len(values), size)]
    return [round(statistics.median(part), 4) for part in parts]


def share_of_rollout(row: dict[str, float]) -> float:
    return row["rollout_s"] / (row["rollout_s"] + row["train_s"] + row["update_s"])


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean and its standard error (0 for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
    return {
        "mean": round(statistics.mean(values), 4),
        "standard_error": round(error, 4),
    }


def figures_of(runs: dict[str, list[Rows]]) -> dict[str, Any]:
    """What is compared.

    Args:
        runs: each sampler's runs, in the order of the seeds.
    """
    figures: dict[str, Any] = {}
    after: dict[str, list[float]] = {}
    for arm, seeds in runs.items():
        curves = [held_out(rows) for rows in seeds]
        after[arm] = [statistics.mean(curve[-LAST:]) for curve in curves]
        steps = [row for rows in seeds for row in rows if "rollout_s" in row]
        figures[arm] = {
            "held_out_before": [round(curve[0], 4) for curve in curves],
            "held_out_after": [round(reward, 4) for reward in after[arm]],
            "held_out_curve": [[round(r, 4) for r in curve] for curve in curves],
            "gain": mean_and_error(
                [b - c[0] for b, c in zip(after[arm], curves, strict=True)]
            ),
            "training_reward": [thirds(rows, "reward") for rows in seeds],
            "mean_length": [thirds(rows, "mean_length") for rows in seeds],
            "rollout_share": quantiles([share_of_rollout(row) for row in steps]),
            "iteration_s": quantiles(
                [r["rollout_s"] + r["train_s"] + r["update_s"] for r in steps]
            ),
            "rollout_tokens_per_s": quantiles([r["tokens_per_s"] for r in steps]),
            "trainer_tokens_per_s": quantiles(
                [r["num_tokens"] / r["train_s"] for r in steps]
            ),
            "tokens_per_s": [thirds(rows, "tokens_per_s") for rows in seeds],
            "acceptance_length": [thirds(rows, "acceptance_length") for rows in seeds],
            "logprob_off_mean": max(r.get("logprob_off_mean", 0.0) for r in steps),
        }
    first = next(iter(runs))
    for arm in list(runs)[1:]:
        apart = [a - b for a, b in zip(after[arm], after[first], strict=True)]
        figures[f"{arm} minus {first}"] = mean_and_error(apart)
    return figures


def plot(runs: dict[str, list[Rows]], path: Path) -> None:
    """Held-out reward over training: seeds thin, the mean of each sampler thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (arm, seeds) in enumerate(runs.items()):
        color = f"C{number}"
        at = [row["iteration"] for row in seeds[0] if "eval" in row]
        curves = [held_out(rows) for rows in seeds]
        for curve in curves:
            axes.plot(at, curve, color=color, alpha=0.3, linewidth=1)
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(at, mean, color=color, linewidth=2, label=arm)
    axes.set(
        xlabel="iteration",
        ylabel="mean reward on held-out problems",
        ylim=(0, 1),
        title=f"GRPO on Countdown, {len(seeds)} seeds each",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def run(
    kept: Path, args: argparse.Namespace, options: list[str]
) -> dict[str, list[Rows]]:
    """Every training that is not kept yet; the metrics of all."""
    runs: dict[str, list[Rows]] = {arm: [] for arm in args.arms}
    for seed in range(args.seeds):
        for arm in args.arms:
            folder = kept / f"{arm}-{seed}"
            if not (folder / "policy").exists():
                print(f"seed {seed}, {arm}: see {folder / 'train.log'}", flush=True)
                warm = kept / f"warm-{seed}"
                train(folder, warm, seed, arm, options, args.deadline)
            runs[arm].append(rows_of(folder))
            print(f"seed {seed}, {arm}: {held_out(runs[arm][-1])}", flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, default=ROOT / "runs" / "bench-grpo", help="kept here")
    add("--seeds", type=int, default=3)
    add("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS)
    add("--iterations", type=int, help="default: the example's")
    add("--deadline", type=float, default=3600.0, help="seconds for one training")
    add("--smoke", action="store_true", help="a hardly trained model, two iterations")
    add("--plot", type=Path, help="file for a picture of the curves")
    add("--save", help="file for the result")
    args = parser.parse_args()
    options = ["--iterations", str(args.iterations)] if args.iterations else []
    if args.smoke:
        args.seeds = 1
        options = ["--warm-steps", "8", "--hidden-size", "128", "--iterations", "2"]
        options += ["--groups", "4", "--group-size", "4", "--eval-problems", "8"]
        options += ["--eval-every", "1"]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) if args.smoke else args.runs
        runs = run(kept, args, options)
    if args.plot:
        plot(runs, args.plot)
    settings = {
        "seeds": args.seeds,
        "arms": args.arms,
        "iterations": len(runs[args.arms[0]][0]) - 1,
        "smoke": args.smoke,
    }
    line = result_line("grpo", settings=settings, figures=figures_of(runs))
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
