"""A trainer whose requests move to another engine after each of their chunks, and what
the KV pools of its nodes did.

For each line that it is told it runs a rollout undivided, apart from all KV, and then
divided; it says `first` with the first response of the latter, and then, as a line of
JSON, whether they are equal, and figures.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict
from typing import Any

import aseer
from aseer import scheduler
from tests.e2e.cluster_trainer import say
from tests.e2e.placing import elsewhere
from tests.e2e.tiny import by_request, same, tiny_config, undivided

ROUNDING = 2e-5
CHUNK = 64


def groups_of(num: int, max_tokens: int) -> list[aseer.Group]:
    rng = random.Random(1)
    return [
        aseer.Group(
            [rng.randrange(5, 120) for _ in range(rng.randrange(50, 200))],
            n=1,
            group_id=f"g{i}",
            sampling={
                "temperature": 0.0,
                "ignore_eos": True,
                # The first is over while the others still move.
                "max_tokens": max_tokens if i else CHUNK,
            },
        )
        for i in range(num)
    ]


def roll(engine: aseer.Engine) -> dict[str, Any]:
    names = {info.instance_id: info.node for info in engine.instances}
    groups = groups_of(5, 700)
    expected = undivided(engine, groups)
    rollout = engine.rollout_sync(groups)
    responses, began_s = [], time.monotonic()
    for response in rollout:
        if not responses:
            say("first")
        responses.append(response)
    took_s = time.monotonic() - began_s
    found, is_exact = by_request(responses), True
    same(found, expected, rounding=ROUNDING)
    try:
        same(found, expected)
    except AssertionError:
        is_exact = False
    report = rollout.report
    assert report is not None
    assert report.kv is not None
    return {
        "is_exact": is_exact,
        "took_s": took_s,
        "nodes": sorted({names[i] for r in responses for i in r.metrics.instances}),
        "num_migrations": report.num_migrations,
        "num_node_migrations": report.num_node_migrations,
        "num_recomputed_tokens": report.num_recomputed_tokens,
        "num_retries": report.num_retries,
        "kv": asdict(report.kv),
    }


def main(settings: dict[str, Any]) -> None:
    scheduler.place_by_affinity = elsewhere
    with aseer.Engine(tiny_config(**settings)) as engine:
        say("open")
        for _ in sys.stdin:
            say(json.dumps(roll(engine)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
