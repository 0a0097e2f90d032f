"""A node's KV pool, for a controller on another host (`aseer.node.base.NodePool`)."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import describe
from aseer.inputs.addresses import host_of
from aseer.kv.messages import (
    TO_POOL,
    DropOlder,
    Free,
    PeerSpec,
    PoolState,
    Prefetch,
    StartPool,
    StopPool,
    encode,
)
from aseer.kv.pool import STOP_GRACE_S, KvPool
from aseer.node.network import address_towards

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aseer.kv.messages import Pull
    from aseer.node.interpreter import Interpreter
    from aseer.node.leftovers import Leftovers
    from aseer.transport.keys import Keys

_log = logging.getLogger("aseer")

_STATE_INTERVAL_S = 0.5


class PoolAgent:
    """Has a pool once it is told to, and tells of it."""

    def __init__(
        self,
        log_dir: Path,
        leftovers: Leftovers,
        interpreter: Interpreter,
        keys: Keys | None,
    ) -> None:
        """Have none yet.

        Args:
            log_dir, leftovers, interpreter: as of `KvPool`.
            keys: of the cluster; None = it has none, and nodes' pools do not meet.
        """
        self._log_dir = log_dir
        self._leftovers = leftovers
        self._interpreter = interpreter
        self._keys = keys
        self._pool: KvPool | None = None
        self._is_wanted = asyncio.Event()
        self._controller: Callable[[], str]
        self._say: Callable[[bytes], None]

    def take(self, data: bytes) -> None:
        """See `NodePool`."""
        order = TO_POOL.decode(data)
        pool = self._pool
        if isinstance(order, StartPool):
            if pool is None:
                self._pool = KvPool(
                    order.plan,
                    order.num_instances,
                    self._log_dir,
                    self._leftovers,
                    self._interpreter,
                )
                self._is_wanted.set()
        elif pool is None:
            return
        elif isinstance(order, StopPool):
            pool.close()
        elif isinstance(order, Free):
            pool.free(order)
        elif isinstance(order, Prefetch):
            pool.prefetch(order)
        elif isinstance(order, DropOlder):
            pool.drop_older_soon(order.version)
        else:
            self._pull(pool, order)

    def _pull(self, pool: KvPool, order: Pull) -> None:
        source = at_controller(order.source, self._controller())
        done = pool.pull(msgspec.structs.replace(order, source=source))
        done.add_done_callback(lambda pulled: self._say(encode(pulled.result())))

    async def run(
        self, say: Callable[[bytes], None], controller: Callable[[], str]
    ) -> None:
        """See `NodePool`."""
        self._say, self._controller = say, controller
        while (pool := self._pool) is None:
            await self._is_wanted.wait()
        try:
            await self._open(pool, controller())
            pool.announce()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pool.run())
                tasks.create_task(_tell(pool, say))
        except Exception as error:  # a pool is never needed
            _log.exception("this node has no KV pool any more: %s", describe(error))
            await pool.stop(STOP_GRACE_S)
            say(encode(pool.state))  # engines start without it
        finally:
            await pool.stop(STOP_GRACE_S)

    async def _open(self, pool: KvPool, controller: str) -> None:
        if self._keys is not None:
            try:
                bind = await address_towards(controller)
            except OSError as error:
                _log.warning("this node gives no KV to others: %s", describe(error))
            else:
                pool.open(PeerSpec(bind, self._keys))


def at_controller(address: str, controller: str) -> str:
    """An address as this node reaches it: one that is all of a host's is the host's of
    the controller, which is the only one that listens so.
    """
    if host_of(address) not in ("0.0.0.0", "::"):
        return address
    return f"{controller.rpartition(':')[0]}:{address.rpartition(':')[2]}"


async def _tell(pool: KvPool, say: Callable[[bytes], None]) -> None:
    told: PoolState | None = None
    while True:
        if pool.state != told:
            told = pool.state
            say(encode(told))
        await asyncio.sleep(_STATE_INTERVAL_S)
