"""The capacity of the instances: KV blocks reserved and requests running.

`Fleet` keeps what instances say of themselves; capacity is counted in C++
(`csrc/fleet.h`), one row an instance, so that a decision over a thousand instances is a
pass over an array; what a decision compares, the room left and the load, is kept up to
date with each reservation. Invariant I3: the reservations on an instance never exceed
its KV blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.core._native import Capacity

if TYPE_CHECKING:
    from aseer.types import InstanceId, InstanceInfo

__all__ = ["Fleet"]


class Fleet(Capacity):
    """Instances by id, what each has free, and a selection among them."""

    def __init__(self) -> None:
        super().__init__()
        self._infos: dict[InstanceId, InstanceInfo] = {}
        self._nodes: dict[str, int] = {}  # numbers of hosts, by name

    @property
    def num_nodes(self) -> int:
        """Hosts of which an instance was up at some time."""
        return len(self._nodes)

    def info(self, instance_id: InstanceId) -> InstanceInfo:
        """What the instance said of itself.

        Raises:
            KeyError: it never was up.
        """
        return self._infos[instance_id]

    def add(self, info: InstanceInfo, pool: int = -1) -> None:
        """An instance came up (or came back), with nothing running.

        Args:
            pool: instances of the same one share KV; -1 = it has none.

        Raises:
            ValueError: it is up already.
        """
        try:
            self.add_instance(
                info.instance_id,
                pool=pool,
                node=self._nodes.setdefault(info.node, len(self._nodes)),
                num_kv_blocks=info.num_kv_blocks,
                block_size=info.block_size,
                num_lookahead_tokens=info.num_lookahead_tokens,
                max_num_seqs=info.max_num_seqs,
                kv_groups=[
                    (
                        group.block_size,
                        -1 if group.max_blocks is None else group.max_blocks,
                        group.num_extra_blocks,
                    )
                    for group in info.kv_groups
                ],
            )
        except ValueError as error:
            raise ValueError(f"instance {info.instance_id}: {error}") from None
        self._infos[info.instance_id] = info
