"""The files that a controller has a node fetch, from a neighbour of it or from here."""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aseer.errors import EngineError, InstanceLostError, ProtocolError, describe
from aseer.node.chain import Files, Giver, late_at_s
from aseer.node.fetching import BLOCK_BYTES, MAX_BLOCKS_ASKED, MAX_FILE_BYTES
from aseer.node.messages import (
    DropFiles,
    Fetched,
    FetchFiles,
    FetchRest,
    Gives,
    Neighbour,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from aseer.node.chain import Chain, Chains, Member
    from aseer.node.messages import GetBlock, Join

_log = logging.getLogger("aseer")

_INDEX = "index.json"
# An agent asks for some at a time of each update that it fetches, of which there are
# two at most.
_MAX_WANTED = 16 * MAX_BLOCKS_ASKED
_KEY_BYTES = 32


class NotCome(EngineError):
    """Files are not where they are wanted; they may come if they are asked for anew."""


class Found(NamedTuple):
    """A block's file on this machine.

    Attributes:
        key: of the block's digest.
        base: the file of the version that the node has; None = it has none.
    """

    path: str
    key: bytes
    base: str | None


class Supply:
    """Of one node."""

    def __init__(
        self,
        join: Join,
        say: Callable[[msgspec.Struct], None],
        chains: Chains,
    ) -> None:
        """Start with no files.

        Args:
            join: of the node. say: sends it a message.
            chains: of the files that nodes fetch; all nodes share it.
        """
        self._folder = join.weights_dir
        self._say = say
        self._chains = chains
        self._giver = Giver(join.name)
        self._fetches: dict[str, _Fetch] = {}
        self._num_fetches = 0
        self._lost_because: str | None = None
        self.said_address = asyncio.Event()
        """Set once `address` is known, or the node is gone."""
        self.num_wanted = 0
        """Blocks that the node has asked for, and has not been sent."""

    def fetch(
        self, key: str, paths: list[str], index_of: Callable[[list[str]], bytes]
    ) -> asyncio.Future[str]:
        """Have the node fetch files, once for all that ask; where their index is.

        If they did not come, they are fetched anew for whoever asks then.

        Args:
            key: that tells these files from others.
            paths: of the files, on this machine.
            index_of: makes a description of them of the paths that they will have.

        The future raises NotCome if it cannot, and InstanceLostError if the node is
        gone, with all that ran there.
        """
        if key in self._fetches and self._fetches[key].has_failed:
            self.drop(key)
        if key not in self._fetches:
            try:
                sizes = [Path(path).stat().st_size for path in paths]
            except OSError as error:
                return _failed(describe(error))
            fetch = self._fetches[key] = self._begin(Files(key, paths, sizes))
            places = [f"{fetch.place}/{i}" for i in range(len(paths))]
            self._order(fetch, index_of(places))
            if self._lost_because is not None:
                fetch.lose(self._lost_because)
        return self._fetches[key].done

    def drop(self, key: str) -> None:
        """The node needs those files no more."""
        fetch = self._fetches.pop(key, None)
        if fetch is not None:
            fetch.fail("it is needed no more")
            self._leave(key, fetch)
            self._say(DropFiles(fetch.folder))

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

    def find(self, wanted: GetBlock) -> Found | None:
        """Where the node finds a block that it asks for; None if it is to have none."""
        for fetch in self._fetches.values():
            paths, chain = fetch.chain.files.paths, fetch.chain
            if fetch.folder == wanted.folder and 0 <= wanted.file < len(paths):
                base = chain.base if wanted.has_base else None
                return Found(
                    paths[wanted.file],
                    chain.key,
                    None if base is None else base.paths[wanted.file],
                )
        return None

    def take(self, message: Fetched | Gives) -> None:
        """Take what the node says of it."""
        if isinstance(message, Gives):
            self._giver.address = message.address
            self.said_address.set()
            return
        for key, fetch in self._fetches.items():
            if fetch.folder == message.folder and not fetch.done.done():
                self._end(key, fetch, message)

    @property
    def address(self) -> str:
        """Where the node listens for other nodes; "" = nowhere, or not said yet."""
        return self._giver.address

    @property
    def is_lost(self) -> bool:
        """Whether the node is gone."""
        return self._lost_because is not None

    def lose(self, why: str) -> None:
        """The node is gone."""
        self._lost_because = why
        self.said_address.set()
        for key, fetch in self._fetches.items():
            fetch.lose(why)
            self._leave(key, fetch)

    def _begin(self, files: Files) -> _Fetch:
        self._num_fetches += 1
        folder = str(self._num_fetches)
        chain = self._chains.of(files, lambda: secrets.token_bytes(_KEY_BYTES))
        now_s = asyncio.get_running_loop().time()
        hurry = partial(self._hurry, files.name)
        member = chain.join(self._giver, folder, now_s, hurry)
        return _Fetch(f"{self._folder}/{folder}", chain, member)

    def _order(self, fetch: _Fetch, index: bytes) -> None:
        neighbour, source = None, fetch.member.source
        if source is not None:
            neighbour = Neighbour(source.giver.address, source.folder)
        chain = fetch.chain
        base = self._fetches.get(chain.base.name) if chain.base is not None else None
        self._say(
            FetchFiles(
                fetch.folder,
                chain.files.sizes,
                _INDEX,
                index,
                chain.key,
                neighbour,
                base.folder if base is not None and base.is_there else "",
            )
        )
        _hurry_in_time(fetch.member)

    def _end(self, key: str, fetch: _Fetch, message: Fetched) -> None:
        if message.gave_up and fetch.member.source is not None:
            _log.warning(
                "node %s has the rest of the weights from this host, as node %s does "
                "not give it: %s",
                self._giver.name,
                fetch.member.source.giver.name,
                message.gave_up,
            )
        if message.error:
            fetch.fail(message.error)
            self._leave(key, fetch)
            return
        fetch.done.set_result(f"{fetch.place}/{_INDEX}")
        now_s = asyncio.get_running_loop().time()
        gave_up = bool(message.gave_up)
        for taker in fetch.chain.done(fetch.member, now_s, gave_up=gave_up):
            _hurry_in_time(taker)

    def _hurry(self, key: str) -> None:
        fetch = self._fetches.get(key)
        if fetch is not None and not fetch.done.done():
            self._say(FetchRest(fetch.folder))

    def _leave(self, key: str, fetch: _Fetch) -> None:
        fetch.chain.leave(fetch.member)
        if fetch.chain.is_empty and self._chains.get(key) is fetch.chain:
            del self._chains[key]


class _Fetch:
    """Files on their way to a node, or there."""

    def __init__(self, place: str, chain: Chain, member: Member) -> None:
        self.place = place
        self.folder = member.folder
        self.chain = chain
        self.member = member
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def is_there(self) -> bool:
        return self.done.done() and self.done.exception() is None

    @property
    def has_failed(self) -> bool:
        return self.done.done() and self.done.exception() is not None

    def fail(self, why: str) -> None:
        _set_error(self.done, NotCome(f"the weights did not come: {why}"))

    def lose(self, why: str) -> None:
        _set_error(self.done, InstanceLostError(f"the weights did not come: {why}"))


def _failed(why: str) -> asyncio.Future[str]:
    done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    _set_error(done, NotCome(f"the weights did not come: {why}"))
    return done


def _set_error(done: asyncio.Future[str], error: EngineError) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # nobody may wait for them


def _hurry_in_time(member: Member) -> None:
    late_at = late_at_s(member)
    if late_at is not None:
        asyncio.get_running_loop().call_at(late_at, member.hurry)
