"""An engine waits for its KV pool, which starts at the same time, or goes without."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from aseer.instance.vllm.joining import join_pool
from aseer.kv.settings import CONNECTOR, PORT_KEY


def args_of(port: int, connector: str = CONNECTOR) -> dict[str, Any]:
    config = {
        "kv_connector": connector,
        "kv_connector_extra_config": {PORT_KEY: port},
    }
    return {"model": "m", "kv_transfer_config": config}


def reserved() -> socket.socket:
    """A port that is taken, and at which nobody listens yet."""
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    return place


async def test_an_engine_that_is_sooner_waits_for_the_pools_server() -> None:
    with reserved() as place:
        args = args_of(place.getsockname()[1])
        async with asyncio.TaskGroup() as tasks:
            joining = tasks.create_task(join_pool(args))
            await asyncio.sleep(0.05)
            assert not joining.done()
            place.listen()
        assert joining.result() == args


async def test_an_engine_whose_server_never_listens_goes_without_the_pool() -> None:
    with reserved() as place:
        args = args_of(place.getsockname()[1])
        assert await join_pool(args, patience_s=0.0) == {"model": "m"}


async def test_other_connectors_and_none_are_not_waited_for() -> None:
    for args in (args_of(1, "MooncakeStoreConnector"), {"model": "m"}):
        assert await join_pool(args, patience_s=0.0) == args
