"""A trainer for chaos: weights, and a rollout with a journal, for each line it is told.

A line is JSON: the rollout's number, the weights that it is to run with and their
version, and, if the rollout is to be cut short by an update, the `next` weights. The
trainer says what it has in lines of JSON: nodes and processes of its instances; each
response; each update that was made or refused; and the number, when the rollout is
over.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from contextlib import suppress
from typing import Any

import aseer
from tests.integration.counted import begin_to_count
from tests.integration.sims import config_of, groups_of
from tests.lazy import Lazy

torch = Lazy("torch")

_LOOK_INTERVAL_S = 0.05
_TELL_INTERVAL_S = 1.0
_RETRY_S = 0.2
_POOL_BYTES = 64 << 20
_NUM_NUMBERS = 1 << 20  # of the simulated engines' weights: four blocks on their way
SIM_WEIGHTS = {"w": [_NUM_NUMBERS]}
#: Weights that an engine starts with, beside those that are numbered from 0.
BASE = -1


def weights(told: dict[str, Any], which: int) -> Any:
    """Some of the weights that rollouts take turns with.

    Of simulated ones a fourth differs wholly from the others', and some numbers do.
    """
    if told["models"]:
        return told["models"][which]
    few = slice(1000 * which, 1000 * (which + 1))
    many = slice(_NUM_NUMBERS // 2, _NUM_NUMBERS * 3 // 4)
    values = torch.rand(_NUM_NUMBERS, generator=torch.Generator().manual_seed(0))
    values[few] += 1.0
    values[many] += which
    return {"w": values}


def use_pools() -> None:
    """Have real KV pools beside simulated engines, which know nothing of them: servers
    start, fail and end, and are told of what is free, and of what to pull.
    """
    import aseer.kv.pool
    import aseer.kv.remote
    import aseer.runtime.kv_pools
    import aseer.runtime.serving
    from aseer.kv.settings import PoolPlan

    plan = PoolPlan(
        num_servers=1,
        dram_bytes=_POOL_BYTES,
        disk_bytes=0,
        disk_dir=None,
        chunk_tokens=64,
        timeout_s=5.0,
        why="chaos",
    )
    modules: list[Any] = [aseer.runtime.kv_pools, aseer.runtime.serving]
    for module in modules:
        module.plan_kv_pool = lambda *_, **__: plan
    modules = [aseer.kv.pool, aseer.kv.remote]
    for module in modules:
        module.engine_args = lambda *_: {}


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
        args = {"weights": SIM_WEIGHTS}
        return config_of(**engine | settings, engine_args=args)
    from tests.e2e.tiny import tiny_config

    return tiny_config(**engine | settings)


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def say_response(r: aseer.Response, **more: Any) -> None:
    """A response; with all of its tokens, if it was cut short."""
    if r.finish_reason == "aborted":
        more["tokens"] = list(r.token_ids)
    version = r.weight_version
    say(id=r.request_id, digest=digest(r), error=r.error, version=version, **more)


async def tell_nodes(engine: aseer.Engine) -> None:
    """When they change, and now and again: it is time that shows what has not."""
    told, at_s = None, 0.0
    while True:
        up = sorted((info.node, info.pid) for info in engine.instances)
        if up != told or time.monotonic() - at_s > _TELL_INTERVAL_S:
            say(up=up)
            told, at_s = up, time.monotonic()
        await asyncio.sleep(_LOOK_INTERVAL_S)


class Trainer:
    """An engine, and what it does."""

    def __init__(self, engine: aseer.Engine, told: dict[str, Any]) -> None:
        self._engine = engine
        self._told = told
        self._work = groups(told["num_groups"], told["max_tokens"])

    async def roll(
        self, number: int, which: int, version: int, following: int | None
    ) -> None:
        """Do as a line says; an update that cuts a rollout short has `version` + 1."""
        await self._take(which, version)
        updating = None
        rollout = self._engine.rollout(self._work, journal=f"round-{number}")
        async with asyncio.TaskGroup() as tasks:
            async for response in rollout:
                say_response(response)
                if following is not None and updating is None:
                    updating = tasks.create_task(
                        self._take(following, version + 1, cuts_short=True)
                    )
        say(over=number)

    async def _take(
        self, which: int, version: int, *, cuts_short: bool = False
    ) -> None:
        """Give the engine weights: all of it has them then, or what it had before."""
        engine = self._engine
        pause: Any = "abort" if cuts_short else None
        while engine.weight_version < version:
            before = engine.weight_version
            try:
                source = weights(self._told, which)
                await engine.update_weights(source, version=version, pause=pause)
                say(updated=version)
            except (aseer.EngineError, aseer.WeightUpdateError) as error:
                assert engine.weight_version == before, "it is refused as a whole"
                say(refused=str(error))
                await asyncio.sleep(_RETRY_S)
                if not cuts_short:  # or the rollout is not over yet
                    await self._look()

    async def _look(self) -> None:
        """See what the engine generates after an update that was refused."""
        async for response in self._engine.rollout(self._work[:2]):
            say_response(response, is_look=True)


async def main(told: dict[str, Any]) -> None:
    begin_to_count()
    if told["pools"]:
        use_pools()
    loop = asyncio.get_running_loop()
    async with aseer.Engine(config_for(told["engine"])) as engine:
        trainer = Trainer(engine, told)
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(tell_nodes(engine))
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                await trainer.roll(*json.loads(line))
            telling.cancel()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        asyncio.run(main(json.loads(sys.argv[1])))
