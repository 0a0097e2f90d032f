"""What does a rollout lose while the trainer's own threads compute in Python?

Rewards are often computed in Python as responses arrive, and Python runs one thread at
a time. Simulated engines roll out the same groups, by turns with the trainer idle
(`idle`), with a thread of it that computes without a pause under Python's own setting
of how long a thread's turn is (`busy at 5 ms`), and under that which aseer makes while
an engine is open (`busy`; see `aseer/runtime/turns.py`). `ratios` are throughputs over
`idle` in the same repetition; `computed` is how much the busy thread got done a second,
over that of `busy at 5 ms`.

Expected: `busy` near what is left of the cores, several times `busy at 5 ms`; and the
busy thread loses a few percent at most beyond what the engine's thread now computes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from dataclasses import dataclass, field

from common import print_result, quantiles, result_line

import aseer
from aseer.runtime.turns import TURN_S

PYTHONS_TURN_S = 0.005
ARMS = {"idle": TURN_S, "busy at 5 ms": PYTHONS_TURN_S, "busy": TURN_S}


@dataclass
class Busy:
    """A thread that computes until it is told to stop."""

    num_done: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.is_over.is_set():
            for _ in range(2_000):
                self.num_done += 1


def groups_of(num: int) -> list[aseer.Group]:
    sampling = aseer.SamplingParams(max_tokens=512, ignore_eos=True)
    return [aseer.Group([1, 2, 3 + i], n=8, sampling=sampling) for i in range(num)]


async def throughput(engine: aseer.Engine, num_groups: int) -> float:
    """Tokens a second of a whole rollout, by this thread's clock."""
    begun, num_tokens = time.perf_counter(), 0
    async with engine.rollout(groups_of(num_groups)) as rollout:
        async for response in rollout:
            num_tokens += len(response.token_ids)
    return num_tokens / (time.perf_counter() - begun)


async def measure(
    num_groups: int, num_repetitions: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By arm: tokens a second, and what the busy thread did a second."""
    config = aseer.EngineConfig(
        model="sim", device="sim", num_instances=4, chunk_size=64, max_num_seqs=32
    )
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    computed: dict[str, list[float]] = {arm: [] for arm in ARMS}
    async with aseer.Engine(config) as engine:
        await throughput(engine, num_groups)
        for i in range(num_repetitions):
            for arm in list(ARMS)[:: -1 if i % 2 else 1]:
                sys.setswitchinterval(ARMS[arm])
                busy = Busy()
                thread = threading.Thread(target=busy.run)
                begun = time.perf_counter()
                if arm != "idle":
                    thread.start()
                rates[arm].append(await throughput(engine, num_groups))
                busy.is_over.set()
                if arm != "idle":
                    thread.join()
                computed[arm].append(busy.num_done / (time.perf_counter() - begun))
    return rates, computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    if args.smoke:
        args.groups, args.repetitions = 4, 1
    rates, computed = asyncio.run(measure(args.groups, args.repetitions))
    figures = {
        "ratios": {
            arm: quantiles(_over(rates[arm], rates["idle"])) for arm in list(ARMS)[1:]
        },
        "computed": quantiles(_over(computed["busy"], computed["busy at 5 ms"])),
        "idle_tok_s": quantiles(rates["idle"], 0),
    }
    settings = {"groups": args.groups, "repetitions": args.repetitions}
    line = result_line("busy_trainer", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


def _over(values: list[float], base: list[float]) -> list[float]:
    return [value / under for value, under in zip(values, base, strict=True)]


if __name__ == "__main__":
    main()
