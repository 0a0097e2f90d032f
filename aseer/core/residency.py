"""Which instances still hold the KV of a request that is waiting: an estimate.

When a chunk ends, its blocks stay in the engine's prefix cache until other requests
need the room, oldest first. The controller knows what it has dispatched since, so it
can tell how many of a request's tokens are likely still there without asking: a list an
instance, oldest first, is kept in C++ (`csrc/residency.h`). The estimate only steers
placement; what was really found is reported by the engine with each chunk.

         blocks of an instance
    |<---- reserved by chunks ---->|<- cached, newest ... oldest ->|
    a new reservation pushes out the oldest

Where instances have a KV pool, what a chunk computed is there, too, up to a multiple of
its granularity, and loading it costs a share of computing it (`move_price`): all
instances of that pool then hold it at a discount. A pool may span nodes; what it costs
to load what another node stored has a price of its own (`node_price`). The instances
are not enumerated: `Holders` names pool and node, and those of the pool's instances
that hold more than it is worth.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from aseer.core._native import DEFAULT_MOVE_PRICE, PrefixCaches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aseer.types import InstanceId, RequestId

__all__ = ["DEFAULT_MOVE_PRICE", "NOWHERE", "NO_POOL", "Holders", "KvResidency"]

NO_POOL = -1
"""The pool of instances that have none."""


class Holders(NamedTuple):
    """Where a request's KV probably is.

    Attributes:
        tokens: by instance that holds some itself; of the pool's instances only those
            that hold more than the pool is worth there.
        num_pooled: what every other instance of the pool on the node that stored them
            is taken to hold: the tokens in the pool, less the price of loading them.
            0 = it has none.
        num_far: the same for the pool's instances on other nodes.
        node: number of the node that stored them.
    """

    tokens: Mapping[InstanceId, int]
    num_pooled: int = 0
    pool: int = NO_POOL
    num_far: int = 0
    node: int = 0


NOWHERE = Holders({})
"""No instance holds any."""

# What `Holders(*fields)` does, in a third of the time: it is asked for each decision.
_holders: Callable[[Iterable[object]], Holders] = partial(tuple.__new__, Holders)


class KvResidency:
    """Tokens of waiting requests that each instance's prefix cache probably holds."""

    def __init__(self) -> None:
        self._caches = PrefixCaches()
        self._pool_of: Callable[[InstanceId], int] = lambda _: NO_POOL
        # By instance: its KV blocks that keep a piece of `block_size` tokens. What is
        # counted natively are pieces.
        self._blocks_each: dict[InstanceId, int] = {}
        self._handles: dict[RequestId, int] = {}

    @property
    def move_price(self) -> float:
        """What loading a token from a pool costs, as a share of computing it."""
        return self._caches.move_price

    @property
    def node_price(self) -> float:
        """The same, where another node stored it."""
        return self._caches.node_price

    def set_prices(self, within: float, between: float) -> None:
        """Set `move_price` and `node_price`."""
        self._caches.move_price = within
        self._caches.node_price = between

    def use_pool(self, granularity: int, pool_of: Callable[[InstanceId], int]) -> None:
        """What is computed from now on is in a pool, too.

        Args:
            granularity: tokens found together.
            pool_of: tells instances of different pools apart, by numbers from 0.
        """
        pools = {instance_id: pool_of(instance_id) for instance_id in self._blocks_each}
        self._caches.set_granularity(granularity)
        for instance_id, pool in pools.items():
            self._caches.set_pool(instance_id, pool)
        self._pool_of = pool_of

    def pool_of(self, instance_id: InstanceId) -> int:
        """The pool an instance has a share in; -1 = none."""
        return self._pool_of(instance_id)

    def add_instance(
        self,
        instance_id: InstanceId,
        num_blocks: int,
        block_size: int,
        blocks_each: int = 1,
        node: int = 0,
    ) -> None:
        """An empty cache, also for an instance that came back.

        Args:
            num_blocks: KV blocks; 0 = it keeps nothing of what has run.
            block_size: tokens that are found again together.
            blocks_each: KV blocks that keep them, of all groups of the model's layers.
            node: number of the host that it runs on.
        """
        self._caches.add_instance(
            instance_id,
            num_blocks=num_blocks // blocks_each,
            block_size=block_size,
            pool=self._pool_of(instance_id),
            node=node,
        )
        self._blocks_each[instance_id] = blocks_each

    def drop_instance(self, instance_id: InstanceId) -> None:
        """Forget an instance that is gone."""
        self._caches.drop_instance(instance_id)
        self._blocks_each.pop(instance_id, None)

    def holders(self, request_id: RequestId) -> Holders:
        """Who holds tokens of the request."""
        handle = self._handles.get(request_id)
        return NOWHERE if handle is None else _holders(self._caches.holders(handle))

    def reserve(
        self, instance_id: InstanceId, request_id: RequestId, num_blocks: int
    ) -> None:
        """A chunk starts: its own cached blocks are used, others' pushed out."""
        num_pieces = self._num_pieces(instance_id, num_blocks)
        self._caches.reserve(instance_id, self._handles.get(request_id, -1), num_pieces)

    def release(
        self,
        instance_id: InstanceId,
        request_id: RequestId,
        num_blocks: int,
        num_tokens: int,
    ) -> None:
        """A chunk ended with `num_tokens` tokens computed; 0 = the request is
        finished.
        """
        handle = self._handles.get(request_id)
        if handle is None:
            handle = self._handles[request_id] = self._caches.open()
        num_pieces = self._num_pieces(instance_id, num_blocks)
        self._caches.release(instance_id, handle, num_pieces, num_tokens)

    def forget(self, request_id: RequestId) -> None:
        """The request is finished: nobody will ask for its KV."""
        handle = self._handles.pop(request_id, None)
        if handle is not None:
            self._caches.close(handle)

    def _num_pieces(self, instance_id: InstanceId, num_blocks: int) -> int:
        """Pieces that so many reserved blocks could keep, rounded up."""
        return -(-num_blocks // self._blocks_each.get(instance_id, 1))
