"""A node on another host, as the controller has it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import InstanceStartError
from aseer.node.chain import Chains
from aseer.node.messages import (
    Ended,
    EndProcess,
    Fetched,
    ForgetPeer,
    FromPeer,
    FromPool,
    Gives,
    KillProcess,
    Locate,
    Located,
    NoteMemory,
    PeerGone,
    PeerLost,
    Reach,
    Reached,
    StartProcess,
    ToPeer,
    ToPool,
    encode,
)
from aseer.node.network import REACH_TIMEOUT_S
from aseer.node.supply import Supply
from aseer.watch import waking_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aseer.node.messages import FromNode, Join
    from aseer.transport.base import Message

# A process's status where nobody can say it any more.
LOST = -9
# For word of an end to come, beyond the time that the end may take.
_WORD_S = 5.0


class RemoteProcess:
    """See `Process`; it is a child of the node's agent."""

    part = ""

    def __init__(self, node: RemoteNode, peer: bytes) -> None:
        self._node = node
        self._peer = peer
        self._over: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()

    def set_over(self, ended: Ended) -> None:
        """It is over, or its node is."""
        if not self._over.done():
            self._over.set_result(ended)

    async def wait(self) -> int:
        """See `Process`."""
        return (await asyncio.shield(self._over)).status

    async def end(self, grace_s: float) -> None:
        """See `Process`. Of a node that says nothing, it ends with the lease."""
        if not self._over.done():
            self._node.say(EndProcess(self._peer, grace_s))
            with suppress(TimeoutError):
                async with waking_timeout(grace_s + _WORD_S):
                    await asyncio.wait([self._over])

    def kill(self) -> None:
        """See `Process`."""
        self._node.say(KillProcess(self._peer))

    async def note_shared_memory(self) -> None:
        """See `Process`."""
        self._node.say(NoteMemory(self._peer))

    def log_tail(self) -> str:
        """See `Process`."""
        return self._over.result().log_tail if self._over.done() else ""

    def cause(self) -> str | None:
        """See `Process`."""
        return self._over.result().cause if self._over.done() else None


class RemoteNode:
    """See `Node`."""

    def __init__(
        self,
        join: Join,
        put: Callable[[bytes], None],
        chains: Chains | None = None,
    ) -> None:
        """A node that has joined.

        Args:
            put: sends the node a message.
            chains: of the files that nodes fetch; all nodes share it.
        """
        self.join = join
        self.name = join.name
        self.endpoint = join.endpoint
        self.drafts = join.drafts
        self.lost_because: str | None = None
        self._put = put
        self._processes: dict[bytes, RemoteProcess] = {}
        self.weights = Supply(join, self.say, Chains() if chains is None else chains)
        self.supplies = (self.weights,)
        self._locating: deque[asyncio.Future[Located]] = deque()
        self._reaching: dict[str, asyncio.Future[bool]] = {}
        self.on_pool: Callable[[bytes], None] = lambda _: None
        """Is told what the node's KV pool says."""
        self._on_loss: list[Callable[[], None]] = []

    def say(self, message: msgspec.Struct) -> None:
        """Send the node a message; one that is lost gets none."""
        if self.lost_because is None:
            self._put(encode(message))

    def send(self, peer: bytes, message: Message) -> None:
        """See `Node`."""
        self.say(ToPeer(peer, msgspec.Raw(encode(message))))

    def forget(self, peer: bytes) -> None:
        """See `Node`."""
        self._processes.pop(peer, None)
        self.say(ForgetPeer(peer))

    async def start(
        self, peer: bytes, name: str, line: bytes, env: Mapping[str, str]
    ) -> RemoteProcess:
        """See `Node`."""
        if self.lost_because is not None:
            raise InstanceStartError(self.lost_because)
        process = self._processes[peer] = RemoteProcess(self, peer)
        self.say(StartProcess(peer, name, line, dict(env)))
        return process

    async def locate(self) -> Located:
        """Where processes on other nodes reach those of this one, with a free port.

        Raises:
            InstanceStartError: it is lost, or cannot say it.
        """
        if self.lost_because is not None:
            raise InstanceStartError(self.lost_because)
        asked: asyncio.Future[Located] = asyncio.get_running_loop().create_future()
        self._locating.append(asked)
        self.say(Locate())
        located = await asked
        if located.error:
            why = f"node {self.name} does not know its address: {located.error}"
            raise InstanceStartError(self.lost_because or why)
        return located

    async def reaches(self, other: RemoteNode) -> bool:
        """Whether this node reaches another; True where nobody can say it."""
        address = other.weights.address
        if not address or self.lost_because or other.lost_because:
            return True
        asked = self._reaching.get(address)
        if asked is None:
            asked = asyncio.get_running_loop().create_future()
            self._reaching[address] = asked
            self.say(Reach(address))
        with suppress(TimeoutError):
            async with waking_timeout(REACH_TIMEOUT_S + _WORD_S):
                await asyncio.wait([asked])
        return asked.result() if asked.done() else True

    def tell_pool(self, data: bytes) -> None:
        """Say something to the node's KV pool."""
        self.say(ToPool(data))

    def on_loss(self, tell: Callable[[], None]) -> None:
        """Tell of the node's loss, now if it is lost already."""
        self._on_loss.append(tell)
        if self.lost_because is not None:
            tell()

    def log_of(self, name: str) -> str:
        """See `Node`."""
        return f"{self.join.log_dir}/{name}.log on {self.name}"

    def take(
        self,
        message: FromNode,
        on_message: Callable[[bytes, msgspec.Raw], None],
        on_lost: Callable[[bytes, str], None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        """Take what the node says; of processes, that of those that it runs alone."""
        if isinstance(message, Fetched | Gives):
            self.weights.take(message)
            return
        if isinstance(message, FromPool):
            self.on_pool(message.message)
            return
        if isinstance(message, Located):
            self._answer(message)
            return
        if isinstance(message, Reached):
            self._reach(message.address, is_reached=message.is_reached)
            return
        peer = getattr(message, "peer", b"")
        if peer not in self._processes:
            return
        match message:
            case Ended():
                self._processes[peer].set_over(message)
            case FromPeer(_, data):
                on_message(peer, data)
            case PeerLost(_, why):
                on_lost(peer, why)
            case PeerGone():
                on_gone(peer)

    def lose(self, why: str) -> None:
        """The node is gone, with all that ran there."""
        if self.lost_because is None:
            self.lost_because = f"its node {self.name} is gone: {why}"
            for peer, process in self._processes.items():
                process.set_over(Ended(peer, LOST))
            self.weights.lose(self.lost_because)
            while self._locating:
                self._answer(Located(error=self.lost_because))
            for address in list(self._reaching):
                self._reach(address, is_reached=True)
            for tell in self._on_loss:
                tell()

    def _reach(self, address: str, *, is_reached: bool) -> None:
        asked = self._reaching.pop(address, None)
        if asked is not None:
            asked.set_result(is_reached)

    def _answer(self, located: Located) -> None:
        """Take an answer for who asked first, if anybody did."""
        asked = self._locating.popleft() if self._locating else None
        if asked is not None and not asked.done():
            asked.set_result(located)
