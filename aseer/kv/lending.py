"""A pool server's memory, as what gives KV to other nodes and takes theirs wants it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from lmcache.v1.distributed.error import L1Error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aseer.kv.messages import Pull
    from aseer.kv.peers import Want


class L1Store:
    """See `aseer.kv.peers.Store`; LMCache's calls may come from any thread."""

    def __init__(
        self,
        manager: Any,
        layouts: Any,
        keys_of: Callable[[Any], list[Any]],
        in_dram: Callable[[set[Any]], set[Any]],
        pulling: set[Any],
    ) -> None:
        """The store of a server with one L1.

        Args:
            manager: its `L1Manager`. layouts: its registry of them.
            in_dram: which of some keys are there.
            pulling: is kept to the keys that are being written here.
        """
        self._manager = manager
        self._layouts = layouts
        self._keys_of = keys_of
        self._in_dram = in_dram
        self._pulling = pulling

    def layout(self, model: str, world_size: int) -> str | None:
        """See `Store`."""
        layouts = self._layouts.find_group_layout_descs(model, world_size)
        return None if not layouts else repr(sorted(layouts.items()))

    def keys(self, what: Pull | Want) -> list[Any]:
        """See `Store`."""
        return self._keys_of(what)

    def missing(self, keys: Sequence[Any]) -> list[int]:
        """See `Store`."""
        here = self._in_dram(set(keys))
        return [i for i, key in enumerate(keys) if key not in here]

    def lend(self, keys: Sequence[Any]) -> dict[int, memoryview]:
        """See `Store`."""
        found = self._manager.reserve_read(list(keys))
        return {
            i: _view(memory)
            for i, key in enumerate(keys)
            if (memory := found[key][1]) is not None
        }

    def take_back(self, keys: Sequence[Any]) -> None:
        """See `Store`."""
        if keys:
            self._manager.finish_read(list(keys))

    def reserve(self, order: Pull, keys: Sequence[Any]) -> dict[int, memoryview]:
        """See `Store`."""
        layouts = self._layouts.find_group_layout_descs(order.model, order.world_size)
        numbered = sorted(enumerate(keys), key=lambda each: each[1].object_group_id)
        reserved: dict[int, memoryview] = {}
        for group, each in itertools.groupby(numbered, lambda n: n[1].object_group_id):
            mine = list(each)
            found = self._manager.reserve_write(
                [key for _, key in mine],
                [False] * len(mine),
                layouts[group],
                _tag(order),
            )
            for i, key in mine:
                error, memory = found[key]
                if error == L1Error.SUCCESS and memory is not None:
                    reserved[i] = _view(memory)
        self._pulling.update(keys[i] for i in reserved)
        return reserved

    def settle(self, order: Pull, here: Sequence[Any], failed: Sequence[Any]) -> None:
        """See `Store`."""
        if here:
            self._manager.finish_write(list(here), tag=_tag(order))
        if failed:
            self._manager.finish_write_and_delete(list(failed), tag=_tag(order))
        self._pulling.difference_update(here, failed)


def _tag(order: Pull) -> str:
    """By which LMCache keeps writers apart."""
    return f"aseer-pull-{order.pull}"


def _view(memory: Any) -> memoryview:
    # What LMCache gives has a format that Python does not write bytes to.
    view: memoryview = np.frombuffer(memory.byte_array, np.uint8).data
    return view
