"""How much longer do new weights take to three nodes than to one, and as differences?

Four hosts, which are network namespaces of this machine: a trainer with its controller,
and nodes with one simulated engine each. What a host sends is held to `--mbit`, so that
the network is what bounds an update, as it does between real hosts, and not this
machine's cores. Four arms take turns: `one`, a single node; `chain`, three that hand
the weights on to each other; `star`, three that each fetch them from the trainer's;
`delta`, a chain that hands on what has changed (`EngineConfig(weights="delta")`).
Weights are bfloat16, and every update is a step as Adam makes it, of about
`--learning-rate` in each float32 master weight; `changed_share` of them are others
then, rounded. Figures are `prepare_s` of the updates' reports, from the order to fetch
until every instance has opened the files, and the bytes that the trainer's host sent.
The first update of each engine is not counted.

Expected: `chain_of_one` at most 1.3; `star_of_one` about 3; `delta_bytes_of_chain`
below 0.1.
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

ARMS = {"one": 1, "chain": 3, "star": 3, "delta": 3}
ADDRESS = "tcp://10.77.0.1:5557"


class Policy:
    """Weights as a trainer has them, in float32, and as engines do, in bfloat16."""

    def __init__(self, num: int, learning_rate: float) -> None:
        import torch

        self._torch = torch
        self._learning_rate = learning_rate
        self._random = torch.Generator().manual_seed(0)
        self._master = 0.02 * torch.randn(num, generator=self._random)
        self._rounded = self._master.bfloat16()

    def step(self) -> tuple[Any, float]:
        """Train; the new weights, two in each number, and how many of them are new."""
        torch = self._torch
        noise = torch.randn(len(self._master), generator=self._random).clamp_(-2, 2)
        self._master += self._learning_rate * noise
        old, self._rounded = self._rounded, self._master.bfloat16()
        changed = (old != self._rounded).float().mean().item()
        # Simulated engines know float32 alone; nobody computes with these numbers.
        return self._rounded.view(torch.float32), changed


def sent_bytes() -> int:
    """By this host, since it is there."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            return int(counts.split()[8])
    raise RuntimeError("this host has no eth0")


async def train(num_nodes: int, num_bytes: int, learning_rate: float) -> None:
    """Be the trainer: an update for each line, which names its arm."""
    import aseer
    from aseer.node import chain
    from tests.integration.sims import config_of

    config = config_of(
        num_instances=0,
        min_nodes=num_nodes,
        listen=ADDRESS,
        engine_args={"weights": {"w": (num_bytes // 4,)}},
    )
    policy = Policy(num_bytes // 4 * 2, learning_rate)
    loop = asyncio.get_running_loop()
    max_given_up = chain.MAX_GIVEN_UP
    async with aseer.Engine(config) as engine:
        sys.stdout.write("open\n")
        sys.stdout.flush()
        while arm := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            chain.MAX_GIVEN_UP = 0 if arm == "star" else max_given_up
            ours: Any = engine._host.cluster
            ours._chains.has_bases = arm == "delta"
            weights, changed = policy.step()
            before = sent_bytes()
            report = await engine.update_weights({"w": weights})
            sent = sent_bytes() - before
            sys.stdout.write(json.dumps([report.prepare_s, sent, changed]) + "\n")
            sys.stdout.flush()


class Trainer:
    """Such a process, on a host."""

    def __init__(self, prefix: tuple[str, ...], *settings: float) -> None:
        from tests.integration.nodes import KEY

        script = [sys.executable, str(Path(__file__).resolve())]
        told = json.dumps(settings)
        self._process = subprocess.Popen(
            [*prefix, "env", f"ASEER_KEY={KEY}", *script, "--trainer", told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        if self._hear() != "open":
            raise RuntimeError("the trainer did not open its engine")

    def update(self, arm: str) -> list[float]:
        """Seconds that an update took until all had it, bytes sent, share changed."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{arm}\n")
        self._process.stdin.flush()
        figures: list[float] = json.loads(self._hear())
        return figures

    def close(self) -> None:
        self._process.communicate()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def cluster(num_nodes: int, args: argparse.Namespace) -> Iterator[Trainer]:
    """A trainer and so many nodes, each on a host of its own."""
    from tests.integration.hosts import hosts
    from tests.integration.nodes import nodes_in

    rate = f"rate {args.mbit}mbit burst 256kb latency 100ms"
    num_bytes = int(args.megabytes * 1e6)
    with (
        hosts(num_nodes + 1) as there,
        tempfile.TemporaryDirectory() as folder,
        nodes_in(Path(folder)) as nodes,
    ):
        for number in range(1, num_nodes + 2):
            if args.mbit:
                there[number].run(f"tc qdisc add dev eth0 root tbf {rate}")
        for number in range(2, num_nodes + 2):
            host = there[number]
            where = ("--controller", ADDRESS)
            nodes.start(host.name, where=where, prefix=host.prefix, num_instances=1)
        trainer = Trainer(there[1].prefix, num_nodes, num_bytes, args.learning_rate)
        try:
            yield trainer
        finally:
            trainer.close()


def measure(args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """What `Trainer.update` says of every update, by arm."""
    found: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.repeats):
        for num_nodes in (1, 3):
            arms = [arm for arm, num in ARMS.items() if num == num_nodes]
            with cluster(num_nodes, args) as trainer:
                trainer.update(arms[0])
                for arm in arms * args.updates:
                    found[arm].append(trainer.update(arm))
                    took_s, sent, changed = found[arm][-1]
                    sys.stderr.write(
                        f"{arm}: {took_s:.2f} s, {sent / 1e6:.2f} MB sent, "
                        f"{changed:.1%} changed\n"
                    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--mbit", type=float, default=100.0, help="0 = as it comes")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--updates", type=int, default=2, help="of each arm, a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", help="file for the result")
    parser.add_argument("--smoke", action="store_true", help="once, and little")
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.trainer is not None:
        num_nodes, num_bytes, learning_rate = json.loads(args.trainer)
        asyncio.run(train(num_nodes, num_bytes, learning_rate))
        return
    if args.smoke:
        args.megabytes, args.repeats, args.updates = 3.0, 1, 1
    found = measure(args)
    figures: dict[str, Any] = {}
    for arm, each in found.items():
        took_s, sent, _ = zip(*each, strict=True)
        figures[f"{arm}_s"] = quantiles(list(took_s))
        figures[f"{arm}_sent_mb"] = quantiles([num / 1e6 for num in sent])
    figures["changed_share"] = quantiles([c for e in found.values() for _, _, c in e])
    for arm, other in (("chain", "one"), ("star", "one"), ("delta", "chain")):
        ratio = figures[f"{arm}_s"]["median"] / figures[f"{other}_s"]["median"]
        figures[f"{arm}_of_{other}"] = round(ratio, 3)
    ratio = figures["delta_sent_mb"]["median"] / figures["chain_sent_mb"]["median"]
    figures["delta_bytes_of_chain"] = round(ratio, 3)
    settings = {
        "megabytes": args.megabytes,
        "mbit": args.mbit,
        "learning_rate": args.learning_rate,
        "updates": args.updates,
        "repeats": args.repeats,
    }
    line = result_line("chain", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
