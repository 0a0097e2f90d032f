"""A node's weights: fetched for its instances, and given to other nodes.

A node takes them from a neighbour while that is of use. One that is gone, says nothing
for `PATIENCE_S` or brings anything but what it was asked for is given up, and the
controller gives the rest. To others a node gives each block as soon as it has it.
Whoever can connect has the cluster's key; what waits for one is bounded all the same.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import AseerError, describe
from aseer.node.fetching import MAX_BLOCKS_ASKED, BadBlock, Fetching
from aseer.node.messages import (
    FROM_NEIGHBOUR,
    TO_NEIGHBOUR,
    Block,
    DropFiles,
    FetchFiles,
    FetchRest,
    GetBlock,
    Gives,
    NotYet,
)
from aseer.node.network import address_towards
from aseer.transport.tcp import bind_tcp, connect_tcp

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from aseer.node.messages import Neighbour
    from aseer.node.metrics import AgentFigures
    from aseer.transport.base import Dealer, Router
    from aseer.transport.keys import Keys

    Connect = Callable[[str], AbstractAsyncContextManager[Dealer[Block | NotYet]]]

_log = logging.getLogger("aseer")

# A neighbour that has not yet what it is asked for says so that often, and is given up
# if it says nothing for so long: a busy host's event loop may stall for a second.
BEAT_S = 0.5
PATIENCE_S = 3.0
# Blocks that others wait for, of all of them: a node seldom gives to more than one.
_MAX_WANTED = 16 * MAX_BLOCKS_ASKED
# Messages that ZeroMQ keeps for one of them.
_MAX_QUEUED = 4 * MAX_BLOCKS_ASKED

Order = FetchFiles | FetchRest | Block | DropFiles
"""What the controller says of weights."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    peer: bytes
    asked: GetBlock
    at_s: float


class Relay:
    """See above."""

    def __init__(
        self,
        folder: Path,
        say: Callable[[msgspec.Struct], None],
        figures: AgentFigures,
        tasks: asyncio.TaskGroup,
        keys: Keys | None,
        connect: Connect | None = None,
    ) -> None:
        """Start with no files.

        Args:
            folder: of the folders that they are fetched to.
            say: sends the controller a message.
            tasks: that run until `close`.
            keys: of the cluster; None = it has none, and there are no neighbours.
            connect: makes a connection to a neighbour's address; None = over TCP.
        """
        self._folder = folder
        self._say = say
        self._figures = figures
        self._tasks = tasks
        self._keys = keys
        self._connect = connect or partial(_connect, keys)
        self._fetches: dict[str, Fetching] = {}
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._wanted: list[_Wanted] = []
        self._router: Router[GetBlock] | None = None
        self._serving: asyncio.Task[None] | None = None

    def take(self, order: Order) -> None:
        """Take what the controller says."""
        fetching = self._fetches.get(order.folder)
        if isinstance(order, FetchFiles):
            self._fetch(order)
        elif fetching is None:
            return
        elif isinstance(order, Block):
            try:
                self._take_block(fetching, order)
            except BadBlock as error:
                fetching.fail(str(error))
                self._hand_on()
        elif isinstance(order, FetchRest):
            self._end_pull(order.folder)
            fetching.give_up("it was much slower than it fetched them itself")
        else:
            self._end_pull(order.folder)
            fetching.close()
            self._hand_on()
            del self._fetches[order.folder]
            for other in self._fetches.values():
                other.forget_base(order.folder)

    def serve(self, controller: str) -> None:
        """Listen for other nodes, at the address that leads to the controller.

        Without a key they could be anybody, and nothing is done.
        """
        if self._keys is None:
            self._say(Gives(""))
        else:
            self._serving = self._tasks.create_task(self._serve(controller))

    async def give(self, router: Router[GetBlock]) -> None:
        """Give blocks to whoever asks for them, until cancelled."""
        self._router = router
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(router.run(self._on_asked, self._on_lost, self._on_gone))
            tasks.create_task(self._beat())

    def close(self) -> None:
        """Fetch and give no more, and remove what has come."""
        for folder, fetching in self._fetches.items():
            self._end_pull(folder)
            fetching.close()
        if self._serving is not None:
            self._serving.cancel()

    def _fetch(self, order: FetchFiles) -> None:
        _log.info("fetching weights, %.2f GB", sum(order.sizes) / 1e9)
        folder, neighbour = order.folder, order.neighbour
        asked: deque[GetBlock] = deque()
        fetching = self._fetches[folder] = Fetching(
            order,
            self._folder / folder,
            self._say,
            None if neighbour is None else asked.append,
            self._folder / order.base if order.base in self._fetches else None,
        )
        self._tasks.create_task(self._begin(fetching, folder, neighbour, asked))

    async def _begin(
        self,
        fetching: Fetching,
        folder: str,
        neighbour: Neighbour | None,
        asked: deque[GetBlock],
    ) -> None:
        try:
            await fetching.begin()
        except Exception as error:  # of these files alone
            _log.exception("weights cannot be fetched")
            fetching.fail(describe(error))
        self._hand_on()  # in case that it failed
        if neighbour is not None and fetching.asks_neighbour:
            pull = self._pull(neighbour, asked, fetching)
            self._pulls[folder] = self._tasks.create_task(pull)

    def _take_block(self, fetching: Fetching, block: Block) -> None:
        fetching.take(block)
        self._figures.fetched_bytes += len(block.data)
        self._hand_on()

    async def _pull(
        self, neighbour: Neighbour, asked: deque[GetBlock], fetching: Fetching
    ) -> None:
        """Take blocks of a neighbour, until all are here or it is of no use."""
        loop = asyncio.get_running_loop()
        try:
            async with (
                self._connect(neighbour.address) as dealer,
                asyncio.timeout(PATIENCE_S) as patience,
            ):
                while fetching.asks_neighbour:
                    while asked:
                        wanted = asked.popleft()
                        await dealer.send(
                            msgspec.structs.replace(wanted, folder=neighbour.folder)
                        )
                    # Under a timeout, since nothing is received after it.
                    message = await dealer.receive()
                    patience.reschedule(loop.time() + PATIENCE_S)
                    if isinstance(message, Block):
                        self._take_block(fetching, message)
        except TimeoutError:
            self._give_up(fetching, neighbour, f"it said nothing for {PATIENCE_S:g} s")
        except Exception as error:
            why = str(error) if isinstance(error, AseerError) else describe(error)
            self._give_up(fetching, neighbour, why)

    def _give_up(self, fetching: Fetching, neighbour: Neighbour, why: str) -> None:
        _log.warning(
            "the controller gives the rest of the weights, as the node at %s does not: "
            "%s",
            neighbour.address,
            why,
        )
        fetching.give_up(why)

    def _end_pull(self, folder: str) -> None:
        pull = self._pulls.pop(folder, None)
        if pull is not None:
            pull.cancel()

    async def _serve(self, controller: str) -> None:
        try:
            address = await address_towards(controller)
            async with bind_tcp(
                address, TO_NEIGHBOUR, self._keys, max_queued=_MAX_QUEUED
            ) as router:
                self._say(Gives(router.endpoint))
                await self.give(router)
        except Exception as error:
            _log.warning("this node gives no weights to others: %s", describe(error))
            self._say(Gives(""))
        finally:
            self._router = None

    def _on_asked(self, peer: bytes, asked: GetBlock) -> None:
        now_s = asyncio.get_running_loop().time()
        self._wanted.append(_Wanted(peer, asked, now_s))
        self._hand_on()
        if len(self._wanted) > _MAX_WANTED:
            self._refuse(self._wanted.pop(), "too many nodes wait here")

    def _hand_on(self) -> None:
        """Give what is here and waited for."""
        self._wanted = [each for each in self._wanted if not self._is_answered(each)]

    def _is_answered(self, wanted: _Wanted) -> bool:
        fetching = self._fetches.get(wanted.asked.folder)
        if fetching is None:
            return False  # the order to fetch it may be on its way
        asked = wanted.asked
        block = fetching.give(asked.file, asked.offset, has_base=asked.has_base)
        if block is None:
            return False
        self._send(wanted.peer, block)
        self._figures.given_bytes += len(block.data)
        return True

    def _refuse(self, wanted: _Wanted, why: str) -> None:
        asked = wanted.asked
        block = Block(asked.folder, asked.file, asked.offset, error=why)
        self._send(wanted.peer, block)

    def _send(self, peer: bytes, message: Block | NotYet) -> None:
        if self._router is not None:
            self._router.send(peer, message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            old_s = asyncio.get_running_loop().time() - PATIENCE_S
            unknown = [w for w in self._wanted if w.asked.folder not in self._fetches]
            stale = [wanted for wanted in unknown if wanted.at_s < old_s]
            self._wanted = [each for each in self._wanted if each not in stale]
            for wanted in stale:
                self._refuse(wanted, "the neighbour has no such files")
            for peer in {each.peer for each in self._wanted} - {
                w.peer for w in unknown
            }:
                self._send(peer, NotYet())

    def _on_lost(self, peer: bytes, why: str) -> None:
        self._on_gone(peer)
        if self._router is not None:
            self._router.forget(peer)

    def _on_gone(self, peer: bytes) -> None:
        self._wanted = [each for each in self._wanted if each.peer != peer]


def _connect(
    keys: Keys | None, address: str
) -> AbstractAsyncContextManager[Dealer[Block | NotYet]]:
    name = b"a" + secrets.token_bytes(8)
    return connect_tcp(address, name, FROM_NEIGHBOUR, keys, max_queued=_MAX_QUEUED)
