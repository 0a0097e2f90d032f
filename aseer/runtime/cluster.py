"""Nodes on other hosts: taken when they come, put to work, let go.

A node says what it is; its instances are planned as this machine's are, from the same
settings and what the node has. One that is of another release, or cannot run what the
settings ask for, is refused in words that it prints. Nodes come and go while rollouts
run; what ran on one that is gone goes on elsewhere. Where an instance spans nodes, they
form gangs, anew whenever one is gone.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from aseer.compat.versions import check_vllm, installed_vllm
from aseer.dgds.messages import TO_SERVER
from aseer.errors import AseerError, ConfigError, EngineError, describe, root_of
from aseer.instance.messages import FROM_INSTANCE
from aseer.kv.messages import PeerSpec
from aseer.node.chain import Chains
from aseer.node.children import in_thread
from aseer.node.fetching import block_of
from aseer.node.interpreter import Interpreter
from aseer.node.messages import (
    FROM_NODE,
    VERSIONS,
    AskDrafts,
    Drafts,
    GetBlock,
    Goodbye,
    Join,
    Leave,
    Welcome,
    encode,
)
from aseer.node.network import reachable
from aseer.node.remote import RemoteNode
from aseer.runtime.gang import Gang
from aseer.runtime.gangs import Gangs, forms_gangs
from aseer.runtime.launch import plan_instances
from aseer.runtime.team import Team
from aseer.transport.base import PROTOCOL_VERSION, Reader
from aseer.transport.sessions import Sessions
from aseer.version import __version__
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aseer.config import EngineConfig
    from aseer.dgds.server import DraftServer
    from aseer.models.traits import ModelTraits
    from aseer.node.machine import Launch
    from aseer.runtime.instances import InstancePool
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.launcher import Launcher
    from aseer.transport.keys import Keys
    from aseer.transport.sessions import Frame
    from aseer.transport.tcp import TcpRouter

_log = logging.getLogger("aseer")

_LOOK_INTERVAL_S = 0.5
# Between two lines of the log that say how many nodes are still waited for.
_TELL_INTERVAL_S = 30.0
# For last words to leave.
_GOODBYE_S = 0.5


class Cluster:
    """The nodes of an engine, beside its own machine."""

    def __init__(
        self,
        config: EngineConfig,
        traits: ModelTraits | None,
        router: TcpRouter[Frame],
        launcher: Launcher | None = None,
        keys: Keys | None = None,
    ) -> None:
        """Have no nodes yet.

        Args:
            launcher: starts some; it is given the keys.
        """
        self._config = config
        self._launcher = launcher
        self._keys = keys
        self._traits = traits
        self._sessions = Sessions(router, timeout_s=config.node_timeout_s)
        self._reader = Reader(FROM_INSTANCE)
        self._drafters = Reader(TO_SERVER)
        self._draft_server: DraftServer | None = None
        self._pool: InstancePool
        self._kv_pools: KvPools
        self._nodes: dict[int, RemoteNode] = {}
        self._chains = Chains(has_bases=config.weights == "delta")
        self._gangs = Gangs(config, lambda: self.nodes, self._attend)
        self._joined: asyncio.Queue[tuple[RemoteNode, list[Launch]]] = asyncio.Queue()
        self._wanted: asyncio.Queue[tuple[RemoteNode, GetBlock]] = asyncio.Queue()
        self._failure: AseerError | None = None
        self._refusal = ""
        self.address = router.endpoint

    @property
    def kv_peers(self) -> PeerSpec | None:
        """How this host's KV pool talks to those of nodes; None = there is no key, and
        they do not.
        """
        if self._keys is None:
            return None
        return PeerSpec(f"{self.address.rpartition(':')[0]}:*", self._keys)

    @property
    def nodes(self) -> list[RemoteNode]:
        """Those that are there."""
        return list(self._nodes.values())

    async def talk(
        self,
        pool: InstancePool,
        draft_server: DraftServer | None,
        kv_pools: KvPools,
    ) -> None:
        """Carry messages, and the files that nodes fetch, until cancelled."""
        self._pool = pool
        self._kv_pools = kv_pools
        self._draft_server = draft_server
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sessions.run(self._on_message, self._on_over))
            tasks.create_task(self._send_blocks())

    async def _send_blocks(self) -> None:
        while True:
            node, wanted = await self._wanted.get()
            node.weights.num_wanted -= 1
            found = node.weights.find(wanted)
            if found is not None:
                node.say(await in_thread(block_of, wanted, *found))

    async def work(self) -> None:
        """Start nodes, if that is ours, and put them to work as they come, until
        cancelled.
        """
        async with asyncio.TaskGroup() as tasks:
            if self._launcher is not None and self._keys is not None:
                address = reachable(self.address, self._launcher.host)
                tasks.create_task(self._launcher.run(address, self._keys))
            while True:
                node, launches = await self._joined.get()
                if forms_gangs(self._config):
                    self._gangs.add(node, launches, kind_of(node.join), tasks)
                else:
                    tasks.create_task(self._attend(node, launches))

    async def wait_for_nodes(self) -> None:
        """Wait until as many nodes as are wanted have instances that are up.

        Raises:
            InstanceStartError: an instance of one did not come up.
            EngineError: a node could not be started, or too few came within
                `start_timeout_s`.
        """
        clock, next_line_s = WakingClock(2 * _LOOK_INTERVAL_S), 0.0
        timeout_s = self._config.start_timeout_s
        launcher, num_nodes = self._launcher, self._config.min_nodes
        wanted = f"min_nodes={num_nodes}"
        while True:
            if launcher is not None:  # hosts that it counts on may go
                num_nodes, wanted = launcher.num_nodes, str(launcher.num_nodes)
            num = sum(self._is_up(node) for node in self.nodes)
            if num >= num_nodes:
                return
            if self._failure is not None:
                raise self._failure
            if launcher is not None and launcher.failure is not None:
                raise launcher.failure
            apart = self._gangs.apart
            what = (
                f"{num} of {wanted} nodes are up ({len(self.nodes)} have joined); "
                f"{self._advice}{self._refusal}{apart and '; ' + apart}"
            )
            if clock.read() > timeout_s:
                raise EngineError(f"after start_timeout_s={timeout_s:g} {what}")
            if clock.read() >= next_line_s:
                _log.warning("%s", what)
                next_line_s += _TELL_INTERVAL_S
            await asyncio.sleep(_LOOK_INTERVAL_S)

    def _is_up(self, node: RemoteNode) -> bool:
        """Whether all that there is for a node to do is begun."""
        if not forms_gangs(self._config):
            return self._pool.is_up(node)
        return self._gangs.are_up(node, self._pool.is_up)

    @property
    def _advice(self) -> str:
        if self._launcher is not None:
            return self._launcher.state
        where = reachable(self.address)
        return f"on each host run `aseer node --controller {where}`"

    async def dismiss(self, why: str) -> None:
        """Tell all nodes that the engine is over, and take no more."""
        for session in list(self._nodes):
            self._close(session, Goodbye(why))
        await asyncio.sleep(_GOODBYE_S if self._nodes else 0)
        self.lose_all(why)

    def lose_all(self, why: str) -> None:
        """Nothing is heard of any node any more."""
        for node in self.nodes:
            node.lose(why)
        self._nodes.clear()

    async def _attend(
        self, place: RemoteNode | Gang | Team, launches: list[Launch] | None = None
    ) -> None:
        """Have instances run on a node, or on some together, until it is gone.

        Those whose instances do not start are let go.

        Args:
            launches: of a node's instances.
        """
        nodes = [place] if isinstance(place, RemoteNode) else place.nodes
        try:
            if isinstance(place, Team):
                await self._pool.attend_team(place)
            elif isinstance(place, Gang):
                await self._pool.attend(place, [place.launch])
            else:  # nodes have a pool each, and what spans them has none
                launches, pulls = launches or [], self._keys is not None
                await self._kv_pools.join(place, launches, pulls=pulls)
                await self._pool.attend(place, launches)
        except* Exception as group:
            error = root_of(group)
            names = " and ".join(node.name for node in nodes)
            if not isinstance(error, AseerError):  # a fault of ours costs no more
                _log.error("the work of node %s failed", names, exc_info=error)
                error = EngineError(describe(error))
            _log.error("node %s is not used: %s", names, error)
            self._failure = self._failure or error
            for session, node in list(self._nodes.items()):
                if node in nodes:
                    self._close(session, Goodbye(str(error), is_refusal=True))
                    del self._nodes[session]
                    node.lose(str(error))
        finally:
            if isinstance(place, Team):  # whose nodes may be in others
                for node in place.nodes:
                    if node.lost_because is not None:
                        self._kv_pools.leave(node)
            else:
                self._kv_pools.leave(place)

    def _on_message(self, session: int, data: bytes) -> None:
        node = self._nodes.get(session)
        if node is None:
            self._join(session, data)
            return
        message = FROM_NODE.decode(data)
        if isinstance(message, Leave):
            _log.info("node %s leaves", node.name)
            self._close(session, Goodbye(message.why))
            del self._nodes[session]
            node.lose(message.why)
        elif isinstance(message, GetBlock):
            node.weights.check_wanted(message)
            self._wanted.put_nowait((node, message))
        elif isinstance(message, AskDrafts):
            self._ask_drafts(node, message)
        else:
            pool = self._pool
            node.take(message, self._on_peer, pool.on_lost, pool.on_gone)

    def _ask_drafts(self, node: RemoteNode, asked: AskDrafts) -> None:
        """Pass a drafter's question on; the answer comes on another thread."""
        question = self._drafters.read([bytes(asked.message)], asked.client)
        if self._draft_server is None or question is None:
            return
        loop = asyncio.get_running_loop()

        def take(answer: bytes) -> None:
            data = Drafts(asked.client, msgspec.Raw(answer))
            with suppress(RuntimeError):  # the engine has ended, and its loop
                loop.call_soon_threadsafe(node.say, data)

        self._draft_server.ask(question, take)

    def _on_peer(self, peer: bytes, data: msgspec.Raw) -> None:
        message = self._reader.read([bytes(data)], peer)
        if message is not None:
            self._pool.on_message(peer, message)

    def _on_over(self, session: int, why: str) -> None:
        node = self._nodes.pop(session, None)
        if node is not None:
            _log.warning("node %s is lost: %s", node.name, why)
            node.lose(why)

    def _join(self, session: int, data: bytes) -> None:
        try:
            node, launches = self._take(session, data)
        except Exception as error:
            why = f"the controller refuses this node: {describe(error)}"
            if isinstance(error, AseerError):
                why = f"the controller refuses this node: {error}"
            _log.error("a node was refused: %s", why)
            self._refusal = f"; one was refused: {why}"
            self._close(session, Goodbye(why, is_refusal=True))
            return
        self._nodes[session] = node
        config = self._config
        welcome = Welcome(config.node_timeout_s, config.nodes_per_instance)
        self._sessions.put(session, encode(welcome))
        self._joined.put_nowait((node, launches))
        what = "instance(s)" if config.nodes_per_instance == 1 else "part(s) of them"
        _log.info("node %s has joined, with %d %s", node.name, len(launches), what)

    def _take(self, session: int, data: bytes) -> tuple[RemoteNode, list[Launch]]:
        """A node that wants to join, and what it is to run.

        Raises:
            ConfigError: it is of another release, or has not what it needs.
        """
        theirs = VERSIONS.decode(data)
        if (theirs.protocol, theirs.version) != (PROTOCOL_VERSION, __version__):
            raise ConfigError(
                f"node {theirs.name} runs aseer {theirs.version} (protocol "
                f"{theirs.protocol}), and the controller runs {__version__} (protocol "
                f"{PROTOCOL_VERSION}); install the same on both"
            )
        join = FROM_NODE.decode(data)
        assert isinstance(join, Join)
        node = RemoteNode(
            join, lambda message: self._sessions.put(session, message), self._chains
        )
        settings = replace(self._config, gpus=None)
        interpreter = Interpreter(f"node {join.name}", join.packages, False)
        launches = plan_instances(
            settings, join.machine, self._traits, interpreter, join.num_instances or 0
        )
        if launches[0].backend == "vllm":
            check_vllm(join.packages)
        return node, [
            replace(each, share=f"{each.share} of node {join.name}", interpreter=None)
            for each in launches
        ]

    def _close(self, session: int, goodbye: Goodbye) -> None:
        self._sessions.close(session, encode(goodbye))


def kind_of(join: Join) -> Hashable:
    """What nodes that run an instance together have to have in common."""
    machine = join.machine
    return installed_vllm(join.packages), machine.cpu_only, bool(machine.gpus)
