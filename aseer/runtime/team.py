"""Instances that compute their experts together, and so live and die as one.

Each is one data-parallel rank of vLLM's ("external load balancing"): an engine with a
scheduler and a KV cache of its own, on this machine or on a node. To a rollout it is an
instance like any other. But the experts of a layer are spread over all ranks, and so a
step of one is a step of all:

- They start together, and meet at a port of the first one's host.
- None works before all have the same weights: each token passes all of them.
- When one has ended, the others are ended, and all that ran on them is lost in the same
  moment: a rank whose partner died may be seen to end first, so that nobody can tell
  which of them had the cause. It counts as one death, and costs one restart.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from aseer.errors import InstanceStartError
from aseer.node.remote import RemoteNode
from aseer.runtime.launch import member_env, rank_args
from aseer.runtime.together import Together

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aseer.node.base import Node
    from aseer.node.machine import Launch
    from aseer.node.messages import Located
    from aseer.runtime.slot import Slot


class Meeting:
    """One start of a team: the processes that find each other, or do not.

    Attributes:
        places: of the ranks' hosts, once all ranks are about to start.
        first: of the ranks to end.
        is_settled: set once the others are being ended, and the nodes were looked at.
    """

    def __init__(self) -> None:
        self.num_here = 0
        self.places: asyncio.Future[list[Located]] = asyncio.Future()
        self.first: Slot | None = None
        self.is_settled = asyncio.Event()


class Team(Together):
    """The ranks of one layout, over all their incarnations.

    Attributes:
        slots: of the ranks, in order, as they are made.
    """

    def __init__(self, members: Sequence[tuple[Node, Launch]]) -> None:
        """Start nothing yet.

        Args:
            members: for each rank its node, and what it has there.
        """
        nodes = dict.fromkeys(n for n, _ in members if isinstance(n, RemoteNode))
        super().__init__(list(nodes))
        self.members = list(members)
        self.slots: list[Slot] = []
        self._next = Meeting()
        self._meetings: dict[Slot, Meeting] = {}  # of what is there, or was last
        # A node outlives many teams, and is not to keep them.
        on_loss = weakref.WeakMethod(self._on_loss)
        for node in self.nodes:
            node.on_loss(lambda: tell() if (tell := on_loss()) else None)

    @property
    def is_given_up(self) -> bool:
        """Whether one of them is not started again, so that none is."""
        return any(slot.given_up for slot in self.slots)

    @property
    def names(self) -> str:
        """Of its nodes, in words."""
        return " and ".join(node.name for node in self.nodes)

    async def gather(self, slot: Slot) -> tuple[dict[str, Any], Mapping[str, str]]:
        """Wait until all ranks are about to start.

        Returns:
            What the rank's engine is told besides, and its environment.

        Raises:
            InstanceStartError: a node is lost, or cannot say where it is.
        """
        meeting = self._next
        meeting.num_here += 1
        if meeting.num_here == len(self.slots):
            self._next = Meeting()
            try:
                found = {n: await n.locate() for n, _ in self.members}
                meeting.places.set_result([found[n] for n, _ in self.members])
            except Exception as error:  # it is raised to each
                if not meeting.places.done():
                    meeting.places.set_exception(error)
        places = await asyncio.shield(meeting.places)
        self._meetings[slot] = meeting
        rank = self.slots.index(slot)
        args = rank_args(slot.launch, rank, len(places), places[0])
        # On one host the ranks find each other without being told how.
        if len(self.nodes) <= 1:
            return args, slot.launch.env
        return args, member_env(slot.launch, places[rank])

    def was_felled(self, slot: Slot) -> bool:
        """Whether a rank's process ends, or has ended, since a partner's did."""
        meeting = self._meetings.get(slot)
        return meeting is not None and meeting.first not in (None, slot)

    def partners_up(self, slot: Slot) -> list[Slot]:
        """The other ranks that still count as up."""
        return [s for s in self.slots if s is not slot and s.up.is_set()]

    async def fall(self, slot: Slot) -> None:
        """A rank's process has ended: end the others', and see whether the nodes reach
        each other, if that was it.
        """
        meeting = self._meetings.get(slot)
        if meeting is None:  # it was not started
            return
        if meeting.first is None:
            meeting.first = slot
            for each in self.slots:
                self.end_if_felled(each)
            try:
                await self.look()
            finally:
                meeting.is_settled.set()
        else:
            await meeting.is_settled.wait()

    def end_if_felled(self, slot: Slot) -> None:
        """End a rank's process if a partner's has ended."""
        if self.was_felled(slot):
            first = self._meetings[slot].first
            assert first is not None
            why = f"instance {first.instance_id}, which has some of its experts, ended"
            slot.kill(why)

    def _on_loss(self) -> None:
        """A node is gone: ranks that wait for one there wait in vain."""
        meeting, self._next = self._next, Meeting()
        if meeting.num_here:
            meeting.places.set_exception(InstanceStartError(self.lost_because or ""))
            meeting.places.exception()  # whoever waits may be gone
