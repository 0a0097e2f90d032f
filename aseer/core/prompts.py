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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aseer.types import GroupId, InstanceId, RequestId


@dataclass(slots=True)
class _Prompt:
    """One group's prompt on one instance.

    Attributes:
        begun: who has generated a token since its chunk began.
        is_kept: the copy that is found is no running chunk's own.
    """

    num_blocks: int
    bringers: set[RequestId] = field(default_factory=set)
    finders: set[RequestId] = field(default_factory=set)
    begun: set[RequestId] = field(default_factory=set)
    is_kept: bool = False

    @property
    def num_copies(self) -> int:
        return len(self.bringers) + self.is_kept


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
            if prompt.begun:
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
            self._by_instance[instance_id][group_id] = prompt
        is_found = bool(prompt.begun)
        (prompt.finders if is_found else prompt.bringers).add(request_id)
        return is_found

    def begin(
        self, group_id: GroupId, instance_id: InstanceId, request_id: RequestId
    ) -> None:
        """A chunk has its first token: the prompt can be found now."""
        prompt = self._by_group.get(group_id, {}).get(instance_id)
        if prompt is not None:
            prompt.begun.add(request_id)

    def end(
        self, group_id: GroupId, instance_id: InstanceId, request_id: RequestId
    ) -> int:
        """A chunk is over; the blocks of the copy that ends with it."""
        prompt = self._by_group.get(group_id, {}).get(instance_id)
        if prompt is None:
            return 0
        num_before = prompt.num_copies
        for members in (prompt.bringers, prompt.finders, prompt.begun):
            members.discard(request_id)
        is_orphan = prompt.num_copies < num_before and bool(prompt.finders)
        prompt.is_kept = bool(prompt.finders) and (prompt.is_kept or is_orphan)
        num_freed = num_before - prompt.num_copies
        if not (prompt.bringers or prompt.finders):
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
