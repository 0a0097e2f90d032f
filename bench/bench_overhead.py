"""What aseer costs over bare vLLM: the same work, the same number of engines.

Three arms take turns on the same engines: bare, where each engine's `AsyncLLM` is given
its share of the requests directly; aseer with policy "fcfs", undivided; the same in
256-token chunks. That they are the same processes matters: on a machine shared with
others, two engines that were started alike can differ by a quarter for minutes. Greedy
in float32 with fixed lengths, so that every arm must generate the same tokens, which is
checked. Requests come in pairs of equal length, so that every arm gives each engine the
same work, and all of them fit at once: what is measured is the path, not the
scheduling.

Expected: 1.00 undivided, since a report a quarter second is all that is added; 0.98
with chunks, since at each boundary a request sits out about one of 256 steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import print_result, quantiles, result_line

import aseer
from aseer.models import smollm2
from aseer.node import process

CHUNK_SIZE = 256
SOCKETS = "ASEER_BENCH_SOCKETS"
MAX_LINE_BYTES = 1 << 24
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


def serve_instance() -> None:
    """An instance process whose engine can be used past everything of aseer's, too."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from aseer.instance import main as instance
    from aseer.instance.vllm.backend import VllmBackend

    class OpenBackend(VllmBackend):
        async def attend(self) -> None:
            path = f"{os.environ[SOCKETS]}/{self._spec.instance_id}"
            server = await asyncio.start_unix_server(
                self._take_work, path, limit=MAX_LINE_BYTES
            )
            async with server:
                await super().attend()
                await server.serve_forever()

        async def _take_work(
            self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            work = json.loads(await reader.readline())
            results = await asyncio.gather(*(self._bare_request(*one) for one in work))
            writer.write(json.dumps(results).encode() + b"\n")
            await writer.drain()
            writer.close()

        async def _bare_request(self, name: str, prompt: list[int], length: int) -> Any:
            params = SamplingParams(
                temperature=0.0,
                max_tokens=length,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            generate = self._engine.generate
            (last,) = [
                out
                async for out in generate({"prompt_token_ids": prompt}, params, name)
            ]
            return list(last.outputs[0].token_ids)

    instance.make_backend = OpenBackend
    instance.main()


def run_bare(sockets: str, num_instances: int, work: Work) -> list[list[int]]:
    """Every second request to the first engine, the others to the second, and so on."""
    connections = []
    for i in range(num_instances):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{sockets}/{i}")
        share = [(secrets.token_hex(8), *one) for one in work[i::num_instances]]
        connection.sendall(json.dumps(share).encode() + b"\n")
        connections.append(connection)
    results: list[list[int]] = [[] for _ in work]
    for i, connection in enumerate(connections):
        with connection, connection.makefile() as answer:
            results[i::num_instances] = json.loads(answer.readline())
    return results


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
        sockets = stack.enter_context(tempfile.TemporaryDirectory())
        if args.model != "sim":
            process.MODULE = (Path(__file__).stem, "--instance")
        engine = stack.enter_context(aseer.Engine(config_of(args, sockets)))
        arms: dict[str, Any] = {
            "undivided": lambda: run_aseer(engine, work, 0),
            "chunks_256": lambda: run_aseer(engine, work, args.chunk_size),
        }
        if args.model != "sim":
            bare = {"bare": lambda: run_bare(sockets, args.instances, work)}
            arms = {**bare, **arms}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        stolen: dict[str, list[float]] = {name: [] for name in arms}
        reference = None
        for round_ in range(args.rounds + 1):  # the first warms up
            order = list(arms.items())
            shift = round_ % len(order)  # each arm is first, second, third in turn
            for name, run in order[shift:] + order[:shift]:
                start, steal = time.perf_counter(), steal_s()
                result = run()
                took = time.perf_counter() - start
                reference = reference or result
                if result != reference:
                    raise RuntimeError(f"arm {name} generated other tokens")
                if round_:
                    seconds[name].append(took)
                    stolen[name].append(steal_s() - steal)
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
        "stolen_s": {name: quantiles(s) for name, s in stolen.items()},
        "num_tokens": num_tokens,
    }


def steal_s() -> float:
    """Seconds that the machine's host has given to others so far, over all cores."""
    ticks = Path("/proc/stat").read_text().split()[8]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def config_of(args: argparse.Namespace, sockets: str) -> aseer.EngineConfig:
    """The engines of every arm."""
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
        chunk_size=args.chunk_size,
        kv_pool=args.kv_pool,
        env={SOCKETS: sockets},
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
    parser.add_argument("--kv-pool", choices=("off", "auto"), default="off")
    parser.add_argument("--instance", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.instance:
        serve_instance()
        return
    if args.smoke:
        args.model, args.requests, args.longest, args.rounds = "sim", 8, 128, 1
        args.chunk_size = 32
    elif args.model is None:
        args.model = str(smollm2.prepare(dtype="float32", progress=print))
    figures = measure(args)
    settings = {
        k: str(v) for k, v in vars(args).items() if k not in ("instance", "save")
    }
    settings["model"] = Path(args.model).name
    print_result(
        result_line("overhead", settings=settings, figures=figures), save_as=args.save
    )


if __name__ == "__main__":
    main()
