"""What does drafting from the group gain, by the number of requests an engine runs?

A recorded rollout (`aseer record`) is replayed: whatever the model samples, a request
emits its recorded tokens, so that every arm does the same work; every token is checked.
For each batch size one pair of one-core engines an arm, all up at once, that run so
many requests at a time; an arm's engines idle while another's work. A rollout has
`--rounds` times as many requests, or `--requests` whatever the batch size, so that
places that become free are taken again: else the slowest request would be all that
counts. They come from the recorded groups with the longest responses, cut off at
`--max-tokens`, in groups of at most 8. Arms take turns within a repetition, and each is
compared with the first in the same repetition. The arm `control` does what the first
does, with engines of its own: it tells how much two such engines differ by chance. Part
of that stays with them for life, and so `--starts` begins all engines anew.

Beside the gain stands what drafts of the same acceptance would gain if making them cost
nothing and a step took what undrafted steps of as many tokens take, interpolated
between batch sizes: `at_cost` is the ceiling of these drafts on an engine that stays
full. Where long responses end alone (many `--requests`, a large `--max-tokens`), steps
are smaller than that and drafts gain more.

Expected: over 1.5 with up to 4 requests an engine on a model whose step is mostly its
weights, never below 0.99, and nothing with SmolLM2 at 16 and more, where a core spends
on sampling from 49k tokens what a draft would save. Drafting takes under 1% of a step.

On a GPU (untried) the arms are on the model runner that vLLM chooses, or on the named:

    bench_speculation.py --device cuda --model DIR --arms v2-off v2-dgds v1-off v1-dgds
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from common import print_result, quantiles, result_line
from replaying import check, emit, find_trace, fit, forget, make_model, sampling_of

import aseer
from aseer.data import trace
from aseer.data.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

METHODS = ("off", "dgds", "suffix", "ngram")
RUNNERS = {"v1": "0", "v2": "1"}  # of an arm's name, before a hyphen
CONTROL = "control"  # an arm: like the first; what it "gains" is chance
MAX_SIBLINGS = 8  # of a group, in a rollout
Runs = dict[int, list[dict[str, float]]]  # of an arm, by batch size


def config_of(
    model: Path, arm: str, batch: int, recorded: Trace, args: argparse.Namespace
) -> aseer.EngineConfig:
    """Engines of one arm: a method's name, or a budget of our own method's."""
    runner, _, method = arm.rpartition("-")
    method = "off" if method == CONTROL else method
    speculation: Any = (
        method
        if method in METHODS
        else aseer.SpeculationConfig(budget=cast("Any", method))
    )
    longest = max(len(group.prompt) for group in recorded.groups)
    return aseer.EngineConfig(
        model=str(model),
        device=args.device,
        num_instances=args.engines,
        dtype=args.dtype,
        max_model_len=longest + recorded.max_tokens + 32,
        max_num_seqs=batch,
        kv_cache_bytes=args.kv_cache_bytes,
        chunk_size=args.chunk_size,
        kv_pool="off",
        speculation=speculation,
        env={"VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner]} if runner else {},
    )


def groups_of(
    recorded: Trace, num_requests: int, start: int, args: argparse.Namespace
) -> list[aseer.Group]:
    """Groups with so many requests in all, from place `start` on, in turn."""
    sampling = sampling_of(recorded, args.temperature, args.end_token)
    groups = []
    left, place = num_requests, start
    while left:
        group = recorded.groups[place % len(recorded.groups)]
        n = min(MAX_SIBLINGS, left, len(group.responses))
        name = str(place % len(recorded.groups))
        groups.append(
            aseer.Group(group.prompt.tolist(), n=n, group_id=name, sampling=sampling)
        )
        left -= n
        place += 1
    return groups


def measure(
    engine: aseer.Engine, groups: Sequence[aseer.Group], recorded: Trace
) -> dict[str, float]:
    """One rollout's figures."""
    forget(engine)
    rollout = engine.rollout_sync(groups)
    for response in rollout:
        check(response, recorded)
    report = rollout.report
    drafts, num_tokens = report.speculation, report.num_output_tokens
    num_steps = num_tokens - (sum(drafts.accepted) if drafts else 0)  # of requests
    return {
        "tokens_per_s": report.throughput_tok_s,
        "tokens_per_step": num_tokens / num_steps,
        "drafted_per_step": sum(drafts.drafted) / num_steps if drafts else 0.0,
        "acceptance_length": drafts.acceptance_length if drafts else 1.0,
        "drafting_share": drafts.drafting_share if drafts else 0.0,
        "worst_drafting_share": drafts.drafting_share_worst if drafts else 0.0,
    }


def summary(runs: Runs, base: Runs, num_engines: int) -> dict[str, Any]:
    """An arm's figures by batch size.

    Args:
        base: the first arm's runs, which did not draft.
    """
    # Seconds that an undrafted step of an engine takes, by its tokens.
    step_s = {
        batch: float(np.median([batch * num_engines / r["tokens_per_s"] for r in own]))
        for batch, own in base.items()
    }
    figures = {}
    for batch, own in runs.items():
        pairs = zip(own, base[batch], strict=True)
        gains = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
        at_cost = [
            r["tokens_per_step"]
            * step_s[batch]
            / price(step_s, batch * (1 + r["drafted_per_step"]))
            for r in own
        ]
        figures[str(batch)] = {
            "gain": quantiles(gains),
            "at_cost": quantiles(at_cost),
            **{name: quantiles([r[name] for r in own], 4) for name in own[0]},
        }
    return figures


def price(step_s: Mapping[int, float], num_tokens: float) -> float:
    """Seconds of a step of so many tokens: a line fitted to those without drafts."""
    if len(step_s) < 2:
        return next(iter(step_s.values()))
    sizes, seconds = list(step_s), list(step_s.values())
    if num_tokens <= max(sizes):
        return float(np.interp(num_tokens, sizes, seconds))
    slope, offset = np.polyfit(sizes, seconds, 1)
    return float(offset + slope * num_tokens)


def run(
    model: Path, recorded: Trace, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All arms and batch sizes."""
    results: dict[str, Runs] = {
        arm: {batch: [] for batch in args.batches} for arm in args.arms
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.save(recorded, file)
        emit(file)
        for batch in args.batches:
            for start in range(args.starts):
                run_batch(model, recorded, batch, start, results, args)
    base = results[args.arms[0]]
    return {arm: summary(runs, base, args.engines) for arm, runs in results.items()}


def run_batch(
    model: Path,
    recorded: Trace,
    batch: int,
    start: int,
    results: Mapping[str, Runs],
    args: argparse.Namespace,
) -> None:
    """All arms with engines that run `batch` requests at a time, begun anew."""
    rounds = batch * args.engines * args.rounds
    num_requests = args.requests or rounds
    with ExitStack() as stack:
        engines = {
            arm: stack.enter_context(
                aseer.Engine(config_of(model, arm, batch, recorded, args))
            )
            for arm in args.arms
        }
        for engine in engines.values():  # the first steps of a process are slow
            few = groups_of(recorded, min(rounds, num_requests), 0, args)
            measure(engine, few, recorded)
        for number in range(args.repetitions):
            repetition = start * args.repetitions + number
            first = repetition * args.stride
            groups = groups_of(recorded, num_requests, first, args)
            shift = repetition % len(args.arms)
            for arm in [*args.arms[shift:], *args.arms[:shift]]:
                figures = measure(engines[arm], groups, recorded)
                results[arm][batch].append(figures)
                print(batch, repetition, arm, figures, flush=True)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", nargs="+", default=["off", "dgds"], help="the first does not draft")
    add("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    add("--repetitions", type=int, default=5, help="of each start")
    add("--starts", type=int, default=1, help="of the engines")
    add("--rounds", type=int, default=4, help="requests for each place in a batch")
    add("--requests", type=int, help="of a rollout, instead of rounds")
    add("--trace", type=Path, help="a recorded rollout")
    add("--groups", type=int, default=16, help="the longest so many of them")
    add("--stride", type=int, default=3, help="groups that a repetition starts later")
    add("--max-tokens", type=int, default=256, help="cut responses off there")
    add("--model", default="smollm2", help="or small (random, its shape, 4096 tokens)")
    add("--layers", type=int, help="of small")
    add("--dtype", default="auto")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--temperature", type=float, help="default: the trace's")
    add("--engines", type=int, default=2)
    add("--kv-cache-bytes", type=int, default=1 << 30)
    add("--chunk-size", type=int, default=2048)
    add("--save", help="file for the result")
    add("--smoke", action="store_true", help="tiny model, one run")
    args = parser.parse_args()
    args.quick, args.load_format = False, "auto"
    if args.smoke:
        args.batches, args.repetitions, args.engines = [2], 1, 1
        args.model, args.groups = "tiny", None
    if args.arms[0].rpartition("-")[2] != "off":
        parser.error("the first arm is off: others are compared with it")
    if unknown := {a.rpartition("-")[0] for a in args.arms} - {"", *RUNNERS}:
        parser.error(f"arms begin with {', '.join(RUNNERS)} or nothing, not {unknown}")
    return args


def longest_groups(recorded: Trace, num_groups: int | None, max_tokens: int) -> Trace:
    """Those with the most tokens, as with a smaller `max_tokens`."""
    cut = recorded.part(None, max_tokens)
    groups = sorted(cut.groups, key=lambda g: -sum(map(len, g.responses)))
    return Trace(groups=groups[:num_groups], settings=cut.settings)


def main() -> None:
    """Parse, measure, print."""
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(args, Path(folder))
        original = find_trace(args)
        recorded, args.end_token = fit(original, model)
        if args.temperature is None:
            args.temperature = recorded.settings.get("temperature", 1.0)
        recorded = longest_groups(recorded, args.groups, args.max_tokens)
        wanted = args.requests or max(args.batches) * args.engines * args.rounds
        there = sum(min(MAX_SIBLINGS, len(g.responses)) for g in recorded.groups)
        if wanted > there:
            sys.exit(
                f"a rollout has up to {wanted} requests, and {len(recorded.groups)}"
                f" groups have {there}; raise --groups, or lower --requests, or"
                " --rounds or --batches"
            )
        arms = run(model, recorded, args)
    settings = {k: v for k, v in vars(args).items() if k not in ("save", "quick")}
    settings |= {
        "model": Path(args.model).name,
        "trace_sha256": original.sha256,
        "mean_tokens": recorded.num_tokens / recorded.num_requests,
    }
    settings["trace"] = dict(original.settings)
    line = result_line("speculation", settings=settings, figures={"arms": arms})
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
