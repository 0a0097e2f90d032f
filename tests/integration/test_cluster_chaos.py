"""Nodes, their instances and their connections fail at random: nothing is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

import aseer
from tests.integration.nodes import NodeProcess, Nodes, nodes_in
from tests.integration.proxy import Proxy, proxy_to
from tests.integration.sims import config_of, content, groups_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(240)

NODE_TIMEOUT_S = 3.0
NUM_EVENTS = 8
GROUPS = groups_of(12, ignore_eos=True, max_tokens=500)


class Chaos:
    """Two nodes behind proxies, to which something happens again and again."""

    def __init__(self, nodes: Nodes, proxies: list[Proxy], rng: random.Random) -> None:
        self._nodes = nodes
        self._proxies = proxies
        self._rng = rng
        self._running: list[NodeProcess | None] = [None] * len(proxies)
        self._num_started = 0

    def start(self, which: int) -> None:
        self._num_started += 1
        self._running[which] = self._nodes.start(
            f"n{which}-{self._num_started}",
            where=("--controller", self._proxies[which].endpoint),
            num_instances=1,
        )

    async def run(self) -> None:
        for _ in range(NUM_EVENTS):
            await asyncio.sleep(self._rng.uniform(0.1, 1.5))
            await self._happen(self._rng.randrange(len(self._proxies)))
        for proxy in self._proxies:
            proxy.heal()

    async def _happen(self, which: int) -> None:
        rng, proxy, node = self._rng, self._proxies[which], self._running[which]
        assert node is not None
        kind = rng.choice(["kill", "leave", "stop", "cut", "reset", "instance"])
        pause_s = rng.choice([0.3, 1.5, NODE_TIMEOUT_S + 3])
        if kind == "kill":
            node.kill()
            self.start(which)
        elif kind == "leave":
            node.signal(signal.SIGTERM)
            self.start(which)
        elif kind == "stop":
            node.signal(signal.SIGSTOP)
            await asyncio.sleep(pause_s)
            node.signal(signal.SIGCONT)
        elif kind == "cut":
            proxy.cut()
            await asyncio.sleep(pause_s)
            proxy.heal()
        elif kind == "reset":
            proxy.reset()
        else:
            below = psutil.Process(node.pid).children()
            if below:
                os.kill(rng.choice(below).pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 50))]
)
async def test_every_request_yields_one_response(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    with nodes_in(tmp_path) as nodes:
        config = nodes.config(
            min_nodes=2,
            node_timeout_s=NODE_TIMEOUT_S,
            max_restarts=100,
            max_request_retries=100,
            heartbeat_timeout_s=20.0,
        )
        async with (
            proxy_to(nodes.port) as one,
            proxy_to(nodes.port) as two,
            asyncio.TaskGroup() as tasks,
        ):
            chaos = Chaos(nodes, [one, two], rng)
            for which in range(2):
                chaos.start(which)
            async with aseer.Engine(config) as engine:
                failing = tasks.create_task(chaos.run())
                found = []
                while not failing.done():
                    found.append([r async for r in engine.rollout(GROUPS)])
                assert engine._host._pool.is_idle
                found.append([r async for r in engine.rollout(GROUPS)])
    async with aseer.Engine(config_of(chunk_size=0)) as engine:
        expected = content([r async for r in engine.rollout(GROUPS)])
    for responses in found:
        assert len(responses) == 4 * len(GROUPS)
        assert content(responses) == expected
