"""What aseer costs over bare vLLM: the same work, the same number of engines.

Three arms, interleaved: bare `AsyncLLM` engines, each in a process of its own, on the
cores that aseer would give it, with its share of the requests; aseer with policy
"fcfs", undivided; the same in 256-token chunks. Greedy in float32 with fixed lengths,
so that every arm must generate the same tokens, which is checked. Requests come in
pairs of equal length, so that every arm gives each engine the same work, and all of
them fit at once: what is measured is the path, not the scheduling.

Expected: 1.00 undivided, since a report a quarter second is all that is added; 0.98
with chunks, since at each boundary a request sits out about one of 256 steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import print_result, quantiles, result_line

import aseer
from aseer.instance.launch import plan_instances, this_machine
from aseer.models import smollm2

CHUNK_SIZE = 256
Work = list[tuple[list[int], int]]  # (prompt, number of tokens to generate)


def make_work(num_requests: int, shortest: int, longest: int, seed: int) -> Work:
    """Pairs of requests of equal length, prompts of their own, in random order of
    pairs.
    """
    rng = random.Random(seed)
    num_pairs = num_requests // 2
    step = (longest - shortest) / max(1, num_pairs - 1)
    lengths = [round(shortest + i * step) for i in range(num_pairs)]
    rng.shuffle(lengths)
    return [
        ([rng.randrange(100, 500) for _ in range(24)], length)
        for length in lengths
        for _ in range(2)
    ]


# The bare arm


async def bare_vllm(spec: dict[str, Any]) -> None:
    """An `AsyncLLM` that runs the work it reads, a line of JSON each, until its input
    ends.
    """
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            **spec["engine_args"],
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
        )
    )

    async def one(name: str, prompt: list[int], length: int) -> list[int]:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=length,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        (last,) = [
            out
            async for out in llm.generate({"prompt_token_ids": prompt}, params, name)
        ]
        return list(last.outputs[0].token_ids)

    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    number = 0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        work = json.loads(line)
        number += 1
        tokens = await asyncio.gather(
            *(one(f"{number}-{i}", p, n) for i, (p, n) in enumerate(work))
        )
        print(json.dumps(tokens), flush=True)
    llm.shutdown()


class Bare:
    """The bare engines, one process each."""

    def __init__(self, config: aseer.EngineConfig) -> None:
        self._files = tempfile.TemporaryDirectory()
        self._processes = []
        for launch in plan_instances(config, this_machine()):
            spec = {"engine_args": dict(launch.engine_args), "cores": launch.cores}
            log = Path(self._files.name) / f"{launch.instance_id}.log"
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    [sys.executable, __file__, "--bare", json.dumps(spec)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env=os.environ | dict(launch.env),
                )
            self._processes.append(process)
        for process in self._processes:
            self._read(process, until="ready")

    def run(self, work: Work) -> list[list[int]]:
        """Every second request to the first engine, the others to the second, and so
        on.
        """
        num = len(self._processes)
        for i, process in enumerate(self._processes):
            assert process.stdin is not None
            process.stdin.write(json.dumps(work[i::num]) + "\n")
            process.stdin.flush()
        results: list[list[int]] = [[] for _ in work]
        for i, process in enumerate(self._processes):
            results[i::num] = json.loads(self._read(process, until="["))
        return results

    def _read(self, process: subprocess.Popen[str], *, until: str) -> str:
        """The next line that begins like that; vLLM logs to the same stream."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(until) and not line.startswith("[rank"):
                return line
        raise RuntimeError(f"a bare engine ended with status {process.wait()}")

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        self._files.cleanup()


def run_aseer(engine: aseer.Engine, work: Work, chunk_size: int) -> list[list[int]]:
    groups = [
        aseer.Group(
            prompt,
            n=1,
            group_id=str(i),
            sampling={"temperature": 0.0, "max_tokens": length, "ignore_eos": True},
        )
        for i, (prompt, length) in enumerate(work)
    ]
    results: list[list[int]] = [[] for _ in work]
    for out in engine.rollout_sync(groups, policy="fcfs", chunk_size=chunk_size):
        results[int(out.group_id)] = out.token_ids
    return results


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each arm in every round, and their ratios to the bare arm."""
    work = make_work(args.requests, args.shortest, args.longest, args.seed)
    num_tokens = sum(n for _, n in work)
    with ExitStack() as stack:
        engine = stack.enter_context(aseer.Engine(config_of(args)))
        arms: dict[str, Any] = {
            "undivided": lambda: run_aseer(engine, work, 0),
            "chunks_256": lambda: run_aseer(engine, work, args.chunk_size),
        }
        if args.model != "sim":
            bare = Bare(config_of(args))
            stack.callback(bare.close)
            arms = {"bare": lambda: bare.run(work), **arms}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        reference = None
        for round_ in range(args.rounds + 1):  # the first warms up
            order = list(arms.items())
            shift = round_ % len(order)  # each arm is first, second, third in turn
            for name, run in order[shift:] + order[:shift]:
                start = time.perf_counter()
                result = run()
                took = time.perf_counter() - start
                reference = reference or result
                if result != reference:
                    raise RuntimeError(f"arm {name} generated other tokens")
                if round_:
                    seconds[name].append(took)
                print(
                    f"round {round_} {name}: {num_tokens / took:.1f} tok/s", flush=True
                )
    base = seconds.get("bare", seconds["undivided"])
    ratios = {
        name: [b / s for b, s in zip(base, seconds[name], strict=True)]
        for name in ("undivided", "chunks_256")
    }
    spread = {f"spread_{name}": quantiles(r, 4) for name, r in ratios.items()}
    return {
        **{f"ratio_{name}": spread[f"spread_{name}"]["median"] for name in ratios},
        **spread,
        "seconds": {name: quantiles(s) for name, s in seconds.items()},
        "num_tokens": num_tokens,
    }


def config_of(args: argparse.Namespace) -> aseer.EngineConfig:
    """The same for every arm."""
    if args.model == "sim":
        return aseer.EngineConfig(
            model="sim", device="sim", num_instances=2, report_interval_s=0.05
        )
    return aseer.EngineConfig(
        model=args.model,
        num_instances=args.instances,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=64,
        kv_cache_bytes=1 << 30,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=576)
    parser.add_argument("--chunk-size", type=int, default=CHUNK_SIZE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="seconds, simulated engines"
    )
    parser.add_argument("--save", type=Path, help="file for the result")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        spec = json.loads(args.bare)
        os.sched_setaffinity(0, spec["cores"])
        asyncio.run(bare_vllm(spec))
        return
    if args.smoke:
        args.model, args.requests, args.longest, args.rounds = "sim", 8, 128, 1
        args.chunk_size = 32
    elif args.model is None:
        args.model = str(smollm2.prepare(dtype="float32", progress=print))
    figures = measure(args)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("bare", "save")}
    settings["model"] = Path(args.model).name
    print_result(
        result_line("overhead", settings=settings, figures=figures), save_as=args.save
    )


if __name__ == "__main__":
    main()
