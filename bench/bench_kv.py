"""What does it cost to go on with a request on another engine, with a KV pool?

Two one-core engines. One computes a prompt of about 2, 4 or 8 thousand tokens and
stores its KV; then the other is given the same prompt to make one token of, in one of
several ways, which take turns: with what the pool's DRAM has; with what its disk has
(DRAM is cleared first); with nothing, as if there were no pool (under another weight
version); and with what its own cache has. Prompts are new each time, both engines must
make the same token, and the second must compute one token or all. With the part
"mooncake", KV goes by Mooncake Store between two processes that stand for nodes, too.

The second part runs the same rollout with engines that have a pool and with engines
that have none, in turns: requests move when that evens out the load.

Aimed at: a load takes at most 5% of the time to recompute 8 thousand tokens; throughput
with the pool is at least that without.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import print_result, quantiles, result_line
from mooncake_nodes import mooncake_nodes

import aseer
from aseer import scheduler
from aseer.data import load_prompts
from aseer.kv.pool import KvPool
from aseer.models import smollm2, tiny
from aseer.types import InstanceId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Ways that take turns; what an engine has itself is looked at after the first of each.
POOL_WAYS = ("dram", "disk", "recompute")
MOONCAKE_WAYS = ("mooncake", "recompute")
_there = InstanceId(0)  # the instance that every chunk is sent to


def config_of(
    model: Path, args: argparse.Namespace, **settings: Any
) -> aseer.EngineConfig:
    """Two engines on one core each."""
    return aseer.EngineConfig(
        model=str(model),
        device="cpu",
        dtype=args.dtype,
        num_instances=2,
        **settings,
    )


@contextlib.contextmanager
def everything_goes_there() -> Iterator[None]:
    """Chunks are sent to instance `_there`, and what is finished is not freed."""
    place, free = scheduler.place_by_affinity, KvPool.free
    scheduler.place_by_affinity = lambda *_: _there
    KvPool.free = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        scheduler.place_by_affinity = place
        KvPool.free = free  # type: ignore[method-assign]


def run_there(
    engine: aseer.Engine, prompt: Sequence[int], where: int, version: int
) -> tuple[float, int, int]:
    """One token after a prompt: seconds, the token, tokens that were found."""
    global _there
    _there = InstanceId(where)
    assert engine._host is not None
    engine._host.weights.version = version
    group = aseer.Group(list(prompt), n=1, sampling={"temperature": 0, "max_tokens": 1})
    since = time.perf_counter()
    (response,) = engine.rollout_sync([group])
    seconds = time.perf_counter() - since
    return seconds, response.token_ids[0], response.metrics.num_cached_tokens


def resume_times(
    engine: aseer.Engine, args: argparse.Namespace, ways: tuple[str, ...]
) -> dict[str, Any]:
    """Seconds by length and way."""
    thread, host = engine._open()
    pool, rng, version = host.kv_pool, random.Random(args.seed), 0
    times: dict[int, dict[str, list[float]]] = {
        n: {way: [] for way in (*ways, "own_cache")} for n in args.lengths
    }
    rounds = [(-1, min(args.lengths))]  # the first steps of a process are slow
    rounds += [(r, n) for r in range(args.repetitions) for n in args.lengths]
    for repetition, n in rounds:
        order = ways if repetition % 2 else ways[::-1]
        for way in order:
            version += 1
            prompt = [rng.randrange(10, 120) for _ in range(n)]
            _, token, _ = run_there(engine, prompt, 0, version)
            if way == "disk":
                assert pool is not None
                wait_until_written(pool)
                thread.submit(pool.clear_dram).result()
            elif way == "mooncake":
                time.sleep(1.5)  # it says nowhere when all is stored
            # Under another weight version nothing is found.
            use = 10**6 + version if way == "recompute" else version
            for each in (way, "own_cache") if way == ways[0] else (way,):
                seconds, again, found = run_there(engine, prompt, 1, use)
                assert again == token, (each, n)
                assert found == (0 if each == "recompute" else n - 1), (each, found)
                print(repetition, n, each, round(seconds, 4), flush=True)
                if repetition >= 0:
                    times[n][each].append(seconds)
    return {
        str(n): {way: quantiles(t, 4) for way, t in by_way.items()}
        for n, by_way in times.items()
    }


def wait_until_written(pool: Any) -> None:
    """Wait until nothing more goes to disk."""
    seen = -1
    while seen != (seen := pool.counts.disk_written):
        time.sleep(1.5)


def rollouts(engines: dict[str, aseer.Engine], args: argparse.Namespace) -> Any:
    """Tokens a second of the same rollout with a pool and without, and what it took."""
    prompts: list[Any] = [[5, 6, i] * 20 for i in range(7, 7 + args.groups)]
    if args.model != "tiny":
        prompts = [r.messages or r.prompt for r in load_prompts()[: args.groups]]
    sampling = {"temperature": 0.7, "max_tokens": args.max_tokens}
    rates: dict[str, list[float]] = {arm: [] for arm in engines}
    reports: list[Any] = []
    for repetition in range(-1, args.repetitions):
        groups = [
            aseer.Group(p, n=4, sampling=sampling | {"seed": repetition + 1000 * i})
            for i, p in enumerate(prompts)
        ]
        order = list(engines) if repetition % 2 else list(engines)[::-1]
        for arm in order:
            rollout = engines[arm].rollout_sync(groups)
            num_tokens = sum(len(r.token_ids) for r in rollout)
            report = rollout.report
            if repetition >= 0:
                rates[arm].append(num_tokens / report.wall_s)
                reports += [report] if report.kv else []
            print(repetition, arm, round(num_tokens / report.wall_s, 1), flush=True)
    figures: dict[str, Any] = {f"tok_per_s_{a}": quantiles(r) for a, r in rates.items()}
    pairs = zip(rates["pool"], rates["off"], strict=True)
    figures["throughput_over_off"] = quantiles([a / b for a, b in pairs])
    figures["time_share"] = quantiles([r.kv.time_share for r in reports], 4)
    for name in ("num_moves_found", "num_moves_recomputed", "num_loaded_tokens"):
        figures[name] = [getattr(r.kv, name) for r in reports]
    figures["load_p50_s"] = [round(r.kv.load_p50_s, 4) for r in reports]
    return figures


def run(args: argparse.Namespace, model: Path, disk: Path) -> dict[str, Any]:
    """The parts that are wanted."""
    pool = aseer.KvPoolConfig(
        mode="lmcache",
        dram_bytes=args.dram_bytes,
        disk_dir=disk,
        disk_bytes=8 << 30,
        timeout_s=30.0,
    )
    figures: dict[str, Any] = {}
    if "resume" in args.parts:
        figures |= resume(args, model, POOL_WAYS, {"kv_pool": pool})
    if "mooncake" in args.parts:
        # A prompt of 8 thousand tokens of SmolLM2 is 360 MB.
        sizes = {"node_mb": 1536, "buffer_mb": 1024}
        with mooncake_nodes(disk.parent, **sizes) as settings:
            # It refuses more than some 4,000 transfers, a layer and block each.
            settings["engine_args"] = {"block_size": 128}
            figures["mooncake"] = resume(args, model, MOONCAKE_WAYS, settings)
        figures |= {k: v for k, v in figures["mooncake"].items() if "mooncake" in k}
    if "rollout" in args.parts:
        figures["rollout"] = with_and_without(args, model, pool)
    return figures


def resume(
    args: argparse.Namespace,
    model: Path,
    ways: tuple[str, ...],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The first part, by some ways."""
    config = config_of(
        model,
        args,
        max_model_len=max(args.lengths) + 64,
        max_num_seqs=4,
        kv_cache_bytes=args.kv_cache_bytes,
        **settings,
    )
    with everything_goes_there(), aseer.Engine(config) as engine:
        times = resume_times(engine, args, ways)
    figures: dict[str, Any] = {"resume_s": times}
    for n in args.lengths:
        whole = times[str(n)]["recompute"]["median"]
        for way in times[str(n)]:
            if way != "recompute":
                key = "" if way == "dram" else f"_{way}"
                share = times[str(n)][way]["median"] / whole
                figures[f"load_over_recompute{key}_{round(n / 1000)}k"] = round(
                    share, 4
                )
    return figures


def with_and_without(
    args: argparse.Namespace, model: Path, pool: aseer.KvPoolConfig
) -> dict[str, Any]:
    """The second part."""
    with contextlib.ExitStack() as stack:
        engines = {}
        for arm, mode in (("pool", pool), ("off", aseer.KvPoolConfig(mode="off"))):
            config = config_of(
                model,
                args,
                kv_pool=mode,
                max_model_len=1024,
                max_num_seqs=16,
                kv_cache_bytes=args.kv_cache_bytes // 2,
                chunk_size=args.chunk_size,
            )
            engines[arm] = stack.enter_context(aseer.Engine(config))
        figures: dict[str, Any] = rollouts(engines, args)
        return figures


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    # Just past a whole number of the pool's chunks, as chunks of requests end.
    lengths = [n * 128 + 1 for n in (16, 32, 63)]
    parts = ["resume", "rollout"]
    every = [*parts, "mooncake"]
    parser.add_argument("--parts", nargs="+", choices=every, default=parts)
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--dram-bytes", type=int, default=1 << 30)
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="file for the result")
    parser.add_argument("--smoke", action="store_true", help="tiny model, one run")
    args = parser.parse_args()
    if args.smoke:
        args.model = "tiny"
        args.lengths, args.repetitions, args.groups = [257, 513], 1, 2
        args.dram_bytes, args.kv_cache_bytes = 128 << 20, 64 << 20
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "tiny":
            tiny.make_tiny(model := Path(folder) / "tiny")
        else:
            model = smollm2.prepare()
        figures = run(args, model, Path(folder) / "disk")
    line = result_line(
        "kv",
        settings={k: v for k, v in vars(args).items() if k != "save"},
        figures=figures,
    )
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
