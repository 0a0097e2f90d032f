"""A trainer whose requests move to another engine after each of their chunks.

It runs a rollout for each line that it is told, says `first` with the first response,
and then a line of JSON: what was generated, and where.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import aseer
from aseer import scheduler
from tests.e2e.pair.test_exactness import CASES, PROMPTS
from tests.e2e.placing import elsewhere
from tests.e2e.tiny import tiny_config

# Cases that divide, one that does not, and one that is over at once.
NAMES = ("short", "ignore_eos", "min_tokens", "presence", "stop_token")


def groups() -> list[aseer.Group]:
    return [
        aseer.Group(prompt, n=2, sampling=CASES[name], group_id=f"{name}-{i}")
        for name in NAMES
        for i, prompt in enumerate(PROMPTS)
    ]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def roll(engine: aseer.Engine) -> dict[str, Any]:
    names = {info.instance_id: info.node for info in engine.instances}
    rollout = engine.rollout_sync(groups())
    responses = []
    for response in rollout:
        if not responses:
            say("first")
        responses.append(response)
    report = rollout.report
    assert report is not None
    return {
        "num_migrations": report.num_migrations,
        "num_preemptions": report.num_preemptions,
        "num_retries": report.num_retries,
        "nodes": sorted({names[i] for r in responses for i in r.metrics.instances}),
        "responses": {
            r.request_id: {
                "token_ids": r.token_ids,
                "logprobs": r.logprobs,
                "text": r.text,
                "finish_reason": r.finish_reason,
                "error": r.error,
            }
            for r in responses
        },
    }


def main(settings: dict[str, Any]) -> None:
    scheduler.place_by_affinity = elsewhere
    with aseer.Engine(tiny_config(**settings)) as engine:
        say("open")
        for _ in sys.stdin:
            say(json.dumps(roll(engine)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
