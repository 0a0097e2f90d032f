"""Nodes whose processes compute together, and so end together."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import permutations
from typing import TYPE_CHECKING

from aseer.watch import waking_timeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.node.remote import RemoteNode


# For nodes to say where they listen.
_ADDRESS_S = 10.0


class Together:
    """What takes several nodes, and is lost with the first of them.

    Attributes:
        nodes: which; none twice.
        apart: two that do not reach each other, as far as was looked.
    """

    def __init__(self, nodes: Sequence[RemoteNode]) -> None:
        self.nodes = list(nodes)
        self.apart: tuple[RemoteNode, RemoteNode] | None = None

    @property
    def lost_because(self) -> str | None:
        """Why a node is gone, or cut off from another; None while none is."""
        lost = next((n.lost_because for n in self.nodes if n.lost_because), None)
        if lost is None and self.apart is not None:
            one, other = self.apart
            return f"its nodes {one.name} and {other.name} do not reach each other"
        return lost

    async def meet(self) -> None:
        """As `look`, once the nodes have said where they listen: they do as they join,
        unless they cannot.
        """
        with suppress(TimeoutError):
            async with waking_timeout(_ADDRESS_S):
                for node in self.nodes:
                    await node.weights.said_address.wait()
        await self.look()

    async def look(self) -> None:
        """See whether the nodes reach each other."""
        pairs = list(permutations(self.nodes, 2))
        found = await asyncio.gather(*(one.reaches(other) for one, other in pairs))
        if not all(found):
            self.apart = pairs[found.index(False)]
