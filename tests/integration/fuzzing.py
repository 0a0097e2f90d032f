"""Nonsense for the ports of a cluster, of strangers and of those who have the key.

A stranger sends bytes; who has the key sends frames, most of them nearly right. What is
sent where is the same for the same seed, but for names of connections and sessions.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import psutil

import aseer
from aseer.errors import AseerError
from aseer.node.machine import this_machine
from aseer.node.messages import (
    AskDrafts,
    Block,
    Ended,
    Fetched,
    FromPeer,
    GetBlock,
    Gives,
    Join,
    Leave,
    NotYet,
    PeerGone,
    PeerLost,
    Reached,
    encode,
)
from aseer.transport.base import PROTOCOL_VERSION
from aseer.transport.keys import derive_keys
from aseer.transport.sessions import FRAME, Frame
from aseer.transport.tcp import connect_tcp
from tests.integration.nodes import KEY
from tests.unit.transport.test_fuzz import Nonsense
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAMES_A_CONNECTION = 200
HEADER = struct.Struct("<QQQ")
RAW = msgspec.Raw
_FROM_NODE = [
    lambda n: Ended(n.bytes(), n.number(), n.text(), n.text()),
    lambda n: FromPeer(n.bytes(), RAW(encode(n.value(2)))),
    lambda n: PeerGone(n.bytes()),
    lambda n: PeerLost(n.bytes(), n.text()),
    lambda n: Gives(n.text()),
    lambda n: Reached(n.text(), bool(n.below(2))),
    lambda n: GetBlock(n.text(), n.number(), n.number(), n.number()),
    lambda n: Fetched(n.text(), n.text()),
    lambda n: AskDrafts(n.bytes(), RAW(encode(n.value(2)))),
    lambda n: Leave(n.text()),
]
_FROM_NEIGHBOUR = [
    lambda n: GetBlock(n.text(), n.number(), n.number(), n.number()),
    lambda n: GetBlock("1", n.small(), n.number(), n.number(), bool(n.below(2))),
    lambda n: Block(n.text(), n.number(), n.number(), n.bytes(), n.bytes()),
    lambda n: NotYet(),
]


class Held(NamedTuple):
    """What a process has."""

    num_bytes: int
    num_files: int
    num_objects: int = 0

    @classmethod
    def by(cls, pid: int) -> Held:
        """By a process, by its id; Python's objects are known of this one alone."""
        if pid == os.getpid():
            gc.collect()
        process = psutil.Process(pid)
        num_objects = len(gc.get_objects()) if pid == os.getpid() else 0
        return cls(process.memory_info().rss, process.num_fds(), num_objects)


def a_join() -> Join:
    """Of a node that is not there."""
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


def _for_a_controller(nonsense: Nonsense) -> Iterator[Frame]:
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


def _for_a_node(nonsense: Nonsense) -> Iterator[msgspec.Raw]:
    """Of one connection: what nodes ask each other, or nearly."""
    for _ in range(FRAMES_A_CONNECTION):
        yield RAW(b"".join(nonsense.frames()))  # also what is no message at all


class Sending(NamedTuple):
    """Who sends nonsense where.

    Attributes:
        address: of a controller, or of the port where a node gives weights.
    """

    address: str
    is_node: bool
    has_key: bool


async def send_nonsense(sending: Sending, num: int, seed: int) -> None:
    """Send so many frames, or pieces of bytes, in a thread of its own."""
    if sending.has_key:
        await asyncio.to_thread(asyncio.run, _send_frames(sending, num, seed))
    else:
        port = int(sending.address.rpartition(":")[2])
        await asyncio.to_thread(_send_bytes, port, num, seed)


def address_of_node(engine: aseer.Engine) -> str:
    """Where an engine's only node gives weights to others."""
    cluster: Any = engine._host.cluster
    (node,) = cluster.nodes
    return str(node.weights._giver.address)


async def settled(engine: aseer.Engine) -> None:
    """Wait until an engine has one node, and all sessions of others are over."""
    cluster: Any = engine._host.cluster
    sessions = cluster._sessions._open
    await until(lambda: len(sessions) == len(cluster.nodes) == 1)
    await asyncio.sleep(1.0)


async def _send_frames(sending: Sending, num: int, seed: int) -> None:
    keys = derive_keys(KEY.encode())
    messages: list[Any] = _FROM_NEIGHBOUR if sending.is_node else _FROM_NODE  # type: ignore[assignment]
    frames_of = _for_a_node if sending.is_node else _for_a_controller
    nonsense = Nonsense(seed, messages)
    num_sent = 0
    while num_sent < num:
        with suppress(AseerError):
            identity = b"a" + secrets.token_bytes(8)
            async with connect_tcp(sending.address, identity, FRAME, keys) as dealer:
                for frame in frames_of(nonsense):
                    await dealer.send(frame)
                    num_sent += 1


def _send_bytes(port: int, num: int, seed: int) -> None:
    rng = random.Random(seed)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15 + 1 + 31)
    num_sent = 0
    while num_sent < num:
        with (
            suppress(OSError),  # mostly the connection is ended soon
            socket.create_connection(("127.0.0.1", port), timeout=5) as stranger,
        ):
            if rng.random() < 0.7:
                stranger.sendall(greeting[: rng.choice([10, 64, 64])])
            for _ in range(FRAMES_A_CONNECTION):
                stranger.sendall(rng.randbytes(rng.choice([1, 2, 9, 100])))
                num_sent += 1
