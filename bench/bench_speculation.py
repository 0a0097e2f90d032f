"""What does drafting from the group gain, by the number of requests an engine runs?

One-core engines with SmolLM2, one pair of engines an arm, all up at once; an arm's
engines idle while another's work. For each batch size the arms take turns, in an order
that alternates: a rollout of that many requests an engine, all of them started at once,
in groups of at most 8. Lengths are bounded, not fixed, so what is compared is tokens a
second. On a shared machine wall time says little, so the headline is tokens a second of
the engine processes' own CPU time, each engine being one thread; wall time stands
beside it. The samples differ between arms, their distribution does not (the sampler is
tested at the engines' start).

Expected at T = 0.7: a gain with up to 4 requests an engine, none with 16, where a core
spends on sampling from 49k tokens what a draft would save. Aimed at: never below 0.99x;
drafting takes under 1% of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from common import print_result, quantiles, result_line

import aseer
from aseer.data import load_prompts
from aseer.models import smollm2, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def config_of(model: Path, arm: str, args: argparse.Namespace) -> aseer.EngineConfig:
    """Engines of one arm: a method's name, or a budget of our own method's."""
    methods = {"off": "off", "dgds": "dgds", "suffix": "suffix", "ngram": "ngram"}
    speculation: Any = methods.get(arm) or aseer.SpeculationConfig(budget=arm)
    return aseer.EngineConfig(
        model=str(model),
        device="cpu",
        num_instances=args.engines,
        max_model_len=1024,
        max_num_seqs=max(args.batches),
        kv_cache_bytes=256 << 20,
        chunk_size=args.chunk_size,
        speculation=speculation,
    )


def cpu_seconds(engine: aseer.Engine) -> float:
    """CPU time that the engines' processes have used."""
    total = 0.0
    for info in engine.instances:
        process = psutil.Process(info.pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system
    return total


def groups_of(
    prompts: Iterator[Any], batch: int, args: argparse.Namespace
) -> list[aseer.Group]:
    """Groups of `batch` requests for each engine."""
    left = batch * args.engines
    groups = []
    while left:
        n = min(8, left)
        sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens}
        groups.append(aseer.Group(next(prompts), n=n, sampling=sampling))
        left -= n
    return groups


def measure(engine: aseer.Engine, groups: Sequence[aseer.Group]) -> dict[str, Any]:
    """One rollout's figures."""
    cpu_s, since = cpu_seconds(engine), time.perf_counter()
    rollout = engine.rollout_sync(groups)
    num_tokens = sum(len(response.token_ids) for response in rollout)
    wall_s = time.perf_counter() - since
    cpu_s = cpu_seconds(engine) - cpu_s
    speculation = rollout.report.speculation
    return {
        "tokens": num_tokens,
        "tok_per_cpu_s": num_tokens / cpu_s,
        "tok_per_wall_s": num_tokens / wall_s,
        "acceptance_length": speculation.acceptance_length if speculation else 1.0,
        "drafted_per_token": sum(speculation.drafted) / num_tokens
        if speculation
        else 0.0,
        "drafting_share": speculation.drafting_share if speculation else 0.0,
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of an arm's runs at one batch size; rates are pooled."""
    figures: dict[str, Any] = {
        name: quantiles([run[name] for run in runs])
        for name in ("tok_per_cpu_s", "tok_per_wall_s")
    }
    for name in ("acceptance_length", "drafted_per_token", "drafting_share"):
        figures[name] = round(sum(run[name] for run in runs) / len(runs), 4)
    return figures


def run(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """All arms and batch sizes."""
    prompts: list[Any] = [[5, 6, i] for i in range(7, 40)]
    if not args.smoke:
        prompts = [r.messages or r.prompt for r in load_prompts()]
    random.Random(args.seed).shuffle(prompts)
    results: dict[str, dict[int, list[dict[str, Any]]]] = {
        arm: {batch: [] for batch in args.batches} for arm in args.arms
    }
    with contextlib.ExitStack() as stack:
        engines = {
            arm: stack.enter_context(aseer.Engine(config_of(model, arm, args)))
            for arm in args.arms
        }
        for engine in engines.values():  # the first steps of a process are slow
            measure(engine, groups_of(iter(prompts), max(args.batches), args))
        for repetition in range(args.repetitions):
            for batch in args.batches:
                start = repetition * 16
                order = args.arms if repetition % 2 else args.arms[::-1]
                for arm in order:
                    texts = itertools.islice(itertools.cycle(prompts), start, None)
                    figures = measure(engines[arm], groups_of(texts, batch, args))
                    results[arm][batch].append(figures)
                    print(repetition, batch, arm, figures, flush=True)
    return {
        arm: {str(batch): summary(runs) for batch, runs in by_batch.items()}
        for arm, by_batch in results.items()
    }


def speedups(arms: Mapping[str, Any], rate: str) -> dict[str, dict[str, float]]:
    """Each arm's median rate over the first arm's, by batch size."""
    base = next(iter(arms.values()))
    return {
        arm: {
            batch: round(f[rate]["median"] / base[batch][rate]["median"], 3)
            for batch, f in by_batch.items()
        }
        for arm, by_batch in arms.items()
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=["off", "dgds"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="file for the result")
    parser.add_argument("--smoke", action="store_true", help="tiny model, one run")
    args = parser.parse_args()
    if args.smoke:
        args.batches, args.repetitions, args.engines = [2], 1, 1
        args.max_tokens = 32
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            tiny.make_tiny(model := Path(folder) / "tiny")
        else:
            model = smollm2.prepare()
        arms = run(args, model)
    line = result_line(
        "speculation",
        settings={k: v for k, v in vars(args).items() if k != "save"},
        figures={
            "speedup_cpu": speedups(arms, "tok_per_cpu_s"),
            "speedup_wall": speedups(arms, "tok_per_wall_s"),
            "arms": arms,
        },
    )
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
