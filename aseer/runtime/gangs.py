"""Nodes that run something together: put to work as they come, anew when one is gone.

A `Gang` runs one instance that spans its nodes. A `Team` is as many instances that
compute their experts together, on one node or more.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aseer.runtime.gang import Gang
from aseer.runtime.seats import Seats
from aseer.runtime.team import Team

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable
    from typing import Any

    from aseer.config import EngineConfig
    from aseer.node.machine import Launch
    from aseer.node.remote import RemoteNode

_log = logging.getLogger("aseer")

# Between two looks whether nodes that were cut off from each other are so still.
_MEETING_INTERVAL_S = 5.0


def forms_gangs(config: EngineConfig) -> bool:
    """Whether a node alone runs nothing by itself."""
    return config.nodes_per_instance > 1 or config.data_parallel_size > 1


class Gangs:
    """The gangs and teams of an engine's nodes."""

    def __init__(
        self,
        config: EngineConfig,
        nodes: Callable[[], list[RemoteNode]],
        attend: Callable[[Gang | Team], Coroutine[Any, Any, None]],
    ) -> None:
        """There are no nodes yet.

        Args:
            nodes: gives those that are there.
            attend: has a gang work until it is lost, or a team.
        """
        self._nodes = nodes
        self._attend = attend
        self._gangs: list[Gang | Team] = []
        self._seats: Seats[RemoteNode, Launch]
        self._made_of: type[Gang | Team] = Gang
        if config.data_parallel_size > 1:
            self._made_of = Team
            self._seats = Seats(config.data_parallel_size, of_one_node=None)
            self._want = (
                f"for another node: data_parallel_size={config.data_parallel_size} "
                "instances run together"
            )
        else:
            self._seats = Seats(config.nodes_per_instance)
            self._want = (
                "for another node: an instance takes "
                f"nodes_per_instance={config.nodes_per_instance}"
            )
        self.apart = ""
        """Of nodes that do not reach each other, in words."""

    def add(
        self,
        node: RemoteNode,
        launches: list[Launch],
        kind: Hashable,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """A node has come.

        Args:
            launches: what it has for each part, or rank. kind: see `Seats.add`.
        """
        self._seats.add(node, launches, kind)
        self._form(tasks)

    def are_up(self, node: RemoteNode, is_up: Callable[[Gang | Team], bool]) -> bool:
        """Whether there are any that are up, and among them all that a node is in."""
        up = [gang for gang in self._gangs if is_up(gang)]
        return bool(up) and all(g in up for g in self._gangs if node in g.nodes)

    def _form(self, tasks: asyncio.TaskGroup) -> None:
        """Put nodes to work together that are there and have nothing to do."""
        self._seats.keep(self._nodes())
        for members in self._seats.form():
            gang = self._made_of(members)
            self._gangs.append(gang)
            tasks.create_task(self._work(gang, members, tasks))
        for node in self._seats.waiting:
            _log.info("node %s has room for more, and waits %s", node.name, self._want)

    async def _work(
        self,
        gang: Gang | Team,
        members: list[tuple[RemoteNode, Launch]],
        tasks: asyncio.TaskGroup,
    ) -> None:
        await gang.meet()
        if gang.lost_because is None:
            await self._attend(gang)
        self._gangs.remove(gang)
        self._seats.release(members)
        if gang.apart is not None:
            self.apart = f"{gang.lost_because}"
            _log.warning("%s; they run no instance together meanwhile", self.apart)
            self._seats.part(*gang.apart)
            tasks.create_task(self._await_meeting(*gang.apart, tasks))
        self._form(tasks)

    async def _await_meeting(
        self, one: RemoteNode, other: RemoteNode, tasks: asyncio.TaskGroup
    ) -> None:
        """Let nodes that are apart form gangs again once they reach each other."""
        while one.lost_because is None and other.lost_because is None:
            await asyncio.sleep(_MEETING_INTERVAL_S)
            if await one.reaches(other) and await other.reaches(one):
                break
        self.apart = ""
        self._seats.meet(one, other)
        self._form(tasks)
