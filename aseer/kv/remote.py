"""The KV pool of a node on another host, as the controller has it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aseer.kv.messages import (
    FROM_POOL,
    DropOlder,
    PoolCounts,
    PoolState,
    Pulled,
    StartPool,
    StopPool,
    encode,
)
from aseer.kv.pool import engine_args, server_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from aseer.kv.messages import Free, Prefetch, Pull
    from aseer.kv.settings import PoolPlan


class RemotePool:
    """What `KvPool` is for this machine; the node keeps the servers up itself."""

    def __init__(
        self, plan: PoolPlan, num_instances: int, put: Callable[[bytes], None]
    ) -> None:
        """Have the node start it.

        Args:
            num_instances: of the node.
            put: sends what the node has the pool a message, as long as it is there.
        """
        self._plan = plan
        self._num_instances = num_instances
        self._put = put
        self._state = PoolState(PoolCounts(), 0, [])
        self._pulls: dict[int, asyncio.Future[Pulled]] = {}
        self.is_known = asyncio.Event()
        """Set once the node has told of its servers, or is gone."""
        if plan.num_servers:
            self._say(StartPool(plan, num_instances))
        else:
            self.is_known.set()

    def take(self, data: bytes) -> None:
        """Take what the node says of it."""
        message = FROM_POOL.decode(data)
        if isinstance(message, Pulled):
            self._pull_over(message)
        elif len(message.servers) == self._plan.num_servers:
            self._state = message
            self.is_known.set()

    def close(self) -> None:
        """See `KvPool`."""
        self._say(StopPool())

    def lose(self) -> None:
        """The node is gone."""
        self.is_known.set()
        for number in list(self._pulls):
            self._pull_over(Pulled(number, error="the node is gone"))

    def _pull_over(self, pulled: Pulled) -> None:
        done = self._pulls.pop(pulled.pull, None)
        if done is not None and not done.done():
            done.set_result(pulled)

    @property
    def state(self) -> PoolState:
        """See `KvPool`; as last heard."""
        return self._state

    @property
    def granularity(self) -> int:
        """See `KvPool`."""
        return self._plan.chunk_tokens

    @property
    def num_servers(self) -> int:
        """See `KvPool`."""
        return self._plan.num_servers

    @property
    def counts(self) -> PoolCounts:
        """See `KvPool`."""
        return self._state.counts

    @property
    def num_restarts(self) -> int:
        """See `KvPool`."""
        return self._state.num_restarts

    @property
    def prefetches(self) -> bool:
        """See `KvPool`."""
        return self._plan.disk_dir is not None

    def server_of(self, index: int) -> int:
        """See `KvPool`."""
        return server_of(index, self._num_instances, self._plan.num_servers)

    def engine_args(self, index: int) -> dict[str, Any]:
        """See `KvPool`."""
        return engine_args(self._plan, self._state.servers, self.server_of(index))

    def cause(self, index: int) -> str:
        """Where the log of an instance's server is, to be added to an error."""
        if not self._state.servers:
            return ""
        log = self._state.servers[self.server_of(index)].log
        return f"; the log of the KV pool there is {log}"

    def free(self, what: Free) -> None:
        """See `KvPool`."""
        self._say(what)

    def prefetch(self, what: Prefetch) -> None:
        """See `KvPool`."""
        self._say(what)

    def pull(self, order: Pull) -> asyncio.Future[Pulled]:
        """See `KvPool`."""
        done: asyncio.Future[Pulled] = asyncio.get_running_loop().create_future()
        self._pulls[order.pull] = done
        self._say(order)
        return done

    async def drop_older(self, version: int) -> None:
        """The node does so when it hears of it: see `KvPool`."""
        self._say(DropOlder(version))

    def _say(self, message: msgspec.Struct) -> None:
        self._put(encode(message))
