"""Sessions over TCP: exactly once over cuts; strangers are refused, in words."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest

from aseer.errors import ConfigError, EngineError
from aseer.transport.base import ConnectionLost, ConnectionRefused
from aseer.transport.keys import Keys, derive_keys
from aseer.transport.session import Session, SessionLost
from aseer.transport.sessions import FRAME, Frame, Sessions
from aseer.transport.tcp import bind_tcp, connect_tcp
from tests.integration.proxy import proxy_to
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = derive_keys(b"of these tests alone")
OTHERS = derive_keys(b"of some other cluster")


def session_to(
    endpoint: str, keys: Keys | None, timeout_s: float = 30.0, **settings: bool
) -> Session:
    connect: Callable[..., object] = lambda name: connect_tcp(  # noqa: E731
        endpoint, name, FRAME, keys
    )
    return Session(connect, timeout_s=timeout_s, heartbeat_s=0.25, **settings)  # type: ignore[arg-type]


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


@pytest.mark.parametrize("keys", [KEYS, None], ids=["encrypted", "plain"])
async def test_all_arrives_once_and_in_order_over_cuts(keys: Keys | None) -> None:
    """Connections are reset, or hang for shorter and for longer than it is noticed."""
    num, rng = 600, random.Random(3)
    up: list[bytes] = []
    down: list[bytes] = []
    over: list[str] = []
    sizes = [20, 2_000, 40_000]
    messages = [b"%06d" % i + bytes(rng.choice(sizes)) for i in range(num)]
    async with (
        asyncio.timeout(55),
        bind_tcp("tcp://127.0.0.1:*", FRAME, keys) as router,
        proxy_to(port_of(router.endpoint)) as proxy,
        asyncio.TaskGroup() as tasks,
    ):
        sessions = Sessions(router, timeout_s=30.0, heartbeat_s=0.25)
        session = session_to(proxy.endpoint, keys)
        running = [
            tasks.create_task(
                sessions.run(
                    lambda _, message: up.append(message),
                    lambda _, why: over.append(why),
                )
            ),
            tasks.create_task(session.run(down.append)),
        ]
        for i, message in enumerate(messages):
            session.put(message)
            if i == 0:
                await until(lambda: up)
            sessions.put(session._link.session, message)
            if i % 100 == 40:
                proxy.reset()
            if i % 100 == 80:
                proxy.cut()
                asyncio.get_running_loop().call_later(
                    rng.choice([0.05, 1.5]), proxy.heal
                )
            await asyncio.sleep(0.003)
        await until(lambda: len(up) == len(down) == num)
        for task in running:
            task.cancel()
    assert up == messages
    assert down == messages
    assert over == []
    assert session.num_connections > 3  # a slow machine takes several cuts for one


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (KEYS, OTHERS),
        (KEYS, None),
        # It knows the controller's key, but not a node's.
        (KEYS, Keys(KEYS.controller, OTHERS.node)),
    ],
    ids=["another key", "no key", "another node's key"],
)
async def test_a_node_without_the_key_is_refused_with_words_that_help(
    theirs: Keys, ours: Keys | None
) -> None:
    heard: list[object] = []
    async with (
        asyncio.timeout(20),
        bind_tcp("tcp://127.0.0.1:*", FRAME, theirs) as router,
        asyncio.TaskGroup() as tasks,
    ):
        sessions = Sessions(router, timeout_s=30.0)
        serving = tasks.create_task(
            sessions.run(lambda *m: heard.append(m), lambda *m: heard.append(m))
        )
        session = session_to(router.endpoint, ours)
        session.put(b"hello")
        with pytest.raises(ConnectionRefused, match=r"different keys.*`aseer key`"):
            await session.run(heard.append)
        serving.cancel()
    assert heard == []


async def test_a_send_ends_with_the_connection_that_it_waits_for() -> None:
    """Though nobody receives, who would be told of it."""
    async with (
        asyncio.timeout(20),
        bind_tcp("tcp://127.0.0.1:*", FRAME, KEYS) as router,
        asyncio.TaskGroup() as tasks,
    ):
        serving = tasks.create_task(router.run(lambda *_: None))
        with pytest.raises(ConnectionLost, match="different keys"):
            async with connect_tcp(router.endpoint, b"a", FRAME, OTHERS) as dealer:
                while True:
                    await dealer.send(Frame(b"header", b"payload"))
        serving.cancel()


async def test_where_nobody_listens_it_is_tried_until_the_time_is_over() -> None:
    async with bind_tcp("tcp://127.0.0.1:*", FRAME, KEYS) as router:
        endpoint = router.endpoint
    session = session_to(endpoint, KEYS, timeout_s=1.0)
    with pytest.raises(SessionLost, match=r"127\.0\.0\.1:\d+: nobody answers"):
        await session.run(print)
    assert session.num_connections > 1


async def test_a_proxy_whose_other_side_is_gone_is_no_wrong_key() -> None:
    """It takes connections and ends them, as if the controller had another key."""
    async with bind_tcp("tcp://127.0.0.1:*", FRAME, KEYS) as router:
        port = port_of(router.endpoint)
    async with proxy_to(port) as proxy:
        session = session_to(proxy.endpoint, KEYS, 3.0)
        with pytest.raises(SessionLost, match="is it a proxy"):
            await session.run(print)
        assert session.num_connections > 3


async def test_handshakes_that_break_off_are_no_wrong_key_once_it_was_right() -> None:
    """As the ends of a network that fails again and again see them."""
    async with (
        bind_tcp("tcp://127.0.0.1:*", FRAME, OTHERS) as router,
        asyncio.TaskGroup() as tasks,
    ):
        serving = tasks.create_task(Sessions(router, timeout_s=9.0).run(print, print))
        session = session_to(router.endpoint, KEYS, 3.0, keys_are_right=True)
        with pytest.raises(SessionLost, match="break before they are encrypted"):
            await session.run(print)
        serving.cancel()


async def test_strangers_bytes_cost_nothing() -> None:
    """Of someone who has no key and speaks no ZeroMQ, or only its greeting."""
    rng = random.Random(5)
    came: list[bytes] = []
    async with (
        asyncio.timeout(50),
        bind_tcp("tcp://127.0.0.1:*", FRAME, KEYS) as router,
        asyncio.TaskGroup() as tasks,
    ):
        sessions = Sessions(router, timeout_s=30.0)
        serving = tasks.create_task(
            sessions.run(lambda _, message: came.append(message), lambda *_: None)
        )
        greeting = bytes.fromhex("ff00000000000000017f03014355525645") + bytes(47)
        num_files = len(os.listdir("/proc/self/fd"))
        for i in range(200):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port_of(router.endpoint)
            )
            writer.write((greeting if i % 2 else b"") + rng.randbytes(500))
            writer.close()
        session = session_to(router.endpoint, KEYS)
        session.put(b"hello")
        talking = tasks.create_task(session.run(print))
        await until(lambda: came)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= num_files + 30)
        for task in (serving, talking):
            task.cancel()
    assert came == [b"hello"]


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:*", "tcp://[::]:*"])
async def test_others_cannot_be_listened_to_without_a_key(address: str) -> None:
    with pytest.raises(ConfigError, match=r"other machines.*no key.*`aseer key`"):
        async with bind_tcp(address, FRAME, None):
            pass
    with pytest.raises(ConfigError, match=r"other machines.*no key"):
        async with connect_tcp("tcp://10.1.2.3:5557", b"a", FRAME, None):
            pass


async def test_a_port_that_is_taken_is_named() -> None:
    async with bind_tcp("tcp://127.0.0.1:*", FRAME, KEYS) as router:
        with pytest.raises(
            EngineError, match=r"listen='tcp://127.*a port that is free"
        ):
            async with bind_tcp(router.endpoint, FRAME, KEYS):
                pass


async def test_ipv6_is_spoken() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    came: list[bytes] = []
    async with (
        asyncio.timeout(20),
        bind_tcp("tcp://[::1]:*", FRAME, KEYS) as router,
        asyncio.TaskGroup() as tasks,
    ):
        sessions = Sessions(router, timeout_s=30.0)
        session = session_to(router.endpoint, KEYS)
        session.put(b"hello")
        running = [
            tasks.create_task(
                sessions.run(lambda _, message: came.append(message), lambda *_: None)
            ),
            tasks.create_task(session.run(partial(print))),
        ]
        await until(lambda: came)
        for task in running:
            task.cancel()
