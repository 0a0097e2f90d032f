"""`aseer simulate`: what a rollout would take on a cluster, by policy, without one.

The same scheduler that runs real rollouts is run on simulated engines, arm by arm: how
trainers do it today, then what aseer adds step by step, then an oracle that knows the
lengths.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from aseer import plot
from aseer.cli.arguments import positive_float, positive_int
from aseer.config import check_policy
from aseer.errors import ConfigError
from aseer.policies import POLICIES
from aseer.sim import GPUS, MODELS, Cluster, ModelShape, Roofline, simulate
from aseer.sim import workload as workloads
from aseer.sim.fit import LinearSteps, Measured, read_report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from aseer.config import PolicyName
    from aseer.report import RolloutReport
    from aseer.sim import Workload
    from aseer.sim.cluster import DraftingName

_DEFAULT_CHUNK_SIZE = 2048
_DEFAULT_INSTANCES = 8


class Arm(NamedTuple):
    """One way to roll out."""

    name: str
    policy: PolicyName
    drafting: DraftingName = "off"


ARMS = (
    Arm("groups in turn", "group-round-robin"),
    Arm("least loaded (today)", "least-loaded"),
    Arm("divided", "fcfs"),
    Arm("+ context-aware", "context-aware"),
    Arm("+ grouped drafts", "context-aware", "grouped"),
    Arm("oracle", "longest-first"),
    Arm("oracle + drafts", "longest-first", "grouped"),
)


DRAFTS_NOTE = (
    "Drafts are accepted as in the Seer paper, and verifying them costs their FLOPs "
    "and nothing else: read what they gain as a bound."
)


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `simulate` and its options."""
    parser = subparsers.add_parser(
        "simulate",
        parents=[common],
        help="what would be gained on a cluster: model, GPUs and lengths are given",
        description="Simulate a rollout by every policy, on the scheduler that runs "
        "real ones, and compare. Example: aseer simulate --model qwen3-32b --gpu H100 "
        "--gpus-per-instance 2 --instances 8 --groups 256 --mean 8000",
    )
    parser.set_defaults(run=run)
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--model", choices=sorted(MODELS), default="qwen3-8b", help="default: qwen3-8b"
    )
    cluster.add_argument(
        "--model-shape",
        metavar="JSON",
        help="a model that is not in the list: its `ModelShape`, for example "
        '\'{"name": "mine", "weight_bytes": 14e9, "active_params": 7e9, '
        '"kv_bytes_per_token": 131072}\'',
    )
    cluster.add_argument(
        "--gpu", choices=sorted(GPUS), default="H100", help="default: H100"
    )
    _add(cluster, "--gpus-per-instance", 1, "GPUs an engine has")
    cluster.add_argument(
        "--instances",
        type=positive_int,
        metavar="N",
        help=f"engines (default: {_DEFAULT_INSTANCES}, or the report's)",
    )
    _add(cluster, "--max-num-seqs", 256, "requests an engine runs at once")
    cluster.add_argument(
        "--memory-share",
        type=positive_float,
        default=0.9,
        metavar="X",
        help="of a GPU's memory that the engine may use (default: 0.9)",
    )
    cluster.add_argument(
        "--pool-gb-per-s",
        type=positive_float,
        metavar="X",
        help="an engine reads KV from a pool at that rate (default: no pool, requests "
        "that move are computed anew)",
    )
    cluster.add_argument(
        "--fit",
        type=Path,
        metavar="REPORT",
        help="a rollout's report.json: engines at the pace of its own, instead of "
        "--model and --gpu, and its lengths unless others are given",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--paper",
        choices=sorted(workloads.PAPER),
        help="a workload of the Seer paper, instead of the rest",
    )
    work.add_argument(
        "--workload", type=Path, metavar="FILE", help="lengths of your own, as JSON"
    )
    _add(work, "--groups", 256, "prompts")
    _add(work, "--n", 8, "responses a prompt")
    _add(work, "--mean", 4000, "mean tokens of a response")
    _add(work, "--max-tokens", 32_768, "that a response may have")
    work.add_argument(
        "--seed", type=int, default=0, help="of the drawn lengths (default: 0)"
    )
    work.add_argument(
        "--chunk-size",
        default=str(_DEFAULT_CHUNK_SIZE),
        metavar="N,...",
        help="tokens; several are compared with each other (default: 2048)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--plot", type=Path, metavar="FILE", help="completions, a PNG")
    output.add_argument("--json", action="store_true", help="print only JSON")


def _add(group: argparse._ArgumentGroup, name: str, default: int, what: str) -> None:
    group.add_argument(
        name,
        type=positive_int,
        default=default,
        metavar="N",
        help=f"{what} (default: {default})",
    )


class Result(NamedTuple):
    """One arm's rollout."""

    arm: Arm
    chunk_size: int
    report: RolloutReport
    took_s: float


def run(args: argparse.Namespace) -> int:
    """Run every arm and return the exit code.

    Raises:
        ConfigError: an option does not fit the others.
    """
    console = Console(quiet=args.json, highlight=False)
    measured = None
    if args.fit is not None:
        measured = read_report(args.fit, max_num_seqs=args.max_num_seqs)
    work, cluster = make_workload(args, measured), make_cluster(args, measured)
    sizes = parse_sizes(args.chunk_size)
    arms = [(arm, sizes[0]) for arm in ARMS] + [(ARMS[4], n) for n in sizes[1:]]
    console.print(describe(work, cluster), markup=False)
    if measured is not None:
        console.print(check(measured), markup=False)
    results = []
    with Progress(console=console, transient=True) as bar:
        for arm, chunk_size in arms:
            task = bar.add_task(arm.name, total=work.num_requests)

            def advance(finished: int, total: int, task: TaskID = task) -> None:
                bar.update(task, completed=finished, total=total)

            started = time.monotonic()
            report = simulate(
                work,
                cluster,
                policy=arm.policy,
                chunk_size=chunk_size,
                drafting=arm.drafting,
                progress=advance,
            )
            took_s = time.monotonic() - started
            results.append(Result(arm, chunk_size, report, took_s))
            bar.remove_task(task)
    if args.json:
        print(json.dumps({"workload": work.name, "arms": make_rows(results)}))
    console.print(make_table(results))
    console.print(DRAFTS_NOTE, style="dim")
    if args.plot is not None:
        curves = [(f"{r.arm.name} ({r.chunk_size})", r.report) for r in results]
        plot.completions(curves, args.plot)
        console.print(f"wrote {args.plot}", markup=False, soft_wrap=True)
    return 0


def check(measured: Measured) -> str:
    """How near the simulation comes to the rollout that it was fitted to."""
    if measured.speculated:
        return "That rollout drafted, and simulated drafts are the Seer paper's."
    report = measured.report
    again = simulate(
        measured.workload,
        measured.cluster,
        policy=check_policy(report["policy"]),
        chunk_size=report["chunk_size"],
    )
    return f"That rollout took {report['wall_s']:,.1f} s; simulated {again.wall_s:,.1f}"


def make_workload(
    args: argparse.Namespace, measured: Measured | None = None
) -> Workload:
    """The rollout that the options describe."""
    if args.paper is not None:
        return workloads.paper(args.paper, seed=args.seed)
    if args.workload is not None:
        return workloads.load(args.workload)
    if measured is not None:
        return measured.workload
    return workloads.lognormal(
        name="drawn",
        num_groups=args.groups,
        group_size=args.n,
        mean=args.mean,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )


def make_cluster(args: argparse.Namespace, measured: Measured | None = None) -> Cluster:
    """The instances that the options describe."""
    if measured is not None:
        fitted = measured.cluster
        return replace(fitted, num_instances=args.instances or fitted.num_instances)
    shape = Roofline(
        model=make_model(args), gpu=GPUS[args.gpu], num_gpus=args.gpus_per_instance
    )
    num_kv_tokens = shape.kv_tokens(memory_share=args.memory_share)
    if not num_kv_tokens:
        raise ConfigError(
            f"{shape.model.name} does not fit on {shape.num_gpus} {shape.gpu.name}; "
            "give --gpus-per-instance a greater number"
        )
    bandwidth = args.pool_gb_per_s
    return Cluster(
        num_instances=args.instances or _DEFAULT_INSTANCES,
        step_time=shape,
        num_kv_tokens=num_kv_tokens,
        max_num_seqs=args.max_num_seqs,
        kv_bytes_per_token=shape.model.kv_bytes_per_token,
        load_bytes_per_s=None if bandwidth is None else bandwidth * 1e9,
    )


def make_model(args: argparse.Namespace) -> ModelShape:
    """The model that is named or described."""
    if args.model_shape is None:
        return MODELS[args.model]
    try:
        return ModelShape(**json.loads(args.model_shape))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"--model-shape is not a ModelShape ({error}); give JSON such as "
            f"{json.dumps(asdict(MODELS['qwen3-8b']))}"
        ) from error


def parse_sizes(text: str) -> list[int]:
    """Chunk sizes, of which the first is every arm's."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ConfigError(f"--chunk-size={text!r} is not allowed; give numbers >= 1")
    return sizes


def describe(work: Workload, cluster: Cluster) -> str:
    """What is simulated, in a line or two."""
    longest = max(n for members in work.lengths for n in members)
    share = min(1.0, cluster.num_kv_tokens * cluster.num_instances / work.num_tokens)
    engines = f"{cluster.num_instances} instances {describe_steps(cluster)}"
    return (
        f"{work.name}: {work.num_requests:,} responses, {work.num_tokens:,} tokens, "
        f"mean {work.num_tokens / work.num_requests:,.0f}, longest {longest:,}\n"
        f"{engines}, each with {cluster.num_kv_tokens:,} tokens of KV: {share:.0%} of "
        "the rollout fits at once"
    )


def describe_steps(cluster: Cluster) -> str:
    """Where the step times are from."""
    steps = cluster.step_time
    if isinstance(steps, Roofline):
        return f"of {steps.model.name} on {steps.num_gpus} x {steps.gpu.name}"
    assert isinstance(steps, LinearSteps)
    return (
        f"whose steps take {1e3 * steps.base_s:.3g} ms, {1e3 * steps.token_s:.3g} ms a "
        f"token, and {1e9 * steps.kv_token_s:.3g} ns a token of KV"
    )


def make_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """An object an arm; speedups are over the first."""
    base = results[0].report.wall_s
    return [
        {
            "arm": arm.name,
            "policy": arm.policy,
            "drafting": arm.drafting,
            "chunk_size": chunk_size if POLICIES[arm.policy].divided else 0,
            "wall_s": report.wall_s,
            "speedup": base / report.wall_s,
            "throughput_tok_s": report.throughput_tok_s,
            "tail_s": report.tail_s,
            "idle_fraction": report.idle_fraction,
            "num_preemptions": report.num_preemptions,
            "num_migrations": report.num_migrations,
            "num_recomputed_tokens": report.num_recomputed_tokens,
            "simulated_in_s": took_s,
        }
        for arm, chunk_size, report, took_s in results
    ]


def make_table(results: Sequence[Result]) -> Table:
    """The same for people."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("chunk", "time", "speedup", "tail", "idle", "preempted", "moved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in make_rows(results):
        table.add_row(
            row["arm"],
            str(row["chunk_size"] or "-"),
            f"{row['wall_s']:,.0f} s",
            f"{row['speedup']:.2f}",
            f"{row['tail_s']:,.0f} s",
            f"{row['idle_fraction']:.0%}",
            f"{row['num_preemptions']:,}",
            f"{row['num_migrations']:,}",
        )
    return table
