"""Several nodes that run one instance together, as if they were one node.

The first leads: vLLM's engine is there, and says all that the instance says. The others
have workers of it. An instance lives and dies as a whole: when a process of it ends,
the others are ended, and its end is told once nothing of it is left on any node that
still answers, and these have said whether they reach each other. So whether a node was
lost, or is cut off from another, is known by then, and that is nobody's fault.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.instance.base import InstanceSpec
from aseer.runtime.launch import member_args, member_env
from aseer.runtime.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from aseer.node.machine import Launch
    from aseer.node.messages import Located
    from aseer.node.remote import RemoteNode, RemoteProcess
    from aseer.transport.base import Message


class Gang(Together):
    """See `Node`; its name and its endpoint are those of the node that leads. One that
    is gone, or cut off from another, takes the instance with it.
    """

    def __init__(self, members: Sequence[tuple[RemoteNode, Launch]]) -> None:
        """Start nothing yet.

        Args:
            members: each node, and what it has for its part; the first leads.
        """
        super().__init__([node for node, _ in members])
        self.members = list(members)
        leader, launch = self.members[0]
        self.launch = replace(
            launch, share=" and ".join(each.share for _, each in members)
        )
        self.name = leader.name
        self.endpoint = leader.endpoint
        self.drafts = leader.drafts
        self.supplies = [node.weights for node in self.nodes]

    def send(self, peer: bytes, message: Message) -> None:
        """See `Node`."""
        self.nodes[0].send(peer, message)

    def forget(self, peer: bytes) -> None:
        """See `Node`."""
        for rank, node in enumerate(self.nodes):
            node.forget(_peer_of(peer, rank))

    async def start(
        self, peer: bytes, name: str, line: bytes, env: Mapping[str, str]
    ) -> GangProcess:
        """See `Node`; each member has an environment of its own."""
        del env
        places = [await node.locate() for node in self.nodes]
        spec = msgspec.json.decode(line, type=InstanceSpec)
        parts: list[tuple[RemoteNode, RemoteProcess]] = []
        try:
            for rank, (node, launch) in enumerate(self.members):
                process = await node.start(
                    _peer_of(peer, rank),
                    _name_of(name, rank),
                    msgspec.json.encode(self._spec_of(spec, rank, places)),
                    member_env(launch, places[rank]),
                )
                parts.append((node, process))
        except BaseException:  # a node was lost just now
            await GangProcess(parts, self.look).end(0)
            raise
        return GangProcess(parts, self.look)

    async def locate(self) -> Located:
        """See `Node`."""
        return await self.nodes[0].locate()

    def log_of(self, name: str) -> str:
        """See `Node`."""
        logs = (n.log_of(_name_of(name, rank)) for rank, n in enumerate(self.nodes))
        return ", ".join(logs)

    def _spec_of(
        self, spec: InstanceSpec, rank: int, places: Sequence[Located]
    ) -> InstanceSpec:
        node, launch = self.members[rank]
        return msgspec.structs.replace(
            spec,
            endpoint=node.endpoint,
            engine_args=member_args(launch, spec.engine_args, rank, places),
            follows=rank > 0,
            cores=launch.cores,
        )


class GangProcess:
    """See `Process`; a process on each node."""

    def __init__(
        self,
        parts: Sequence[tuple[RemoteNode, RemoteProcess]],
        look: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Of parts that were started.

        Args:
            look: is called once one has ended, and is over when their end is told.
        """
        self._parts = list(parts)
        self._look = look
        self._first: int | None = None  # of them to end

    @property
    def part(self) -> str:
        """See `Process`."""
        if not self._first:
            return ""
        return f"its part on node {self._parts[self._first][0].name} "

    async def wait(self) -> int:
        """See `Process`; when one has ended, the others are ended."""
        async with asyncio.TaskGroup() as tasks:
            ends = [tasks.create_task(process.wait()) for _, process in self._parts]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._first is None:
                self._first = next(i for i, end in enumerate(ends) if end.done())
            self.kill()
            # Meanwhile, as requests are sent there until the end is told.
            tasks.create_task(self._look())
        return ends[self._first].result()

    async def end(self, grace_s: float) -> None:
        """See `Process`; the engine ends with the first, and the others are killed."""
        if grace_s:
            await self._parts[0][1].end(grace_s)
        async with asyncio.TaskGroup() as tasks:
            for _, process in self._parts:
                tasks.create_task(process.end(0))
        await self._look()

    def kill(self) -> None:
        """See `Process`."""
        for _, process in self._parts:
            process.kill()

    async def note_shared_memory(self) -> None:
        """See `Process`."""
        for _, process in self._parts:
            await process.note_shared_memory()

    def log_tail(self) -> str:
        """See `Process`; of the one that ended first."""
        return self._parts[self._first or 0][1].log_tail()

    def cause(self) -> str | None:
        """See `Process`; of the one that ended first, if it gives any."""
        first = self._first or 0
        for node, process in [self._parts[first], *self._parts]:
            cause = process.cause()
            if cause is not None:
                is_leader = process is self._parts[0][1]
                return cause if is_leader else f"on node {node.name}: {cause}"
        return None


def _peer_of(peer: bytes, rank: int) -> bytes:
    """The name of a member's process; only that of who leads is ever heard."""
    return b"%s/%d" % (peer, rank) if rank else peer


def _name_of(name: str, rank: int) -> str:
    return f"{name}-rank-{rank}" if rank else name
