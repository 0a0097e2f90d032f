"""Which instances still hold the KV of a request that is waiting: an estimate.

When a chunk ends, its blocks stay in the engine's prefix cache until other requests
need the room, oldest first. The controller knows what it has dispatched since, so it
can tell how many of a request's tokens are likely still there without asking. The
estimate only steers placement; what was really found is reported by the engine with
each chunk.

         blocks of an instance
    |<---- reserved by chunks ---->|<- cached, newest ... oldest ->|
    a new reservation pushes out the oldest

Where instances have a KV pool, what a chunk computed is there, too, up to a multiple of
its granularity, and loading it costs a share of computing it (`move_price`): all
instances of that pool then hold it at a discount.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aseer.types import InstanceId, RequestId

DEFAULT_MOVE_PRICE = 0.1


class KvResidency:
    """Tokens of waiting requests that each instance's prefix cache probably holds."""

    def __init__(self) -> None:
        self._caches: dict[InstanceId, _Cache] = {}
        self._holders: dict[RequestId, dict[InstanceId, int]] = {}
        self._pool_of: Callable[[InstanceId], int] | None = None
        self._granularity = 1
        self._pooled: dict[RequestId, tuple[int, int]] = {}
        self.move_price = DEFAULT_MOVE_PRICE

    def use_pool(self, granularity: int, pool_of: Callable[[InstanceId], int]) -> None:
        """What is computed from now on is in a pool, too.

        Args:
            granularity: tokens found together.
            pool_of: tells instances of different pools apart.
        """
        self._granularity = granularity
        self._pool_of = pool_of

    def add_instance(
        self, instance_id: InstanceId, num_blocks: int, block_size: int
    ) -> None:
        """An empty cache, also for an instance that came back."""
        self.drop_instance(instance_id)
        self._caches[instance_id] = _Cache(num_blocks, block_size)

    def drop_instance(self, instance_id: InstanceId) -> None:
        """Forget an instance that is gone."""
        cache = self._caches.pop(instance_id, None)
        for request_id in cache.cached if cache else ():
            self._forget(request_id, instance_id)

    def holders(self, request_id: RequestId) -> Mapping[InstanceId, int]:
        """Tokens of the request by instance that holds some.

        A token in a pool counts as held by the pool's instances, less its price.
        """
        held = self._holders.get(request_id, {})
        if request_id not in self._pooled or self._pool_of is None:
            return held
        pool, pooled = self._pooled[request_id]
        found = int(pooled * (1 - self.move_price))
        near = {i: found for i in self._caches if self._pool_of(i) == pool}
        return near | {i: max(n, near.get(i, 0)) for i, n in held.items()}

    def reserve(
        self, instance_id: InstanceId, request_id: RequestId, num_blocks: int
    ) -> None:
        """A chunk starts: its own cached blocks are used, others' pushed out."""
        cache = self._caches[instance_id]
        cache.reserved += num_blocks
        cache.num_cached -= cache.cached.pop(request_id, 0)
        self._forget(request_id, instance_id)
        self._evict(instance_id, cache)

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
        cache = self._caches.get(instance_id)
        if cache is None:
            return
        cache.reserved -= num_blocks
        num_full = num_tokens // cache.block_size
        if num_full:
            cache.cached[request_id] = num_full
            cache.num_cached += num_full
            held = self._holders.setdefault(request_id, {})
            held[instance_id] = num_full * cache.block_size
        if num_tokens and self._pool_of is not None:
            pooled = num_tokens // self._granularity * self._granularity
            self._pooled[request_id] = (self._pool_of(instance_id), pooled)
        self._evict(instance_id, cache)

    def forget(self, request_id: RequestId) -> None:
        """The request is finished: nobody will ask for its KV."""
        self._pooled.pop(request_id, None)
        for instance_id in self._holders.pop(request_id, {}):
            cache = self._caches.get(instance_id)
            if cache is not None:
                cache.num_cached -= cache.cached.pop(request_id, 0)

    def _evict(self, instance_id: InstanceId, cache: _Cache) -> None:
        while cache.cached and cache.num_cached > cache.num_blocks - cache.reserved:
            request_id, num_blocks = cache.cached.popitem(last=False)
            cache.num_cached -= num_blocks
            self._forget(request_id, instance_id)

    def _forget(self, request_id: RequestId, instance_id: InstanceId) -> None:
        held = self._holders.get(request_id)
        if held is not None:
            held.pop(instance_id, None)
            if not held:
                del self._holders[request_id]


class _Cache:
    """One instance's prefix cache; `cached` is oldest first."""

    __slots__ = ("block_size", "cached", "num_blocks", "num_cached", "reserved")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reserved = 0
        self.num_cached = 0
        self.cached: OrderedDict[RequestId, int] = OrderedDict()
