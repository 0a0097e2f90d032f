"""The capacity of the instances: KV blocks reserved and requests running, as arrays.

One row an instance, so that a decision over a thousand instances is a few vector
operations; what a decision compares (`_room`, `_load`) is kept up to date with each
reservation rather than computed anew. Invariant I3: the reservations on an instance
never exceed its KV blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aseer.types import InstanceId

if TYPE_CHECKING:
    from aseer.types import InstanceInfo

_IDLE = 1 << 40  # the room of an idle instance: one request may have all of it


class Fleet:
    """Instances by id, what each has free, and a selection among them."""

    def __init__(self) -> None:
        self._infos: dict[InstanceId, InstanceInfo] = {}
        self._free: list[int] = []
        self._running: list[int] = []
        self._max_seqs: list[int] = []  # 0 of a lost instance
        self._alive = np.zeros(0, bool)
        # Blocks a further request may take, 0 where none may come.
        self._room = np.zeros(0, np.int64)
        # Orders by chunks running, then by free KV.
        self._load = np.zeros(0, np.int64)
        self._block_size = np.zeros(0, np.int64)
        self._lookahead = np.zeros(0, np.int64)
        self._selected = np.zeros(0, bool)
        self._held: InstanceId | None = None
        self._most_room: int | None = 0  # of all instances; None = to be computed
        self._most_block_size = 1
        self._uniform = True  # all have the same block size and lookahead
        self.block_size = 1
        self.num_lookahead_tokens = 0

    def __len__(self) -> int:
        return int(self._alive.sum())

    def info(self, instance_id: InstanceId) -> InstanceInfo:
        """What the instance said of itself."""
        return self._infos[instance_id]

    def alive_ids(self) -> list[InstanceId]:
        """Ids of the instances that can take work, ascending."""
        return [InstanceId(int(i)) for i in np.flatnonzero(self._alive)]

    def add(self, info: InstanceInfo) -> None:
        """An instance came up (or came back), with nothing running.

        Raises:
            ValueError: it is up already.
        """
        i = info.instance_id
        if i < len(self._alive) and self._alive[i]:
            raise ValueError(f"instance {i} is up already")
        self._grow(i + 1 - len(self._alive))
        shape = (info.block_size, info.num_lookahead_tokens)
        same = shape == (self.block_size, self.num_lookahead_tokens)
        self._uniform = not self._infos or (self._uniform and same)
        self.block_size, self.num_lookahead_tokens = shape
        self._most_block_size = max(self._most_block_size, info.block_size)
        self._infos[i] = info
        self._alive[i] = True
        self._free[i] = info.num_kv_blocks
        self._running[i] = 0
        self._max_seqs[i] = info.max_num_seqs
        self._block_size[i], self._lookahead[i] = shape
        self._update(i)

    def _grow(self, by: int) -> None:
        if by <= 0:
            return
        self._free += [0] * by
        self._running += [0] * by
        self._max_seqs += [0] * by
        for name in ("_alive", "_room", "_load", "_selected", "_lookahead"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(by, old.dtype)]))
        self._block_size = np.concatenate([self._block_size, np.ones(by, np.int64)])

    def remove(self, instance_id: InstanceId) -> None:
        """The instance is gone, and all that ran there with it."""
        self._alive[instance_id] = False
        self._max_seqs[instance_id] = 0
        self._selected[instance_id] = False
        self._update(instance_id)

    # Reservations

    def reserve(self, instance_id: InstanceId, num_tokens: int) -> int:
        """Take a place for a chunk that ends with `num_tokens` tokens (0 = no KV).

        Returns:
            The reserved KV blocks, to be given back by `release`.
        """
        blocks = self._infos[instance_id].blocks_for(num_tokens) if num_tokens else 0
        assert blocks <= self._free[instance_id], "reservation beyond capacity"
        self._free[instance_id] -= blocks
        self._running[instance_id] += 1
        self._update(instance_id)
        return blocks

    def release(self, instance_id: InstanceId, num_blocks: int) -> None:
        """Give back what a chunk reserved; nothing to do if the instance is gone."""
        if self._alive[instance_id]:
            self._free[instance_id] += num_blocks
            self._running[instance_id] -= 1
            self._update(instance_id)

    def num_running(self, instance_id: InstanceId) -> int:
        """Chunks placed there that have not ended."""
        return self._running[instance_id]

    def num_free_blocks(self, instance_id: InstanceId) -> int:
        """KV blocks no chunk has reserved."""
        return self._free[instance_id]

    def _update(self, i: InstanceId) -> None:
        """Recompute an instance's room and load after a change of it."""
        running, free = self._running[i], self._free[i]
        if running >= self._max_seqs[i] or i == self._held:
            room = 0
        else:
            room = free if running else _IDLE
        most = self._most_room
        if most is not None and room >= most:
            self._most_room = room
        elif self._room[i] == most:
            self._most_room = None
        self._room[i] = room
        self._load[i] = (running << 32) - free

    # Selection

    def most_tokens(self) -> int:
        """A bound: no instance has room for a chunk that ends with more tokens."""
        if self._most_room is None:
            self._most_room = int(self._room[self._room.argmax()])
        return self._most_room * self._most_block_size

    def select(self, num_tokens: int) -> bool:
        """Candidates: instances with room for a chunk ending with that many tokens.

        Returns:
            Whether there is one.
        """
        if not self._uniform:
            blocks = -(-(num_tokens + self._lookahead) // self._block_size)
            np.greater_equal(self._room, blocks, out=self._selected)
            return bool(self._selected.any())
        num_blocks = -(-(num_tokens + self.num_lookahead_tokens) // self.block_size)
        np.greater_equal(self._room, num_blocks, out=self._selected)
        return num_blocks * self.block_size <= self.most_tokens()

    def select_alive(self) -> bool:
        """Candidates: every instance that is up; False if there is none."""
        self._selected[:] = self._alive
        return bool(self._alive.any())

    def is_selected(self, instance_id: InstanceId) -> bool:
        """Whether the last selection holds the instance."""
        return bool(self._selected[instance_id])

    def least_loaded(self) -> InstanceId:
        """The candidate running the fewest requests, then with the most free KV.

        Raises:
            ValueError: there is no candidate.
        """
        candidates = self._selected.nonzero()[0]
        if len(candidates) == 1:  # the usual case where instances are full
            return InstanceId(int(candidates[0]))
        return InstanceId(int(candidates[self._load[candidates].argmin()]))

    def hold_none(self) -> None:
        """Let every instance be a candidate again."""
        held, self._held = self._held, None
        if held is not None:
            self._update(held)

    def hold_freest(self) -> bool:
        """Keep the instance with the most room out of what follows, unless one is kept.

        Returns:
            Whether one is kept now that was not before.
        """
        if self._held is not None or not len(self._room):
            return False
        self._held = InstanceId(int(self._room.argmax()))
        self._update(self._held)
        return True
