"""Is anything lost when processes and connections of a cluster fail at random?

A trainer with a journal and two nodes do rollouts, on three instances (`--gangs`: and
three nodes, on an instance that spans two of them; `--pools`: with a KV pool's server
on each host, and simulated instances that store nothing there). Before each rollout the
engine is given new weights, whole or as what has changed, and one rollout in four is
cut short by an update. The trainer, the nodes' agents and the instances are killed
(SIGKILL) and stopped (SIGSTOP) for less and for more than the time-outs, and so are,
with real engines, vLLM's processes below them and the KV pools' servers; nodes are told
to end; their connections are cut for less and for more, reset and slowed down; the
journals' disk and a host's /dev/shm are full for a while (as root, who may mount one).
What is killed is started again. A seed decides what happens when. See
`tests/integration/chaos.py`.

Every response is compared with that of an undisturbed run with the weights that the
response names, which must be the rollout's (`num_changed`); each rollout must have all
of them (`num_lost`), once (`num_doubled`). An update that is refused must leave the
engine with what it had, which a further rollout shows. What takes too long hangs
(`num_hung`), what ends by itself crashed (`num_crashed`), and what is there at the end
of all is left behind (`num_left_behind`). `recovery_s` says by fault how long it took
until all instances were up again. Who is not root lets all of it share the machine's
/dev/shm, where files count as left behind whoever made them.

With `--seconds S` seeds follow one another for so long in one cluster, whose trainer
and first node last: they are stopped and cut off, and not killed. `watched` says what
the two processes have every ten seconds (memory, Python's objects, descriptors,
threads, their hosts' /dev/shm), and whether it is flat in the second half
(`num_growing` is not).

Expected: seven zeros. A killed instance is back in the time that its start
takes; a node after that and `node_timeout_s`, which is 3 s here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from dataclasses import asdict

from common import ROOT, print_result, quantiles, result_line

COUNTS = ("lost", "doubled", "changed", "hung", "crashed", "left_behind", "growing")


def main() -> int:
    """Run the seeds and print; the status says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N")
    parser.add_argument("--num-events", type=int, metavar="N", help="faults a seed")
    parser.add_argument("--sim", action="store_true", help="simulated instances")
    parser.add_argument(
        "--gangs", action="store_true", help="simulated instances that span nodes"
    )
    parser.add_argument(
        "--pools", action="store_true", help="simulated instances beside KV pools"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="for so long, seed after seed, in one cluster that lasts",
    )
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.integration.chaos import run_seed, undisturbed
    from tests.integration.chaos_settings import GANGS, POOLS, SIMULATED, Outcome, real

    if args.sim or args.gangs or args.pools:
        settings = GANGS if args.gangs else POOLS if args.pools else SIMULATED
    else:
        settings = real()
    if os.geteuid():
        settings = settings.without_mounts()
    if args.num_events is not None:
        settings = settings.with_events(args.num_events)
    outcome, began = Outcome(), time.monotonic()
    expected = undisturbed(settings)
    if args.seconds is not None:
        until_s, settings = time.monotonic() + args.seconds, settings.that_last()
        asyncio.run(run_seed(args.first_seed, settings, expected, outcome, until_s))
    else:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            asyncio.run(run_seed(seed, settings, expected, outcome))
            outcome.num_seeds += 1
            told = ", ".join(f"{getattr(outcome, f'num_{n}')} {n}" for n in COUNTS)
            sys.stderr.write(f"seed {seed}: {told}\n")
    for note in outcome.notes:
        sys.stderr.write(f"{note}\n")
    figures = {f"num_{name}": getattr(outcome, f"num_{name}") for name in COUNTS} | {
        "num_seeds": outcome.num_seeds,
        "num_rollouts": outcome.num_rollouts,
        "num_responses": outcome.num_responses,
        "num_cut_short": outcome.num_cut_short,
        "num_updates": outcome.num_updates,
        "num_refused": outcome.num_refused,
        "refusals": dict(outcome.refusals.most_common()),
        "num_faults": outcome.faults.total(),
        "faults": dict(sorted(outcome.faults.items())),
        "recovery_s": {k: quantiles(v) for k, v in sorted(outcome.recovery_s.items())},
        "watched": outcome.watched,
        "wall_s": round(time.monotonic() - began, 1),
        "notes": outcome.notes,
    }
    line = result_line("chaos", settings=asdict(settings), figures=figures)
    print_result(line, save_as=args.save)
    return 1 if outcome.num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
