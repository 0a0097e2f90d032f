"""What does a decision cost with 1 million waiting requests and 1,000 instances?

Instances are filled with chunks of 125,000 groups of 8; then chunks end, one at a time,
until waiting requests have replaced each other many times over. With each end the
instance's capacity is released, the request put back (or its length learnt), free
capacity turned into assignments, and those started. The time of all that over the
number of assignments is the time of a *decision* (`us_per_decision`). It is measured on
the parts that decide: scheduler, waiting queue, fleet, length context, KV residency.

`controller_us_per_decision` is the same for the whole controller, which also takes in
reports, keeps every request's tokens and history, and builds the chunks and the
responses. Its tokens are scaled down so that they fit in memory.

`context-aware, one pool` has a KV pool that all instances share, so that all of them
hold a request's KV; `context-aware, nodes` has nodes of 8 instances with a pool each,
so that siblings stay near each other, too. `reporting_cores` is the share of a core
that a whole controller and its recorder take while 256 requests run on each of 1,000
instances and every instance reports new tokens of all of them four times a second
(`reporting.py`).

Expected: at most 50 us a decision for every policy, with a pool or without, since a
decision is two moves in a tree of 125,000 groups, two passes over arrays of 1,000
instances, and some thirty calls in Python; half as much again for the whole controller.
Reports take a quarter of a core: a million times a second a request's tokens grow, at a
tenth of a microsecond each, and a report as a whole costs some twenty.

The mix is that of long rollouts: siblings of similar length, 11 chunks a response on
average, instances short of KV rather than of places, so that most ends leave room that
is too small for the request whose turn it is. Every chunk end is an event of its own,
the dearest case (engines report several at once). Policies take turns, batch by batch.
The garbage collector runs as in any program. A decision is work of one thread, so its
time is that thread's CPU time, which other programs on the machine lengthen less than
the wall time that stands beside it. The headline is the slower policy's.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from common import print_result, quantiles, result_line
from deciding import SCALED, Controlling, Deciding, Settings, instances, smoke
from reporting import REPORTS_PER_S, Reporting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deciding import Arm, Cost

    from aseer.config import PolicyName

MEASURED: tuple[PolicyName, ...] = ("context-aware", "fcfs")
POOLED = "context-aware, one pool"
SPREAD = "context-aware, nodes"
INSTANCES_PER_NODE = 8
REPORTING_ROUNDS = 20


def _node_of(instance_id: int) -> int:
    return instance_id // INSTANCES_PER_NODE


def measure(arms: Mapping[str, Arm], settings: Settings) -> dict[str, Any]:
    """Figures by arm; the arms take turns."""
    for arm in arms.values():
        for _ in range(settings.warmup_batches):
            arm.batch(settings.events_per_batch)
        arm.num_events = arm.num_decisions = 0
    costs: dict[str, list[Cost]] = {policy: [] for policy in arms}
    for i in range(settings.num_batches):
        for policy in list(arms)[:: 1 if i % 2 else -1]:
            costs[policy].append(arms[policy].batch(settings.events_per_batch))
    return {
        policy: {
            "us_per_decision": quantiles([cost.cpu_us for cost in costs[policy]]),
            "wall_us_per_decision": quantiles([cost.wall_us for cost in costs[policy]]),
            "decisions_per_event": round(arm.num_decisions / arm.num_events, 3),
            "num_waiting": arm.num_waiting(),
            "num_running": arm.num_running(),
            "num_finished": arm.num_finished,
        }
        for policy, arm in arms.items()
    }


def measure_reports(settings: Settings) -> dict[str, Any]:
    """What a report costs while nothing ends."""
    arm = Reporting(
        (replace(info, num_kv_blocks=1 << 30) for info in instances(settings)),
        settings.max_tokens,
    )
    arm.round()  # every array's first tokens
    costs = [arm.round() for _ in range(REPORTING_ROUNDS)]
    return {
        "us_per_report": quantiles(costs),
        "reports_per_s": REPORTS_PER_S * settings.num_instances,
        "num_running": arm.num_running,
    }


def run(settings: Settings, scaled: Settings) -> dict[str, Any]:
    """All figures."""
    deciding = measure({p: Deciding(p, settings) for p in MEASURED}, settings)
    gc.collect()  # a million requests, before the next million
    policy = MEASURED[0]
    pooled = Deciding(policy, settings, pool_of=lambda _: 0)
    deciding |= measure({POOLED: pooled}, settings)
    del pooled
    gc.collect()
    spread = Deciding(policy, settings, pool_of=_node_of, node_of=_node_of)
    deciding |= measure({SPREAD: spread}, settings)
    del spread
    gc.collect()
    controlling = measure({policy: Controlling(policy, scaled)}, scaled)
    gc.collect()
    reporting = measure_reports(settings)
    slowest = max(
        (figures["us_per_decision"] for figures in deciding.values()),
        key=lambda cost: float(cost["median"]),
    )
    us_per_report = reporting["us_per_report"]["median"]
    return {
        "us_per_decision": slowest["median"],
        "us_per_decision_p10": slowest["p10"],
        "us_per_decision_p90": slowest["p90"],
        "controller_us_per_decision": controlling[policy]["us_per_decision"]["median"],
        "reporting_cores": round(us_per_report * reporting["reports_per_s"] / 1e6, 3),
        "policies": deciding,
        "controller": controlling,
        "reporting": reporting,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a small run, in seconds")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    settings, scaled = Settings(), SCALED
    if args.smoke:
        settings, scaled = smoke(settings), smoke(scaled)
    figures = run(settings, scaled)
    both = {"deciding": asdict(settings), "controller": asdict(scaled)}
    line = result_line("scheduler", settings=both, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
