"""An engine's wait for the server of its KV pool, which is started at the same time.

A server takes all its memory before it listens, which may last a minute for 100 GB, and
LMCache's connector ends an engine that finds no server. So the engine waits here, with
vLLM imported and nothing loaded yet; if nobody comes, it runs without a pool.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aseer.kv.settings import CONNECTOR, PORT_KEY
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger("aseer.instance")

_POOL_ARG = "kv_transfer_config"
# A server of 128 GiB, the most that is taken by default, writes to all its pages first.
_PATIENCE_S = 120.0
_PAUSE_S = 0.1


async def join_pool(
    args: Mapping[str, Any], patience_s: float = _PATIENCE_S
) -> dict[str, Any]:
    """An engine's arguments once its pool listens; without the pool if it does not."""
    pool: dict[str, Any] = args.get(_POOL_ARG) or {}
    is_ours = pool.get("kv_connector") == CONNECTOR
    if not is_ours or await _listens(
        pool["kv_connector_extra_config"][PORT_KEY], patience_s
    ):
        return dict(args)
    _log.warning(
        "the KV pool's server does not listen after %g s: this engine runs without a "
        "pool until it is started again",
        patience_s,
    )
    return {name: value for name, value in args.items() if name != _POOL_ARG}


async def _listens(port: int, patience_s: float) -> bool:
    clock = WakingClock(2 * _PAUSE_S)
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if clock.read() > patience_s:
                return False
            await asyncio.sleep(_PAUSE_S)
            continue
        writer.close()
        return True
