"""Nonsense at a controller's port costs whoever sends it, and nobody else (I10).

A stranger sends bytes; who has the key sends frames, most of them nearly right. No
exception escapes, nothing grows, and a node that comes then does its work.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import secrets
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pytest

import aseer
from aseer.errors import AseerError
from aseer.node.machine import this_machine
from aseer.node.messages import (
    AskDrafts,
    Ended,
    Fetched,
    FromPeer,
    GetBlock,
    Gives,
    Join,
    Leave,
    PeerGone,
    PeerLost,
    encode,
)
from aseer.transport.base import PROTOCOL_VERSION
from aseer.transport.keys import derive_keys
from aseer.transport.sessions import FRAME, Frame
from aseer.transport.tcp import connect_tcp
from tests.integration.nodes import KEY, Nodes, nodes_in
from tests.integration.sims import config_of, content, groups_of
from tests.unit.transport.test_fuzz import Nonsense
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

NUMS = [8_000, pytest.param(1_000_000, marks=pytest.mark.slow)]
FRAMES_A_CONNECTION = 200
# What the interpreter and the allocator keep between two looks.
MAX_GROWN_OBJECTS = 5_000
MAX_GROWN_BYTES = 64 << 20
HEADER = struct.Struct("<QQQ")
RAW = msgspec.Raw
FROM = [
    lambda n: Ended(n.bytes(), n.number(), n.text(), n.text()),
    lambda n: FromPeer(n.bytes(), RAW(encode(n.value(2)))),
    lambda n: PeerGone(n.bytes()),
    lambda n: PeerLost(n.bytes(), n.text()),
    lambda n: Gives(n.text()),
    lambda n: GetBlock(n.text(), n.number(), n.number(), n.number()),
    lambda n: Fetched(n.text(), n.text()),
    lambda n: AskDrafts(n.bytes(), RAW(encode(n.value(2)))),
    lambda n: Leave(n.text()),
]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    logging.disable(logging.CRITICAL)
    try:
        with nodes_in(tmp_path) as nodes:
            yield nodes
    finally:
        logging.disable(logging.NOTSET)


def a_join() -> Join:
    return Join(
        protocol=PROTOCOL_VERSION,
        version=aseer.__version__,
        name="nonsense",
        machine=this_machine({}),
        packages={},
        num_instances=1,
        endpoint="ipc:///nowhere",
        drafts="ipc:///nowhere",
        log_dir="/nowhere",
        weights_dir="/nowhere",
    )


def frames_of(nonsense: Nonsense) -> Iterator[Frame]:
    """Of one connection: a session that begins, mostly a node's, and what it says."""
    rng, session, number = nonsense._rng, secrets.randbits(63) | 1, 0
    yield Frame(HEADER.pack(session, 0, 0), b"N")
    if rng.random() < 0.7:
        number = 1
        yield Frame(HEADER.pack(session, number, 0), encode(a_join()))
    for _ in range(FRAMES_A_CONNECTION):
        header = [session, 0, rng.choice([0, 0, nonsense.number() % 2**64])]
        payload = b"".join(nonsense.frames())
        match rng.randrange(6):
            case 0:
                payload = rng.choice([b"N", b"H", b"W", b"A", b"S", b"X", b"S" * 9])
            case 1:
                header[0] = rng.choice([0, 1, nonsense.number() % 2**64])
            case 2:
                header[1] = nonsense.number() % 2**64
            case _:
                number += 1
                header[1] = number
        packed = HEADER.pack(*header)
        yield Frame(packed if rng.random() < 0.98 else nonsense.bytes(), payload)


async def shower(address: str, num: int, seed: int) -> None:
    """So many frames of somebody who has the key."""
    keys = derive_keys(KEY.encode())
    nonsense = Nonsense(seed, FROM)  # type: ignore[arg-type]
    for _ in range(0, num, FRAMES_A_CONNECTION):
        with suppress(AseerError):
            identity = b"a" + secrets.token_bytes(8)
            async with connect_tcp(address, identity, FRAME, keys) as dealer:
                for frame in frames_of(nonsense):
                    await dealer.send(frame)


def shower_of_bytes(port: int, num: int, seed: int) -> None:
    """So many pieces of bytes of somebody who knows the port alone."""
    rng = random.Random(seed)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15 + 1 + 31)
    for _ in range(0, num, FRAMES_A_CONNECTION):
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=5) as stranger,
        ):
            if rng.random() < 0.7:
                stranger.sendall(greeting[: rng.choice([10, 64, 64])])
            for _ in range(FRAMES_A_CONNECTION):
                stranger.sendall(rng.randbytes(rng.choice([1, 2, 9, 100])))


def held() -> tuple[int, int, int]:
    """Objects, bytes and files of this process."""
    gc.collect()
    memory = psutil.Process().memory_info().rss
    return len(gc.get_objects()), memory, len(os.listdir("/proc/self/fd"))


async def settled(engine: aseer.Engine) -> tuple[int, int, int]:
    """What is held once all sessions of the shower are over."""
    cluster: Any = engine._host.cluster  # type: ignore[union-attr]
    await until(lambda: not (cluster._sessions._open or cluster.nodes))
    await asyncio.sleep(1.0)
    return held()


@pytest.mark.parametrize("num", NUMS)
@pytest.mark.parametrize("who", ["key holder", "stranger"])
async def test_nonsense_costs_nobody_else_anything(
    nodes: Nodes, who: str, num: int
) -> None:
    groups = groups_of(4, ignore_eos=True, max_tokens=300)
    config = nodes.config(num_instances=1, min_nodes=0, node_timeout_s=2.0)
    async with aseer.Engine(config) as engine:

        async def send(num: int, seed: int) -> None:
            if who == "stranger":
                await asyncio.to_thread(shower_of_bytes, nodes.port, num, seed)
            else:
                await shower(nodes.address, num, seed)

        await send(num // 5, 1)
        before = await settled(engine)
        during = []
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(send(num, 2))
            while not sending.done():
                during.append(content([r async for r in engine.rollout(groups)]))
        after = await settled(engine)
        assert after[0] - before[0] < MAX_GROWN_OBJECTS
        assert after[1] - before[1] < MAX_GROWN_BYTES
        assert after[2] - before[2] < 10
        nodes.start("good", num_instances=1)
        await until(lambda: len(engine.instances) == 2)
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
