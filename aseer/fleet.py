"""The capacity of the instances: KV blocks reserved and requests running.

`Fleet` (C++, `csrc/fleet.h`) has one row an instance, so that a decision over a
thousand instances is a pass over an array; what a decision compares, the room left and
the load, is kept up to date with each reservation. Invariant I3: the reservations on an
instance never exceed its KV blocks.
"""

from aseer._core import Fleet

__all__ = ["Fleet"]
