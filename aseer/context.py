"""What a rollout's groups have taught: how long their responses become.

Seer §3.3: siblings have similar lengths, so the first to finish (the probe, which is
scheduled ahead of everything else) tells how long the others will be. A group's
*length estimate* is its `max_tokens` until a request of the group finishes, and then
the length of the longest finished one. Cancelled and failed requests teach nothing.

Beyond the paper: siblings need not be alike. A response is *unforeseen* if it becomes
several times as long as anything that was known of its group. If more than a few
responses are unforeseen, siblings do not tell each other's lengths, and the scheduler
orders by another rule. A count varies by chance, by about its square root. So the
manager changes its opinion only when the number of unforeseen responses differs from
the share `FEW` by `SURE` times that square root, to the other side. Fewer than `SURE`
squared unforeseen responses therefore never change it, and it changes ever more rarely
as a rollout goes on, even if the share is close to `FEW`.

Beyond the paper: with `LengthPriors` the longest response to a prompt in an earlier
rollout is known before anything runs. It counts as one more finished request, and the
group needs no probe.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aseer.core._native import untracked

if TYPE_CHECKING:
    from aseer.types import GroupId, RequestId

# A response is unforeseen if it becomes more than so many times as long as what was
# known of its group. On workloads like the paper's that is rare.
UNFORESEEN = 5
# The share of responses that may be unforeseen although siblings are alike.
FEW = 0.02
# Standard deviations of a count; chance alone goes beyond so many in one look of
# fifteen. In simulations of 256 responses a smaller value was no faster, and with a
# larger one the change of order came too late.
SURE = 1.5
MAX_PRIORS = 1_000_000
_KEY_BYTES = 16


@dataclass(slots=True)
class GroupContext:
    """One group's lengths.

    Attributes:
        prior: tokens of the longest response to the prompt in an earlier rollout.
        num_completed: requests that ended by themselves.
        longest_completed: tokens of the longest of these requests.
        unforeseen: requests that became several times as long as what was known then.
    """

    max_tokens: int
    num_requests: int
    prior: int | None = None
    num_completed: int = 0
    longest_completed: int | None = None
    unforeseen: set[RequestId] = field(default_factory=set)

    @property
    def longest_known(self) -> int | None:
        """Tokens of the longest response, in this rollout or earlier."""
        if self.longest_completed is None:
            return self.prior
        return max(self.longest_completed, self.prior or 0)

    @property
    def length_estimate(self) -> int:
        longest = self.longest_known
        return self.max_tokens if longest is None else longest


class ContextManager:
    """Length estimates of all groups of one rollout (Seer's context manager)."""

    def __init__(self) -> None:
        self._groups: dict[GroupId, GroupContext] = {}
        self._num_told = 0  # finished after something of their group was known
        self._num_unforeseen = 0
        self._are_alike = True

    @property
    def siblings_are_alike(self) -> bool:
        """Whether siblings' lengths are alike, as far as this rollout has shown."""
        return self._are_alike

    def __getitem__(self, group_id: GroupId) -> GroupContext:
        return self._groups[group_id]

    def add_group(
        self,
        group_id: GroupId,
        max_tokens: int,
        num_requests: int,
        prior: int | None = None,
    ) -> None:
        """Begin with a prior, or else with the safe estimate `max_tokens`.

        Raises:
            ValueError: the group is known already.
        """
        if group_id in self._groups:
            raise ValueError(f"group {group_id!r} is known already")
        if prior is not None:
            prior = min(prior, max_tokens)
        self._groups[group_id] = untracked(
            GroupContext(max_tokens, num_requests, prior, unforeseen=untracked(set()))
        )
        untracked(self._groups)

    def forget_group(self, group_id: GroupId) -> None:
        """Drop a group; what the group told of siblings in general stays."""
        self._groups.pop(group_id, None)

    def length_estimate(self, group_id: GroupId) -> int:
        """Tokens the longest response of the group is expected to have."""
        return self._groups[group_id].length_estimate

    def longest(self, group_id: GroupId) -> int | None:
        """Tokens of the longest response, if all have ended by themselves; or None."""
        group = self._groups[group_id]
        is_over = group.num_completed == group.num_requests
        return group.longest_completed if is_over else None

    def record_length(
        self, group_id: GroupId, request_id: RequestId, length: int
    ) -> None:
        """Learn from a request that has reached a length and goes on."""
        group = self._groups[group_id]
        known = group.longest_known
        if known is None or length <= UNFORESEEN * known:
            return
        if request_id not in group.unforeseen:
            group.unforeseen.add(request_id)
            self._num_unforeseen += 1
            self._compare()

    def record_finished(
        self, group_id: GroupId, request_id: RequestId, length: int
    ) -> bool:
        """Learn from a request that ended by itself.

        Returns:
            Whether the group's length estimate changed.
        """
        self.record_length(group_id, request_id, length)
        group = self._groups[group_id]
        self._num_told += group.longest_known is not None
        self._compare()
        before = group.length_estimate
        group.num_completed += 1
        group.longest_completed = max(length, group.longest_completed or 0)
        return group.length_estimate != before

    def _compare(self) -> None:
        """Change the opinion of siblings if the counts speak against it."""
        beyond = self._num_unforeseen - FEW * self._num_told
        chance = SURE * math.sqrt(self._num_unforeseen)
        self._are_alike = beyond <= (chance if self._are_alike else -chance)


class LengthPriors:
    """The longest response to every prompt in the last rollout that had it.

    Args:
        max_prompts: how many prompts to remember; those that were not seen for the
            longest time are forgotten first.
    """

    def __init__(self, *, max_prompts: int = MAX_PRIORS) -> None:
        self._max_prompts = max_prompts
        self._longest: OrderedDict[bytes, int] = OrderedDict()

    def get(self, prompt: bytes) -> int | None:
        """Tokens of the longest response to a prompt (token ids as bytes)."""
        return self._longest.get(_key(prompt))

    def learn(self, prompt: bytes, longest: int) -> None:
        """Replace what an earlier rollout showed of a prompt by what this one did."""
        key = _key(prompt)
        self._longest[key] = longest
        self._longest.move_to_end(key)
        if len(self._longest) > self._max_prompts:
            self._longest.popitem(last=False)


def _key(prompt: bytes) -> bytes:
    return hashlib.blake2b(prompt, digest_size=_KEY_BYTES).digest()
