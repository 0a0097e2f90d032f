"""A node on another host, as the controller has it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import EngineError, InstanceStartError, ProtocolError, describe
from aseer.node.fetching import BLOCK_BYTES, MAX_BLOCKS_ASKED, MAX_FILE_BYTES
from aseer.node.messages import (
    DropFiles,
    Ended,
    EndProcess,
    Fetched,
    FetchFiles,
    ForgetPeer,
    FromPeer,
    KillProcess,
    NoteMemory,
    PeerGone,
    PeerLost,
    StartProcess,
    ToPeer,
    encode,
)
from aseer.watch import waking_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aseer.node.messages import FromNode, GetBlock, Join
    from aseer.transport.base import Message

# A process's status where nobody can say it any more.
LOST = -9
_INDEX = "index.json"
# An agent asks for some at a time of each update that it fetches, of which there are
# two at most.
_MAX_WANTED = 16 * MAX_BLOCKS_ASKED
# For word of an end to come, beyond the time that the end may take.
_WORD_S = 5.0


class RemoteProcess:
    """See `Process`; it is a child of the node's agent."""

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

    def __init__(self, join: Join, put: Callable[[bytes], None]) -> None:
        """A node that has joined.

        Args:
            put: sends the node a message.
        """
        self.join = join
        self.name = join.name
        self.endpoint = join.endpoint
        self.drafts = join.drafts
        self.lost_because: str | None = None
        self._put = put
        self._processes: dict[bytes, RemoteProcess] = {}
        self._fetches: dict[str, _Fetch] = {}
        self._num_fetches = 0
        self.num_wanted = 0
        """Blocks that the node has asked for, and has not been sent."""

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

    def log_of(self, name: str) -> str:
        """See `Node`."""
        return f"{self.join.log_dir}/{name}.log on {self.name}"

    def fetch(
        self, key: str, paths: list[str], index_of: Callable[[list[str]], bytes]
    ) -> asyncio.Future[str]:
        """Have the node fetch files, once for all that ask; where their index is.

        If they did not come, they are fetched anew for whoever asks then.

        Args:
            key: that tells these files from others.
            paths: of the files, on this machine.
            index_of: makes a description of them of the paths that they will have.

        The future raises EngineError if it cannot.
        """
        if key in self._fetches and self._fetches[key].has_failed:
            self.drop(key)
        if key not in self._fetches:
            self._num_fetches += 1
            folder = str(self._num_fetches)
            fetch = self._fetches[key] = _Fetch(folder, paths)
            place = f"{self.join.weights_dir}/{folder}"
            fetch.index = f"{place}/{_INDEX}"
            index = index_of([f"{place}/{i}" for i in range(len(paths))])
            try:
                sizes = [Path(path).stat().st_size for path in paths]
            except OSError as error:
                fetch.fail(describe(error))
            else:
                self.say(FetchFiles(folder, sizes, _INDEX, index))
            if self.lost_because is not None:
                fetch.fail(self.lost_because)
        return self._fetches[key].done

    def drop(self, key: str) -> None:
        """The node needs those files no more."""
        fetch = self._fetches.pop(key, None)
        if fetch is not None:
            fetch.fail("it is needed no more")
            self.say(DropFiles(fetch.folder))

    def check_wanted(self, wanted: GetBlock) -> None:
        """See that a block may be read, which is to be sent then.

        Raises:
            ProtocolError: no agent of ours asks for so much.
        """
        self.num_wanted += 1
        in_file = 0 <= wanted.offset <= MAX_FILE_BYTES
        if not (in_file and 0 <= wanted.size <= BLOCK_BYTES):
            raise ProtocolError(
                f"it asks for {wanted.size} bytes at {wanted.offset}; a block has at "
                f"most {BLOCK_BYTES}"
            )
        if self.num_wanted > _MAX_WANTED:
            raise ProtocolError(f"it asks for more than {_MAX_WANTED} blocks at once")

    def path_of(self, wanted: GetBlock) -> str | None:
        """The file that the node asks for a block of; None if it is to have none."""
        for fetch in self._fetches.values():
            if fetch.folder == wanted.folder and 0 <= wanted.file < len(fetch.paths):
                return fetch.paths[wanted.file]
        return None

    def take(
        self,
        message: FromNode,
        on_message: Callable[[bytes, msgspec.Raw], None],
        on_lost: Callable[[bytes, str], None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        """Take what the node says; of processes that it runs alone."""
        if isinstance(message, Fetched):
            for fetch in self._fetches.values():
                if fetch.folder == message.folder:
                    fetch.set_done(message.error)
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
            for fetch in self._fetches.values():
                fetch.fail(self.lost_because)


class _Fetch:
    """Files on their way to a node, or there."""

    def __init__(self, folder: str, paths: list[str]) -> None:
        self.folder = folder
        self.paths = paths
        self.index = ""
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def has_failed(self) -> bool:
        return self.done.done() and self.done.exception() is not None

    def set_done(self, error: str) -> None:
        if error:
            self.fail(error)
        elif not self.done.done():
            self.done.set_result(self.index)

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(EngineError(f"the weights did not come: {why}"))
            self.done.exception()  # nobody may wait for them
