"""Which instances still hold the KV of a request that is waiting: an estimate.

When a chunk ends, its blocks stay in the engine's prefix cache until other requests
need the room, oldest first. The controller knows what it has dispatched since, so it
can tell how many of a request's tokens are likely still there without asking:
`KvResidency` (C++, `csrc/residency.h`) keeps a list an instance, oldest first. The
estimate only steers placement; what was really found is reported by the engine with
each chunk.

         blocks of an instance
    |<---- reserved by chunks ---->|<- cached, newest ... oldest ->|
    a new reservation pushes out the oldest

Where instances have a KV pool, what a chunk computed is there, too, up to a multiple of
its granularity, and loading it costs a share of computing it (`move_price`): all
instances of that pool then hold it at a discount.
"""

from aseer._core import DEFAULT_MOVE_PRICE, KvResidency

__all__ = ["DEFAULT_MOVE_PRICE", "KvResidency"]
