"""Prompts whose KV siblings share while they run, so that it is reserved once.

With prefix caching an engine keeps one copy of the blocks in which its requests begin
alike, for as long as one of them runs. It is there for certain once a sibling has
generated a token since its chunk began: who starts after that *finds* it, and reserves
only what it has of its own. Those that start earlier may compute (or load) a copy each:
they *bring* one, and reserve it.

    reserved  =  each chunk's own blocks  +  copies x the prompt's full blocks

A copy ends with the chunk that brought it, but for one while others run that found it:
of equal blocks vLLM's block pool gives the one that it cached first, so they all use
the same. (Should its last user end before the engine admits a chunk that was to find
it, it is still cached, unless others needed the room in between; then one copy more is
made than is reserved, and at worst vLLM preempts.)
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from aseer.core._native import untracked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aseer.types import GroupId, InstanceId, RequestId


# Bits of a chunk: it found the prompt, it has generated a token since it began.
_FOUND, _BEGUN = 1, 2


class _Prompt:
    """One group's prompt on one instance.

    Attributes:
        chunks: of the requests that run here, the two bits above.
        is_kept: the copy that is found is no running chunk's own.
    """

    __slots__ = ("chunks", "is_kept", "num_begun", "num_blocks", "num_bringers")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.chunks: dict[RequestId, int] = untracked({})
        self.num_bringers = self.num_begun = 0
        self.is_kept = False
        untracked(self)

    @property
    def num_finders(self) -> int:
        return len(self.chunks) - self.num_bringers

    @property
    def num_copies(self) -> int:
        return self.num_bringers + self.is_kept

    def start(self, request_id: RequestId) -> bool:
        """A chunk is placed; whether it finds the prompt."""
        is_found = self.num_begun > 0
        self.chunks[request_id] = _FOUND if is_found else 0
        self.num_bringers += not is_found
        return is_found

    def begin(self, request_id: RequestId) -> None:
        """A chunk has its first token."""
        bits = self.chunks.get(request_id)
        if bits is not None and not bits & _BEGUN:
            self.chunks[request_id] = bits | _BEGUN
            self.num_begun += 1

    def end(self, request_id: RequestId) -> None:
        """A chunk is over; one that is not here is none."""
        bits = self.chunks.pop(request_id, None)
        if bits is not None:
            self.num_bringers -= not bits & _FOUND
            self.num_begun -= bool(bits & _BEGUN)


class SharedPrompts:
    """Copies of prompts by group and instance."""

    def __init__(self) -> None:
        # The same prompts by either; no event looks at more than its own group's, or
        # its own instance's.
        self._by_group: dict[GroupId, dict[InstanceId, _Prompt]] = defaultdict(dict)
        self._by_instance: dict[InstanceId, dict[GroupId, _Prompt]] = defaultdict(dict)

    def holders(self, group_id: GroupId) -> Iterator[InstanceId]:
        """Instances where the prompt is there for certain."""
        for instance_id, prompt in self._by_group.get(group_id, {}).items():
            if prompt.num_begun:
                yield instance_id

    def start(
        self,
        group_id: GroupId,
        instance_id: InstanceId,
        request_id: RequestId,
        num_blocks: int,
    ) -> bool:
        """A chunk is placed.

        Args:
            num_blocks: full blocks of its prompt.

        Returns:
            Whether it finds the prompt; else it brings one copy more.
        """
        here = self._by_group[group_id]
        prompt = here.get(instance_id)
        if prompt is None:
            prompt = here[instance_id] = _Prompt(num_blocks)
            there = self._by_instance[instance_id]
            there[group_id] = prompt
            for each in (here, there, self._by_group):
                untracked(each)
        return prompt.start(request_id)

    def begin(
        self, group_id: GroupId, instance_id: InstanceId, request_id: RequestId
    ) -> None:
        """A chunk has its first token: the prompt can be found now."""
        prompt = self._by_group.get(group_id, {}).get(instance_id)
        if prompt is not None:
            prompt.begin(request_id)

    def end(
        self, group_id: GroupId, instance_id: InstanceId, request_id: RequestId
    ) -> int:
        """A chunk is over; the blocks of the copy that ends with it."""
        prompt = self._by_group.get(group_id, {}).get(instance_id)
        if prompt is None:
            return 0
        num_before = prompt.num_copies
        prompt.end(request_id)
        is_orphan = prompt.num_copies < num_before and prompt.num_finders > 0
        prompt.is_kept = prompt.num_finders > 0 and (prompt.is_kept or is_orphan)
        num_freed = num_before - prompt.num_copies
        if not prompt.chunks:
            del self._by_instance[instance_id][group_id]
            self._forget(group_id, instance_id)
        return num_freed * prompt.num_blocks

    def drop_instance(self, instance_id: InstanceId) -> None:
        """The instance is gone, and all KV with it."""
        for group_id in self._by_instance.pop(instance_id, {}):
            self._forget(group_id, instance_id)

    def num_blocks(self, instance_id: InstanceId) -> int:
        """Blocks that all copies on an instance have reserved."""
        here = self._by_instance.get(instance_id, {})
        return sum(prompt.num_copies * prompt.num_blocks for prompt in here.values())

    def _forget(self, group_id: GroupId, instance_id: InstanceId) -> None:
        here = self._by_group[group_id]
        del here[instance_id]
        if not here:
            del self._by_group[group_id]
