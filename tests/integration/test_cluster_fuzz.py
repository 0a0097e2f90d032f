"""Nonsense at the ports of a cluster costs whoever sends it, and nobody else (I10).

A stranger sends bytes; who has the key sends frames, most of them nearly right, to a
controller, and to a node as another node would. No exception escapes, nothing grows,
and controller and node do their work. `bench/fuzz.py` sends a million of each.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

import pytest

import aseer
from aseer.node.messages import GetBlock, encode
from aseer.transport.keys import derive_keys
from aseer.transport.sessions import FRAME, Frame
from aseer.transport.tcp import connect_tcp
from tests.integration.fuzzing import (
    HEADER,
    Held,
    Sending,
    a_join,
    address_of_node,
    send_nonsense,
    settled,
)
from tests.integration.nodes import KEY, Nodes, nodes_in
from tests.integration.sims import config_of, content, groups_of
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

NUMS = [8_000, pytest.param(200_000, marks=pytest.mark.slow)]
# What the interpreter and the allocator keep between two looks.
MAX_GROWN_OBJECTS = 5_000
MAX_GROWN_BYTES = 64 << 20


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    logging.disable(logging.CRITICAL)
    try:
        with nodes_in(tmp_path) as nodes:
            yield nodes
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("num", NUMS)
@pytest.mark.parametrize("who", ["key holder", "stranger"])
@pytest.mark.parametrize("to", ["controller", "node"])
async def test_nonsense_costs_nobody_else_anything(
    nodes: Nodes, to: str, who: str, num: int
) -> None:
    groups = groups_of(4, ignore_eos=True, max_tokens=300)
    config = nodes.config(num_instances=1, node_timeout_s=2.0)
    node = nodes.start("good", num_instances=1)
    pids = (os.getpid(), node.pid)
    async with aseer.Engine(config) as engine:
        address = nodes.address if to == "controller" else address_of_node(engine)
        sending = Sending(address, is_node=to == "node", has_key=who == "key holder")
        await send_nonsense(sending, num // 5, seed=1)
        await settled(engine)
        before = [Held.by(pid) for pid in pids]
        during = []
        async with asyncio.TaskGroup() as tasks:
            sent = tasks.create_task(send_nonsense(sending, num, seed=2))
            while not sent.done():
                during.append(content([r async for r in engine.rollout(groups)]))
        await settled(engine)
        for old, pid in zip(before, pids, strict=True):
            new = Held.by(pid)
            assert new.num_objects - old.num_objects < MAX_GROWN_OBJECTS
            assert new.num_bytes - old.num_bytes < MAX_GROWN_BYTES
            assert new.num_files - old.num_files < 10
        assert node.is_running
        assert len(engine.instances) == 2
        late = content([r async for r in engine.rollout(groups)])
    async with aseer.Engine(config_of(chunk_size=0)) as engine:
        expected = content([r async for r in engine.rollout(groups)])
    assert all(found == expected for found in (*during, late))


@pytest.mark.parametrize(
    "asked", [(0, 1 << 62), (-1, 10), (1 << 63, 10), (0, -1), (0, 1 << 63)]
)
async def test_a_node_that_asks_for_a_block_that_cannot_be_loses_its_session(
    nodes: Nodes, asked: tuple[int, int]
) -> None:
    keys = derive_keys(KEY.encode())
    config = nodes.config(num_instances=1, min_nodes=0, node_timeout_s=2.0)
    async with aseer.Engine(config) as engine:
        async with connect_tcp(nodes.address, b"a12345678", FRAME, keys) as dealer:
            await dealer.send(Frame(HEADER.pack(7, 0, 0), b"N"))
            await dealer.send(Frame(HEADER.pack(7, 1, 0), encode(a_join())))
            await until(lambda: bool(engine._host.cluster.nodes))  # type: ignore[union-attr]
            block = encode(GetBlock("1", 0, *asked))
            await dealer.send(Frame(HEADER.pack(7, 2, 0), block))
            await until(lambda: not engine._host.cluster.nodes)  # type: ignore[union-attr]
        assert len([r async for r in engine.rollout(groups_of(1))]) == 4
