"""`aseer node`: instances on this host for a controller on another.

The agent does what a controller tells it: it starts processes, carries their messages
and ends them. It decides nothing, and reads none of the messages. Its processes end
with it, however it dies, and with its session: when the controller says so, and when
nothing was heard of the controller for the lease that it gave. After a session that was
lost the agent looks for a controller again, for as long as `death_timeout_s`.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aseer.errors import EngineError, InstanceStartError, describe, root_of
from aseer.node.cleanup import weights_dir_for
from aseer.node.janitor import start_janitor
from aseer.node.leftovers import Leftovers, sweep
from aseer.node.local import LocalNode
from aseer.node.messages import (
    ANY,
    GOODBYE,
    TO_NODE,
    AskDrafts,
    Block,
    Drafts,
    DropFiles,
    Ended,
    EndProcess,
    FetchFiles,
    FetchRest,
    ForgetPeer,
    FromPeer,
    FromPool,
    Join,
    KillProcess,
    Leave,
    Locate,
    NoteMemory,
    PeerGone,
    PeerLost,
    Reach,
    StartProcess,
    ToPeer,
    ToPool,
    Welcome,
    encode,
)
from aseer.node.metrics import AgentFigures
from aseer.node.network import located, reached
from aseer.node.relay import Relay
from aseer.node.running import Running
from aseer.transport.base import PROTOCOL_VERSION, ConnectionRefused
from aseer.transport.link import LinkFull, SessionOver
from aseer.transport.session import Session, SessionLost
from aseer.transport.sessions import FRAME
from aseer.transport.tcp import connect_tcp
from aseer.transport.zeromq import bind_router, make_socket_dir
from aseer.version import __version__

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import msgspec

    from aseer.node.base import NodePool
    from aseer.node.interpreter import Interpreter
    from aseer.node.machine import Machine
    from aseer.transport.base import Router
    from aseer.transport.keys import Keys

_log = logging.getLogger("aseer")

# For the controller to say goodbye to a node that leaves.
_LEAVE_S = 20.0
# For its last words to leave.
_LAST_WORDS_S = 1.0


class NodeRefused(EngineError):
    """The controller does not take this node, or could not use it."""


class NoController(EngineError):
    """No controller was to be found for too long."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a node brings to a controller.

    Attributes:
        controller: its address.
        look_again: says the address by now, if anything does; asked before each
            connection, since the next controller may be elsewhere.
        log_dir: for the logs of instances; None = a directory that goes with the agent.
        death_timeout_s: how long a controller is looked for.
        make_pool: makes what has a KV pool, of the logs' folder, what is to be
            removed, what servers run on and `keys`.
        needs_janitor: whether the agent is killed together with its children, by whom
            nothing would be removed then.
    """

    controller: str
    keys: Keys | None
    name: str
    machine: Machine
    interpreter: Interpreter
    num_instances: int | None
    log_dir: Path | None
    death_timeout_s: float
    make_pool: Callable[[Path, Leftovers, Interpreter, Keys | None], NodePool]
    needs_janitor: bool = False
    look_again: Callable[[], str | None] = lambda: None


async def run_agent(
    offer: Offer, leave: asyncio.Event, figures: AgentFigures | None = None
) -> str:
    """Serve controllers until one says goodbye, or `leave` is set; why it ended.

    Args:
        figures: are kept up to date.
    Raises:
        NodeRefused: a controller has no use for this node.
        ConnectionRefused: the controller has another key.
        NoController: none was found for `death_timeout_s`.
    """
    figures = figures or AgentFigures()
    while True:
        sweep()
        run_dir = make_socket_dir()
        leftovers = Leftovers(run_dir)
        log_dir = offer.log_dir or run_dir
        weights_dir = weights_dir_for(run_dir)
        leftovers.add(weights_dir)
        if offer.needs_janitor:
            await asyncio.to_thread(start_janitor, run_dir)
        endpoint = f"ipc://{run_dir}/ctrl"
        try:
            async with bind_router(endpoint, ANY) as router:
                local = LocalNode(
                    router, endpoint, leftovers, log_dir, offer.interpreter
                )
                async with bind_router(local.drafts, ANY) as drafts:
                    pool = offer.make_pool(
                        log_dir, leftovers, offer.interpreter, offer.keys
                    )
                    service = _Service(
                        offer, local, router, drafts, pool, weights_dir, figures
                    )
                    why = await service.run(leave)
        except ExceptionGroup as group:
            raise root_of(group) from group
        finally:
            figures.joined = 0
            leftovers.remove()
        if why is not None:
            return why


class _Service:
    """One session with a controller, and the processes that it asked for."""

    def __init__(
        self,
        offer: Offer,
        local: LocalNode,
        router: Router[msgspec.Raw],
        drafts: Router[msgspec.Raw],
        pool: NodePool,
        weights_dir: Path,
        figures: AgentFigures,
    ) -> None:
        self._offer = offer
        self._controller = offer.controller
        self._figures = figures
        self._weights_dir = weights_dir
        self._relay: Relay
        self._local = local
        self._router = router
        self._drafts = drafts
        self._pool = pool
        self._session = Session(
            lambda name: connect_tcp(self._where(), name, FRAME, offer.keys),
            timeout_s=offer.death_timeout_s,
            keys_are_right=figures.sessions > 0,
        )
        self._over: asyncio.Future[str | None]
        self._over = asyncio.get_running_loop().create_future()
        self._is_welcome = False
        self._is_parted = False  # nothing more is to be said to the controller
        self._tasks: asyncio.TaskGroup
        self._running: dict[bytes, Running] = {}
        self._say(
            Join(
                protocol=PROTOCOL_VERSION,
                version=__version__,
                name=offer.name,
                machine=offer.machine,
                packages=dict(offer.interpreter.packages),
                num_instances=offer.num_instances,
                endpoint=local.endpoint,
                drafts=local.drafts,
                log_dir=str(local.log_dir),
                weights_dir=str(weights_dir),
            )
        )

    async def run(self, leave: asyncio.Event) -> str | None:
        """Serve until the session is over; why, or None if another may follow."""
        _log.info("looking for a controller at %s", self._controller)
        async with asyncio.TaskGroup() as self._tasks:
            carrying = self._tasks.create_task(
                self._router.run(self._on_peer, self._on_peer_lost, self._on_peer_gone)
            )
            relaying = self._tasks.create_task(self._drafts.run(self._on_client))
            pooling = self._tasks.create_task(
                self._pool.run(
                    lambda data: self._say(FromPool(data)), lambda: self._controller
                )
            )
            self._relay = Relay(
                self._weights_dir,
                self._say,
                self._figures,
                self._tasks,
                self._offer.keys,
            )
            talking = self._tasks.create_task(self._talk(leave))
            leaving = self._tasks.create_task(self._leave(leave))
            try:
                return await self._over
            finally:
                for task in (talking, leaving):
                    task.cancel()
                await asyncio.wait([talking, leaving])
                if not self._is_parted:
                    await self._session.close("the node has ended", _LAST_WORDS_S)
                for running in list(self._running.values()):
                    running.end_soon(0.0)
                if self._running:
                    await asyncio.wait([r.over for r in self._running.values()])
                self._relay.close()
                pooling.cancel()
                await asyncio.wait([pooling])
                carrying.cancel()
                relaying.cancel()

    async def _talk(self, leave: asyncio.Event) -> None:
        try:
            await self._session.run(self._take_any)
        except SessionOver as error:
            self._is_parted = True
            self._on_goodbye(error.reason)
        except SessionLost as error:
            self._is_parted = True
            if leave.is_set():
                self._end("it was told to end")
            elif self._is_welcome:
                _log.warning("the controller is lost: %s", error)
                self._end(None)
            else:
                where = self._controller
                self._fail(NoController(f"there is no controller at {where}: {error}"))
        except ConnectionRefused as error:
            self._is_parted = True
            self._fail(error)

    def _where(self) -> str:
        """Where the controller is by now."""
        found = self._offer.look_again() or self._controller
        if found != self._controller:
            _log.info("looking for a controller at %s", found)
            self._controller = found
        return found

    def _on_goodbye(self, reason: bytes) -> None:
        if not reason:
            _log.warning("the controller has given this node up, and it joins anew")
            self._end(None)
            return
        goodbye = GOODBYE.decode(reason)
        if goodbye.is_refusal:
            self._fail(NodeRefused(goodbye.why))
        else:
            self._end(goodbye.why)

    def _end(self, why: str | None) -> None:
        if not self._over.done():
            self._over.set_result(why)

    def _fail(self, error: BaseException) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    async def _leave(self, leave: asyncio.Event) -> None:
        await leave.wait()
        if self._is_welcome:
            _log.info("leaving; the work of this node goes on elsewhere")
        self._say(Leave("it was told to end"))
        # The controller then says goodbye, if it is there at all.
        self._session.timeout_s = _LEAVE_S if self._is_welcome else _LAST_WORDS_S

    def _say(self, message: msgspec.Struct) -> None:
        try:
            self._session.put(encode(message))
        except LinkFull as error:
            _log.warning("the controller takes nothing: %s", error)
            self._end(None)

    def _take_any(self, data: bytes) -> None:
        """Take what the controller says; nonsense costs its session."""
        try:
            self._take(data)
        except Exception:
            _log.exception("a message of the controller could not be handled")
            self._end(None)

    def _take(self, data: bytes) -> None:
        message = TO_NODE.decode(data)
        match message:
            case Welcome(lease_s, num_nodes):
                self._is_welcome = True
                self._figures.joined = 1
                self._figures.sessions += 1
                self._session.timeout_s = lease_s
                _log.info("joined the controller at %s", self._controller)
                if num_nodes > 1:
                    _log.info("each of its engines spans %d nodes", num_nodes)
                self._relay.serve(self._controller)
            case StartProcess(peer):
                self._running[peer] = running = Running()
                self._tasks.create_task(self._live(message, running))
            case ToPeer(peer, inner):
                self._router.send(peer, inner)
            case ForgetPeer(peer):
                self._router.forget(peer)
            case ToPool(inner):
                self._pool.take(inner)
            case Drafts(client, inner):
                self._drafts.send(client, inner)
            case KillProcess(peer) if peer in self._running:
                self._running[peer].kill()
            case EndProcess(peer, grace_s) if peer in self._running:
                self._running[peer].end_soon(grace_s)
            case NoteMemory(peer) if peer in self._running:
                self._tasks.create_task(self._running[peer].note())
            case Locate():
                self._tasks.create_task(self._answer(located(self._controller)))
            case Reach(address):
                self._tasks.create_task(self._answer(reached(address)))
            case FetchFiles() | FetchRest() | Block() | DropFiles():
                self._relay.take(message)

    async def _answer(self, answer: Awaitable[msgspec.Struct]) -> None:
        self._say(await answer)

    async def _live(self, start: StartProcess, running: Running) -> None:
        """Start a process, and tell of its end, once nothing of it remains."""
        peer = start.peer
        try:
            _log.info("starting %s", start.name)
            process = await self._local.start(peer, start.name, start.line, start.env)
            self._figures.starts += 1
            self._figures.instances += 1
            try:
                status = await running.run(process)
            finally:
                self._figures.instances -= 1
            self._figures.deaths += not running.was_told
            self._say(
                Ended(peer, status, log_tail=process.log_tail(), cause=process.cause())
            )
        except InstanceStartError as error:
            self._say(Ended(peer, status=1, cause=str(error)))
        except Exception as error:  # of this process alone
            _log.exception("%s is given up", start.name)
            self._say(Ended(peer, status=1, cause=describe(error)))
        finally:
            del self._running[peer]
            running.over.set_result(None)

    def _on_client(self, client: bytes, message: msgspec.Raw) -> None:
        self._say(AskDrafts(client, message))

    def _on_peer(self, peer: bytes, message: msgspec.Raw) -> None:
        self._say(FromPeer(peer, message))

    def _on_peer_lost(self, peer: bytes, why: str) -> None:
        self._say(PeerLost(peer, why))

    def _on_peer_gone(self, peer: bytes) -> None:
        self._say(PeerGone(peer))
