"""The Seer paper's ablation, on simulated clusters of its size, beside its figures.

For each workload of its Table 3: groups in turn on undivided engines (its veRL),
divided rollout, context-aware scheduling, grouped drafts, and an oracle that knows the
lengths. Speedups and tail times are relative to the first.

Expected: the order of the paper's arms, and its pathologies in the first (idle engines,
thousands of preemptions, a long tail) where KV is short. Not its seconds: the roofline
knows nothing of what its engines lost to communication and framework. Drafts gain more
than the paper's: in the simulator verifying a token costs its FLOPs and nothing else.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from common import print_result, quantiles, result_line

from aseer.cli.simulate import ARMS
from aseer.sim import GPUS, MODELS, Cluster, Roofline, simulate
from aseer.sim import workload as workloads

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
LOAD_BYTES_PER_S = 50e9  # one of a node's 400 Gb/s links


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


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row an arm."""
    cluster = make_cluster(name, args.scale)
    figures: dict[str, list[tuple[float, float, float, int, float]]] = {}
    for seed in range(args.seeds):
        work = workloads.paper(name, seed=seed, scale=args.scale)
        base = None
        for arm in ARMS:
            started = time.perf_counter()
            report = simulate(
                work,
                cluster,
                policy=arm.policy,
                chunk_size=args.chunk_size,
                drafting=arm.drafting,
            )
            took_s = time.perf_counter() - started
            base = base or report
            figures.setdefault(arm.name, []).append(
                (
                    base.wall_s / report.wall_s,
                    report.tail_s / base.tail_s,
                    report.idle_fraction,
                    report.num_preemptions,
                    took_s,
                )
            )
    rows = []
    for arm_name, values in figures.items():
        speedup, tail, idle, preempted, took = zip(*values, strict=True)
        rows.append(
            {
                "arm": arm_name,
                "speedup": quantiles(speedup),
                "paper": PAPER[name].get(arm_name),
                "tail": quantiles(tail),
                "idle": quantiles(idle),
                "preemptions": quantiles(preempted, 0),
                "simulated_in_s": quantiles(took, 1),
            }
        )
        row = rows[-1]
        print(
            f"{name:14s} {arm_name:22s} speedup {row['speedup']['median']:.2f} "
            f"(paper {row['paper'] or '-'}), tail {row['tail']['median']:.2f}, "
            f"idle {row['idle']['median']:.2f}, "
            f"preemptions {row['preemptions']['median']:.0f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=sorted(CLUSTERS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of groups, instances")
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--smoke", action="store_true", help="seconds")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    if args.smoke:
        args.workload, args.scale, args.seeds = "qwen2-vl-72b", 1 / 16, 1
    names = [args.workload] if args.workload else sorted(CLUSTERS)
    figures = {"workloads": {name: measure(name, args) for name in names}}
    settings = {k: v for k, v in vars(args).items() if k != "save"}
    line = result_line("simulate", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
