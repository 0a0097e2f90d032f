"""What does a million pieces of nonsense at a cluster's ports cost?

A trainer with an instance of its own, and a node with another, do rollouts. Meanwhile a
stranger sends bytes, and somebody who has the key sends frames, most of them nearly
right, first to the controller and then to the node's own port. After a fifth of them
nothing may grow any more: `grown_mb` and `grown_files` are of the controller's process
and of the node's, between then and the end. `num_changed` are responses that are not
those of a rollout that nobody disturbs. See `tests/integration/fuzzing.py`.

Expected: no process has ended, `num_changed` 0, and nothing grows by more than what the
interpreter and the allocator keep between two looks, which is a few megabytes.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, print_result, result_line

if TYPE_CHECKING:
    import aseer

MAX_GROWN_MB = 64.0
MAX_GROWN_FILES = 10
ARMS = [(to, who) for to in ("controller", "node") for who in ("stranger", "key")]


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of all arms, one after another on one engine."""
    import aseer
    from tests.integration import fuzzing
    from tests.integration.nodes import nodes_in
    from tests.integration.sims import config_of, content, groups_of

    groups = groups_of(4, ignore_eos=True, max_tokens=300)
    async with aseer.Engine(config_of(chunk_size=0)) as engine:
        expected = content([r async for r in engine.rollout(groups)])

    async def roll(engine: aseer.Engine) -> int:
        found = content([r async for r in engine.rollout(groups)])
        return sum(found.get(name) != expected[name] for name in expected)

    figures: dict[str, Any] = {}
    with nodes_in(folder) as nodes:
        node = nodes.start("good", num_instances=1)
        config = nodes.config(num_instances=1, node_timeout_s=5.0)
        async with aseer.Engine(config) as engine:
            ports = {
                "controller": nodes.address,
                "node": fuzzing.address_of_node(engine),
            }
            pids = {"controller": os.getpid(), "node": node.pid}
            for to, who in ARMS:
                sending = fuzzing.Sending(
                    ports[to], is_node=to == "node", has_key=who == "key"
                )
                await fuzzing.send_nonsense(sending, args.frames // 5, seed=1)
                await fuzzing.settled(engine)
                before = {name: fuzzing.Held.by(pid) for name, pid in pids.items()}
                began, num_rollouts, num_changed = time.monotonic(), 0, 0
                async with asyncio.TaskGroup() as tasks:
                    sent = tasks.create_task(
                        fuzzing.send_nonsense(sending, args.frames, seed=2)
                    )
                    while not sent.done():
                        num_changed += await roll(engine)
                        num_rollouts += 1
                took_s = time.monotonic() - began
                await fuzzing.settled(engine)
                num_changed += await roll(engine)
                after = {name: fuzzing.Held.by(pid) for name, pid in pids.items()}
                figures[f"{who}_to_{to}"] = told = {
                    "num_frames": args.frames,
                    "frames_per_s": round(args.frames / took_s),
                    "num_rollouts": num_rollouts,
                    "num_changed": num_changed,
                    "grown_mb": {
                        name: round((new.num_bytes - before[name].num_bytes) / 1e6, 1)
                        for name, new in after.items()
                    },
                    "grown_files": {
                        name: new.num_files - before[name].num_files
                        for name, new in after.items()
                    },
                }
                sys.stderr.write(f"{who} to {to}: {told}\n")
        figures["node_status"] = await node.wait()
    return figures


def is_well(figures: dict[str, Any]) -> bool:
    """Whether nobody else was cost anything."""
    arms = [each for each in figures.values() if isinstance(each, dict)]
    return figures["node_status"] == 0 and all(
        not arm["num_changed"]
        and max(arm["grown_mb"].values()) < MAX_GROWN_MB
        and max(arm["grown_files"].values()) < MAX_GROWN_FILES
        for arm in arms
    )


def main() -> int:
    """Send and print; the status says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=1_000_000, help="of each kind")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    parser.add_argument("--smoke", action="store_true", help="few frames")
    args = parser.parse_args()
    if args.smoke:
        args.frames = 4_000
    sys.path.insert(0, str(ROOT))
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(args, Path(folder)))
    line = result_line("fuzz", settings={"frames": args.frames}, figures=figures)
    print_result(line, save_as=args.save)
    return 0 if is_well(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
