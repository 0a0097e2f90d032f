"""How much longer do new weights take to three nodes than to one?

Four hosts, which are network namespaces of this machine: a trainer with its controller,
and nodes with one simulated engine each. What a host sends is held to `--mbit`, so that
the network is what bounds an update, as it does between real hosts, and not this
machine's cores. Three arms take turns: `one`, a single node; `chain`, three that hand
the weights on to each other; `star`, three that each fetch them from the trainer's.
Figures are `prepare_s` of the updates' reports: from the order to fetch until every
instance has opened the files. The first update of each engine is not counted.

Expected: `chain_of_one` at most 1.3; `star_of_one` about 3.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, print_result, quantiles, result_line

if TYPE_CHECKING:
    from collections.abc import Iterator

ARMS = {"one": 1, "chain": 3, "star": 3}
ADDRESS = "tcp://10.77.0.1:5557"


async def train(num_nodes: int, num_values: int) -> None:
    """Be the trainer: an update for each line, which names its arm."""
    import torch

    import aseer
    from aseer.node import chain
    from tests.integration.sims import config_of

    config = config_of(
        num_instances=0,
        min_nodes=num_nodes,
        listen=ADDRESS,
        engine_args={"weights": {"w": (num_values,)}},
    )
    loop = asyncio.get_running_loop()
    max_given_up = chain.MAX_GIVEN_UP
    async with aseer.Engine(config) as engine:
        sys.stdout.write("open\n")
        sys.stdout.flush()
        while arm := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            chain.MAX_GIVEN_UP = 0 if arm == "star" else max_given_up
            report = await engine.update_weights({"w": torch.rand(num_values)})
            sys.stdout.write(f"{report.prepare_s}\n")
            sys.stdout.flush()


class Trainer:
    """Such a process, on a host."""

    def __init__(
        self, prefix: tuple[str, ...], num_nodes: int, num_values: int
    ) -> None:
        from tests.integration.nodes import KEY

        script = [sys.executable, str(Path(__file__).resolve())]
        settings = json.dumps([num_nodes, num_values])
        self._process = subprocess.Popen(
            [*prefix, "env", f"ASEER_KEY={KEY}", *script, "--trainer", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        if self._hear() != "open":
            raise RuntimeError("the trainer did not open its engine")

    def update(self, arm: str) -> float:
        """Seconds that an update took until all had it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{arm}\n")
        self._process.stdin.flush()
        return float(self._hear())

    def close(self) -> None:
        self._process.communicate()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def cluster(num_nodes: int, num_values: int, mbit: float) -> Iterator[Trainer]:
    """A trainer and so many nodes, each on a host of its own."""
    from tests.integration.hosts import hosts
    from tests.integration.nodes import nodes_in

    rate = f"rate {mbit}mbit burst 256kb latency 100ms"
    with (
        hosts(num_nodes + 1) as there,
        tempfile.TemporaryDirectory() as folder,
        nodes_in(Path(folder)) as nodes,
    ):
        for number in range(1, num_nodes + 2):
            if mbit:
                there[number].run(f"tc qdisc add dev eth0 root tbf {rate}")
        for number in range(2, num_nodes + 2):
            host = there[number]
            where = ("--controller", ADDRESS)
            nodes.start(host.name, where=where, prefix=host.prefix, num_instances=1)
        trainer = Trainer(there[1].prefix, num_nodes, num_values)
        try:
            yield trainer
        finally:
            trainer.close()


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every update, by arm."""
    num_values = int(args.megabytes * 1e6 / 4)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(args.repeats):
        for num_nodes in (1, 3):
            arms = [arm for arm, num in ARMS.items() if num == num_nodes]
            with cluster(num_nodes, num_values, args.mbit) as trainer:
                trainer.update(arms[0])
                for arm in arms * args.updates:
                    found[arm].append(trainer.update(arm))
                    sys.stderr.write(f"{arm}: {found[arm][-1]:.2f} s\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--mbit", type=float, default=100.0, help="0 = as it comes")
    parser.add_argument("--updates", type=int, default=2, help="of each arm, a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", help="file for the result")
    parser.add_argument("--smoke", action="store_true", help="once, and little")
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.trainer is not None:
        asyncio.run(train(*json.loads(args.trainer)))
        return
    if args.smoke:
        args.megabytes, args.repeats, args.updates = 3.0, 1, 1
    found = measure(args)
    figures: dict[str, Any] = {f"{arm}_s": quantiles(s) for arm, s in found.items()}
    one_s = figures["one_s"]["median"]
    for arm in ("chain", "star"):
        figures[f"{arm}_of_one"] = round(figures[f"{arm}_s"]["median"] / one_s, 3)
    settings = {
        "megabytes": args.megabytes,
        "mbit": args.mbit,
        "updates": args.updates,
        "repeats": args.repeats,
    }
    line = result_line("chain", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
