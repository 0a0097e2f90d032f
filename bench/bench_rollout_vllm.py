"""Which way of rolling out is the fastest, where every way does the same work?

A recorded rollout (`aseer record`) is replayed on real engines by each arm: how
trainers place requests today, with and without vLLM's own suffix drafts, then what
aseer adds step by step, then an oracle that knows the lengths, and last the way that
gives up being on-policy: partial rollout, which ends with half of the groups and
carries the others' texts over to the next weights. Whatever the model samples, a
request emits its recorded tokens (`aseer.instance.vllm.replay`), and stops where it
stopped; every token that comes back is checked. Arms do not know the lengths, except
those that say so.

Arms with the same drafts share engines, of which all are up at once; those of other
arms idle meanwhile (or, with `--restart`, are started when their turn comes). Arms that
divide requests have engines with a KV pool, as aseer has by default where LMCache is
installed: without one, what waits is computed again. Repetitions are interleaved, in an
order that turns, and each arm is compared with verl's way in the same repetition. In
every repetition prompts come in another order, as a trainer's would: where the few long
responses begin is luck. No run finds KV, drafts or suffixes of an earlier one. By
default engines have KV for a third of what the requests that they may run at once would
need; `--kv plentiful` has enough for all. At the end the arms without drafts are
simulated at the measured pace, to see how far simulations can be believed, and each is
compared with the least time that any order could have taken (`least_over_measured`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common import print_result, quantiles, result_line
from engines import Engines, kind_of, sizes_of
from replaying import (
    ARMS,
    Arm,
    Run,
    check,
    emit,
    find_trace,
    fit,
    forget,
    make_model,
    sampling_of,
)
from rollout_page import write_page
from simulating import (
    fit_clusters,
    is_simulated,
    least_wall,
    measure_prefill,
    simulated_wall,
)

import aseer
from aseer.cli import record
from aseer.data import trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines import Sizes

    from aseer.data.trace import Trace
    from aseer.report import RolloutReport

BASE = "verl-today"
QUICK = {"groups": 10, "max_tokens": 512, "repetitions": 2, "minutes": 16.0}
SMOKE_ARMS = ("verl-today", "context-aware", "full", "partial")


def groups_of(
    recorded: Trace, arm: Arm, repetition: int, args: argparse.Namespace
) -> list[aseer.Group]:
    """The trace's groups, named by their places in it, as an arm is given them."""
    sampling = sampling_of(recorded, args.temperature, args.end_token)
    groups = []
    for place, group in arm.order(recorded, repetition):
        lengths = [len(response) for response in group.responses]
        groups.append(
            aseer.Group(
                group.prompt.tolist(),
                n=len(lengths),
                group_id=str(place),
                sampling=sampling,
                known_lengths=lengths if arm.knows_lengths else None,
            )
        )
    return groups


def replay(
    engine: aseer.Engine,
    arm: Arm,
    recorded: Trace,
    repetition: int,
    args: argparse.Namespace,
) -> RolloutReport:
    """One rollout, of which every token is checked."""
    forget(engine)
    groups = groups_of(recorded, arm, repetition, args)
    rollout = engine.rollout_sync(groups, policy=arm.policy, chunk_size=args.chunk_size)
    missing = {str(g.group_id): g.n for g in groups}
    num_spare = int((1 - arm.wanted) * len(groups))
    for response in rollout:
        if response.finish_reason == "aborted" and not num_spare:
            raise RuntimeError(f"{arm.name}: {response.request_id} was aborted")
        check(response, recorded)
        missing[response.group_id] -= 1
        unfinished = [group_id for group_id, count in missing.items() if count]
        if len(unfinished) == num_spare:
            for group_id in unfinished:
                rollout.cancel(group_id)
    if any(missing.values()):
        raise RuntimeError(f"{arm.name}: responses are missing, by group: {missing}")
    return rollout.report


def figures_of(report: RolloutReport) -> dict[str, float]:
    """What is compared of a run."""
    drafts = report.speculation
    num_tokens = report.num_output_tokens
    return {
        "throughput_tok_s": report.throughput_tok_s,
        "wall_s": report.wall_s,
        "tail_s": report.tail_s,
        "idle_fraction": report.idle_fraction,
        "preemptions": report.num_preemptions,
        "recomputed_tokens": report.num_recomputed_tokens,
        "migrations": report.num_migrations,
        "chunks": report.num_chunks,
        "acceptance_length": drafts.acceptance_length if drafts else 1.0,
        "drafted_per_token": sum(drafts.drafted) / num_tokens if drafts else 0.0,
        "drafting_share": drafts.drafting_share if drafts else 0.0,
        "mean_finished_tokens": statistics.mean(
            c.num_output_tokens
            for c in report.completions
            if c.finish_reason != "aborted"
        ),
    }


def run(
    arms: Sequence[Arm], model: Path, recorded: Trace, args: argparse.Namespace
) -> tuple[list[Run], Sizes]:
    """All repetitions that there is time for."""
    began = time.monotonic()
    sizes = sizes_of(recorded, args)
    print(f"{args.engines} engines, each with {sizes}", flush=True)
    runs: list[Run] = []
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "trace.json"
        trace.save(recorded, file)
        emit(file)
        engines = stack.enter_context(Engines(model, sizes, args))
        kinds = list(dict.fromkeys(kind_of(arm, args) for arm in arms))
        for kind in kinds if not args.restart else ():
            engines.of(kind)
        args.prefill_token_s = measure_prefill(
            engines.of(kinds[0]), sizes.max_model_len
        )
        for repetition in range(args.repetitions):
            since = time.monotonic()
            shift = repetition * len(arms) // args.repetitions
            order = [*arms[shift:], *arms[:shift]]
            if args.restart:
                if repetition:
                    engines.close()
                order.sort(key=lambda arm: kinds.index(kind_of(arm, args)))
                kinds = [*kinds[1:], kinds[0]]
            for arm in order:
                engine = engines.of(kind_of(arm, args))
                report = replay(engine, arm, recorded, repetition, args)
                runs.append(Run(repetition, arm.name, figures_of(report), report))
                if args.reports is not None:
                    args.reports.mkdir(parents=True, exist_ok=True)
                    path = args.reports / f"{arm.name}-{repetition}.json"
                    path.write_text(json.dumps(report.to_dict()))
                print(repetition, arm.name, runs[-1].figures, flush=True)
            now = time.monotonic()
            next_end_s = now - began + (now - since)
            if args.minutes is not None and next_end_s > 60 * args.minutes:
                print(f"no time for more than {repetition + 1} repetitions")
                break
    return runs, sizes


def summaries(arms: Sequence[Arm], runs: Sequence[Run]) -> dict[str, Any]:
    """Each arm's figures, and its throughput over verl's in the same repetition."""
    rates = {(r.repetition, r.arm): r.figures["throughput_tok_s"] for r in runs}
    tails = {(r.repetition, r.arm): r.figures["tail_s"] for r in runs}
    base = BASE if any(arm.name == BASE for arm in arms) else arms[0].name
    summary = {}
    for arm in arms:
        own = [r for r in runs if r.arm == arm.name]
        pairs = [((r.repetition, r.arm), (r.repetition, base)) for r in own]
        summary[arm.name] = {
            "what": arm.label,
            "policy": arm.policy,
            "drafting": arm.drafting,
            "over_base": quantiles([rates[a] / rates[b] for a, b in pairs]),
            "tail_over_base": quantiles(
                [tails[a] / max(tails[b], 1e-9) for a, b in pairs]
            ),
            **{
                name: quantiles([r.figures[name] for r in own])
                for name in own[0].figures
            },
        }
    return summary


# The command


def chosen_arms(args: argparse.Namespace) -> list[Arm]:
    """The arms that are wanted and can be had."""
    arms = [arm for arm in ARMS if arm.name in args.arms]
    if importlib.util.find_spec("arctic_inference") is None:
        left_out = [arm.name for arm in arms if arm.drafting == "suffix"]
        if left_out:
            print(f"LEFT OUT, since arctic-inference is not installed: {left_out}")
        arms = [arm for arm in arms if arm.drafting != "suffix"]
    if not arms:
        raise SystemExit("no arm is left")
    return arms


def parse() -> argparse.Namespace:
    """The options, with what the kind of run stands for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--smoke", action="store_true", help="tiny model, few arms")
    kind.add_argument(
        "--quick", action="store_true", help="some groups, cut short; 20 minutes"
    )
    kind.add_argument("--full", action="store_true", help="the whole trace, for hours")
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--trace", type=Path, help="a recorded rollout")
    parser.add_argument("--groups", type=int, help="replay the first so many")
    parser.add_argument("--max-tokens", type=int, help="cut responses off there")
    parser.add_argument(
        "--model",
        default="smollm2",
        help="smollm2, small (random, its shape, 4096 tokens), qwen3-8b (dummy weights "
        "in its shape), tiny, or a directory",
    )
    parser.add_argument("--layers", type=int, help="of small or qwen3-8b")
    parser.add_argument(
        "--engine-args", default="{}", metavar="JSON", help="further ones of vLLM's"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="one kind of engines at a time, started anew in every repetition: where "
        "there is no memory for all",
    )
    parser.add_argument("--load-format", default="auto", help="such as dummy")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--kv", choices=("limited", "plentiful"), default="limited")
    parser.add_argument("--kv-share", type=float, default=1 / 3, help="if limited")
    parser.add_argument(
        "--kv-pool",
        choices=("off", "auto", "lmcache"),
        default="auto",
        help="for divided arms",
    )
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--temperature", type=float, help="default: the trace's")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--minutes", type=float, help="begin no repetition beyond")
    parser.add_argument("--save", type=Path, help="file for the result")
    parser.add_argument("--reports", type=Path, help="folder for every run's report")
    parser.add_argument("--page", type=Path, help="file for the HTML page")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.arms = "tiny", SMOKE_ARMS
        args.engines, args.max_num_seqs, args.chunk_size = 1, 4, 32
    elif args.page is None:
        args.page = Path("runs") / "rollout_vllm.html"
    for name, value in QUICK.items() if args.quick else ():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.engines == 1 and args.kv_pool == "auto":
        args.kv_pool = "off"  # which "auto" means for one engine; arms share it then
    if args.repetitions is None:
        args.repetitions = 1 if args.smoke else 3
    return args


def main() -> None:
    """Parse, measure, print."""
    args = parse()
    arms = chosen_arms(args)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(args, Path(folder))
        original = find_trace(args).part(args.groups, args.max_tokens)
        recorded, args.end_token = fit(original, model)
        print(record.describe(original), flush=True)
        if args.temperature is None:
            args.temperature = recorded.settings.get("temperature", 1.0)
        runs, sizes = run(arms, model, recorded, args)
    settings: dict[str, Any] = {
        name: value
        for name, value in vars(args).items()
        if name not in ("save", "page", "reports")
    }
    settings |= {
        "model": Path(args.model).name,
        "trace": dict(original.settings),
        "trace_sha256": original.sha256,
        "num_requests": recorded.num_requests,
        "num_tokens": recorded.num_tokens,
        "repetitions": len({r.repetition for r in runs}),
        **sizes._asdict(),
    }
    clusters = fit_clusters(
        arms,
        runs,
        max_num_seqs=args.max_num_seqs,
        prefill_token_s=args.prefill_token_s,
    )
    figures: dict[str, Any] = {
        "arms": summaries(arms, runs),
        "fitted_steps": {
            "with pool" if pool else "without": asdict(cast("Any", cluster.step_time))
            for pool, cluster in clusters.items()
        },
    }
    for arm in arms:
        cluster = clusters.get(arm.pool)
        if cluster is None or arm.wanted != 1:
            continue
        own = [run for run in runs if run.arm == arm.name]
        compared = {
            "least_over_measured": [
                least_wall(run.report, cluster, recorded) / run.report.wall_s
                for run in own
            ]
        }
        if is_simulated(arm):
            compared["simulated_over_measured"] = [
                simulated_wall(arm, run.repetition, cluster, recorded, args.chunk_size)
                / run.report.wall_s
                for run in own
            ]
        figures["arms"][arm.name] |= {k: quantiles(v) for k, v in compared.items()}
    line = result_line("rollout_vllm", settings=settings, figures=figures)
    if args.page is not None:
        write_page(args.page, arms, runs, json.loads(line))
        print(f"wrote {args.page}")
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
