"""What a rollout's groups have taught: the length of their responses.

Seer §3.3: siblings have similar lengths, so the first to finish (the probe, which is
scheduled ahead of everything else) tells how long the others will take. A group's
*length estimate* is its `max_tokens` until a request of it finishes, then the longest
finished one. Cancelled and failed requests teach nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aseer.types import GroupId


@dataclass(slots=True)
class GroupContext:
    """One group's lengths.

    Attributes:
        num_tokens: generated so far by all its requests (the service it received).
    """

    max_tokens: int
    num_requests: int
    completed: list[int] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def length_estimate(self) -> int:
        return max(self.completed) if self.completed else self.max_tokens


class ContextManager:
    """Length estimates of all groups of one rollout (Seer's context manager)."""

    def __init__(self) -> None:
        self._groups: dict[GroupId, GroupContext] = {}

    def __getitem__(self, group_id: GroupId) -> GroupContext:
        return self._groups[group_id]

    def add_group(self, group_id: GroupId, max_tokens: int, num_requests: int) -> None:
        """Begin with the safe estimate: as long as allowed.

        Raises:
            ValueError: the group is known already.
        """
        if group_id in self._groups:
            raise ValueError(f"group {group_id!r} is known already")
        self._groups[group_id] = GroupContext(max_tokens, num_requests)

    def length_estimate(self, group_id: GroupId) -> int:
        """Tokens the longest response of the group is expected to have."""
        return self._groups[group_id].length_estimate

    def record_tokens(self, group_id: GroupId, num_tokens: int) -> None:
        """Count service the group received."""
        self._groups[group_id].num_tokens += num_tokens

    def record_finished(self, group_id: GroupId, length: int) -> bool:
        """Learn from a request that ended by itself.

        Returns:
            Whether the group's length estimate changed.
        """
        group = self._groups[group_id]
        before = group.length_estimate
        group.completed.append(length)
        return group.length_estimate != before
