"""The contract of a node: a machine that instances run on, this one or another.

A node starts processes, carries messages to and from them, and ends them. What they are
and what is said to them is its owner's to know. All processes of a node end with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aseer.node.messages import Located
    from aseer.node.supply import Supply
    from aseer.transport.base import Message


class Process(Protocol):
    """A process on a node.

    Attributes:
        part: of it that ended first, in words that go before how it ended; "" = it is
            one whole.
    """

    @property
    def part(self) -> str: ...

    async def wait(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        ...

    async def end(self, grace_s: float) -> None:
        """Give it `grace_s` to exit, then kill it; either way nothing of it remains.

        May be called again.
        """
        ...

    def kill(self) -> None:
        """Kill it with all it has started; `wait` tells when."""
        ...

    async def note_shared_memory(self) -> None:
        """Remember what it has mapped, in case it cannot remove that."""
        ...

    def log_tail(self) -> str:
        """The last lines of its log; of another machine's, once it has ended."""
        ...

    def cause(self) -> str | None:
        """The error its log gives for its death, if it gives one and it is over."""
        ...


class NodePool(Protocol):
    """A node's KV pool, for a controller on another host (`aseer.kv.agent`).

    The agent passes on what is said, and reads none of it.
    """

    def take(self, data: bytes) -> None:
        """Take what the controller says."""
        ...

    async def run(
        self, say: Callable[[bytes], None], controller: Callable[[], str]
    ) -> None:
        """Have the pool that the controller wants until cancelled; then nothing of it
        remains.

        Args:
            say: tells the controller. controller: gives its address.
        """
        ...


class Node(Protocol):
    """A machine that instances run on.

    Attributes:
        name: that users know it by; "" = this machine.
        endpoint: that its processes connect to.
        drafts: of its draft server.
        supplies: of files, one for each host that it is, in the order in which
            instances are told of them; none = this machine, which needs none.
        lost_because: why it is gone, with all that ran there; None while it is not.
    """

    name: str
    endpoint: str
    drafts: str

    @property
    def supplies(self) -> Sequence[Supply]: ...

    @property
    def lost_because(self) -> str | None: ...

    def send(self, peer: bytes, message: Message) -> None:
        """See `Router.send`."""
        ...

    def forget(self, peer: bytes) -> None:
        """See `Router.forget`."""
        ...

    async def start(
        self, peer: bytes, name: str, line: bytes, env: Mapping[str, str]
    ) -> Process:
        """Start an instance's process and tell it what it is.

        Args:
            peer: under which it will speak; unlike any other's, also of earlier ones.
            name: of its log.
            line: of its standard input.
            env: added to the node's own environment.
        Raises:
            InstanceStartError: the node has no room for it; nothing of it remains.
        """
        ...

    async def locate(self) -> Located:
        """Where processes elsewhere reach those of this one, with a free port; of a
        machine that is alone, where its processes reach each other.

        Raises:
            InstanceStartError: it is lost, or cannot say it.
        """
        ...

    def log_of(self, name: str) -> str:
        """Where a process's log is, in words."""
        ...
