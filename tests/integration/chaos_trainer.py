"""A trainer for chaos: a rollout with a journal for each number that it is told.

Says what it has in lines of JSON: nodes and processes of its instances, whenever they
change; each response; and the number, when the rollout is over.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from contextlib import suppress
from typing import Any

import aseer
from tests.integration.sims import config_of, groups_of

_LOOK_INTERVAL_S = 0.05


def groups(num: int, max_tokens: int) -> list[aseer.Group]:
    """Of very different lengths, so that some are finished early."""
    made = []
    for i, group in enumerate(groups_of(num)):
        length = max_tokens * (1 + i % 4) // 4
        sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": length}
        made.append(aseer.Group(group.prompt, 4, sampling, group.group_id))
    return made


def digest(response: aseer.Response) -> str:
    """Of what was generated."""
    what = (response.token_ids, response.text, response.finish_reason)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def config_for(engine: dict[str, Any], **settings: Any) -> aseer.EngineConfig:
    """Of simulated engines, or, if a model is named, of real ones."""
    if "model" not in engine:
        return config_of(**engine | settings)
    from tests.e2e.tiny import tiny_config

    return tiny_config(**engine | settings)


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def tell_nodes(engine: aseer.Engine) -> None:
    told = None
    while True:
        up = sorted((info.node, info.pid) for info in engine.instances)
        if up != told:
            say(up=up)
            told = up
        await asyncio.sleep(_LOOK_INTERVAL_S)


async def main(settings: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    work = groups(settings["num_groups"], settings["max_tokens"])
    async with aseer.Engine(config_for(settings["engine"])) as engine:
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(tell_nodes(engine))
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                number = int(line)
                async for r in engine.rollout(work, journal=f"round-{number}"):
                    say(id=r.request_id, digest=digest(r), error=r.error)
                say(over=number)
            telling.cancel()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        asyncio.run(main(json.loads(sys.argv[1])))
