"""Is anything lost when processes and connections of a cluster fail at random?

A trainer with a journal and two nodes do rollouts, on three instances. The trainer, the
nodes' agents and the instances are killed (SIGKILL) and stopped (SIGSTOP) for less and
for more than the time-outs, and so are, with real engines, vLLM's processes below them
and the KV pool's server; nodes are told to end; their connections are cut for less and
for more, reset and slowed down; the journals' disk is full for a while (as root, who
may mount one). What is killed is started again. A seed decides what happens when. See
`tests/integration/chaos.py`.

Every response is compared with an undisturbed run's, and with what an earlier life of
the trainer had (`num_changed`); each rollout must have all of them (`num_lost`), once
(`num_doubled`). What takes too long hangs (`num_hung`), what ends by itself crashed
(`num_crashed`), and what is there at the end of all is left behind (`num_left_behind`).
`recovery_s` says by fault how long it took until all instances were up again. Files in
/dev/shm count as left behind whoever made them, so nothing else may use it meanwhile.

Expected: six zeros. A killed instance is back in the time that its start takes; a node
after that and `node_timeout_s`, which is 3 s here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from dataclasses import asdict

from common import ROOT, print_result, quantiles, result_line

COUNTS = ("lost", "doubled", "changed", "hung", "crashed", "left_behind")


def main() -> int:
    """Run the seeds and print; the status says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N")
    parser.add_argument("--num-events", type=int, metavar="N", help="faults a seed")
    parser.add_argument("--sim", action="store_true", help="simulated instances")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.integration.chaos import run_seed, undisturbed
    from tests.integration.chaos_settings import SIMULATED, Outcome, real

    settings = SIMULATED if args.sim else real()
    if os.geteuid():
        settings = settings.without_disk()
    if args.num_events is not None:
        settings = settings.with_events(args.num_events)
    outcome, began = Outcome(), time.monotonic()
    expected = undisturbed(settings)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        asyncio.run(run_seed(seed, settings, expected, outcome))
        told = ", ".join(f"{getattr(outcome, f'num_{n}')} {n}" for n in COUNTS)
        sys.stderr.write(f"seed {seed}: {told}\n")
    for note in outcome.notes:
        sys.stderr.write(f"{note}\n")
    figures = {f"num_{name}": getattr(outcome, f"num_{name}") for name in COUNTS} | {
        "num_seeds": args.seeds,
        "num_rollouts": outcome.num_rollouts,
        "num_responses": outcome.num_responses,
        "num_faults": outcome.faults.total(),
        "faults": dict(sorted(outcome.faults.items())),
        "recovery_s": {k: quantiles(v) for k, v in sorted(outcome.recovery_s.items())},
        "wall_s": round(time.monotonic() - began, 1),
        "notes": outcome.notes,
    }
    line = result_line("chaos", settings=asdict(settings), figures=figures)
    print_result(line, save_as=args.save)
    return 1 if outcome.num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
