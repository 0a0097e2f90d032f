"""A trainer on a host of its own: a rollout for each line that it is told.

Says `open`; for each rollout `first` with its first response, and then a line of JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from typing import Any

import aseer
from tests.integration.sims import config_of, content, groups_of

LONG = {"ignore_eos": True, "max_tokens": 600}
GROUPS = 8


def digest(responses: list[aseer.Response]) -> str:
    """Of what was generated."""
    items = sorted(content(responses).items())
    return hashlib.sha256(repr(items).encode()).hexdigest()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def main(settings: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    async with aseer.Engine(config_of(**settings)) as engine:
        say("open")
        while await loop.run_in_executor(None, sys.stdin.readline):
            rollout = engine.rollout(
                [*groups_of(GROUPS, **LONG), *groups_of(100, n=1, max_tokens=2)[99:]]
            )
            responses = []
            async for response in rollout:
                if response.group_id == "g99":
                    say("first")
                else:
                    responses.append(response)
            report = rollout.report
            assert report is not None
            said = {
                "digest": digest(responses),
                "num_responses": len({r.request_id for r in responses}),
                "num_retries": report.num_retries,
                "nodes": sorted({info.node for info in engine.instances}),
            }
            say(json.dumps(said))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
