"""A trainer whose engine spans hosts; it is told what to do, a line each.

At "go" it runs a rollout, says `first` with the first response, and then a line of
JSON: what was generated, and where. Any other line is a model whose weights it takes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import aseer
from tests.e2e.test_ranks import groups_of
from tests.e2e.tiny import tiny_config


def groups() -> list[aseer.Group]:
    """Responses of some seconds, and one that is finished long before them."""
    early = aseer.Group([5, 6, 7], n=1, group_id="early", sampling={"max_tokens": 2})
    return [*groups_of(4, 260), early]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def roll(engine: aseer.Engine) -> dict[str, Any]:
    rollout = engine.rollout_sync(groups())
    responses = []
    for response in rollout:
        if response.group_id == "early":
            say("first")
        else:
            responses.append(response)
    report = rollout.report
    assert report is not None
    return {
        "num_retries": report.num_retries,
        "instances": [(info.node, info.pid) for info in engine.instances],
        "responses": {
            r.request_id: (r.token_ids, r.logprobs, r.error) for r in responses
        },
    }


def main(settings: dict[str, Any]) -> None:
    with aseer.Engine(tiny_config(**settings)) as engine:
        say("open")
        for line in sys.stdin:
            if line.strip() == "go":
                say(json.dumps(roll(engine)))
            else:
                engine.update_weights_sync(line.strip())
                say("updated")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
