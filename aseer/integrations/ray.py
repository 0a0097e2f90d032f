"""Nodes on a cluster of Ray's: `EngineConfig(nodes="ray")`.

Ray reserves a bundle of GPUs on each host, in one placement group, and keeps an actor
in each, which is what `aseer node` is elsewhere. So no other placement group or actor
is given those GPUs, also while an actor that died is started again. Ray starts, places
and ends; all else goes over the connections of aseer's own nodes:

    trainer's process    RayNodes --- placement group, actors ---> NodeActor, one a host
                         Cluster  <------- tcp, encrypted --------- its agent: instances

Hosts that join Ray later have placement groups of their own, if all hosts are wanted.

Actors end with the trainer's process, whose job or actor owns them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from aseer.errors import AseerError, ConfigError, EngineError, describe
from aseer.kv.agent import PoolAgent
from aseer.node.agent import Offer, run_agent
from aseer.node.children import in_thread
from aseer.node.interpreter import interpreter_at
from aseer.node.machine import this_machine

try:
    import ray
    from ray.util import (
        get_node_ip_address,
        placement_group,
        placement_group_table,
        remove_placement_group,
    )
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise ConfigError(
        f"nodes='ray' needs Ray, which cannot be imported here ({describe(error)}); "
        'run `pip install "aseer[ray]"`, in the environments of all hosts'
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from aseer.config import EngineConfig
    from aseer.transport.keys import Keys

_log = logging.getLogger("aseer")

P = ParamSpec("P")
T = TypeVar("T")

# Between two looks whether Ray has found room; also how long a thread may outlive them.
_LOOK_S = 1.0
# For agents that were told goodbye to remove their files before they are killed.
_GOODBYE_S = 3.0
# Between two looks for hosts that have joined Ray, or left it.
_HOSTS_INTERVAL_S = 5.0
# Ray's own label of each host.
_HOST_LABEL = "ray.io/node-id"
# For Ray to do what it is asked at the end.
_END_S = 10.0


# Starts nodes in this process instead, if set: where they have a trainer's GPUs.
instead: Callable[[EngineConfig], RayNodes] | None = None


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """What an actor is told; the fields are those of `Offer`."""

    controller: str
    keys: Keys
    num_instances: int | None
    python: str | None
    log_dir: Path | None
    gpus: tuple[str, ...] | None = None  # None = those that Ray reserved for the actor


class NodeActor:
    """A node, on a host that Ray chose."""

    async def serve(self, settings: AgentSettings) -> str:
        """Run instances until the controller says goodbye; why it did.

        Ray calls this anew whenever it has started the actor again.

        Raises:
            ConfigError: the host has not what the node needs.
            NodeRefused: the controller has no use for the node.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        if settings.log_dir is not None:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
        interpreter = await in_thread(interpreter_at, settings.python)
        gpus: Sequence[str] | None = settings.gpus
        if gpus is None:
            gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        machine = this_machine(interpreter.packages)
        offer = Offer(
            controller=settings.controller,
            keys=settings.keys,
            name=socket.gethostname(),
            machine=replace(machine, gpus=tuple(gpus)),
            interpreter=interpreter,
            num_instances=settings.num_instances,
            log_dir=settings.log_dir,
            death_timeout_s=math.inf,  # Ray ends the actor, when its trainer has ended
            make_pool=PoolAgent,
            needs_janitor=True,  # Ray kills it with its children
        )
        return await run_agent(offer, asyncio.Event())


def launcher(config: EngineConfig) -> RayNodes:
    """What starts the nodes that an engine wants; nothing is reserved yet.

    Raises:
        ConfigError: Ray is not initialised, or has no hosts for them.
    """
    if not ray.is_initialized():
        raise ConfigError(
            "nodes='ray', but this process is not connected to Ray; call ray.init(), "
            "for a cluster that runs ray.init(address='auto'), before aseer.Engine"
        )
    if instead is not None:
        return instead(config)
    hosts = hosts_there()
    bundles = bundles_for(config, list(hosts.values()))
    return RayNodes(config, bundles, get_node_ip_address(), hosts)


def hosts_there() -> dict[str, Mapping[str, float]]:
    """All that Ray has on each host that is alive, in use or not, by the host's id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def bundles_for(
    config: EngineConfig, hosts: Sequence[Mapping[str, float]]
) -> list[dict[str, int]]:
    """What to reserve on each host that is taken, those with the most GPUs first.

    Args:
        hosts: of each that is alive, all that Ray has there, in use or not.
    Raises:
        ConfigError: they have not what the settings ask for.
    """
    total = [int(host.get("GPU", 0)) for host in hosts]
    on_gpus = config.device == "cuda" or (config.device != "cpu" and any(total))
    found = (bundle_for(config, host, on_gpus=on_gpus) for host in hosts)
    bundles = [bundle for bundle in found if bundle is not None]
    bundles.sort(key=lambda bundle: -bundle.get("GPU", 0))
    least = config.gpus_per_instance * (config.num_instances or 1)
    what = (f"{least} GPUs" if least > 1 else "a GPU") if on_gpus else "a CPU"
    if len(bundles) < max(config.min_nodes, 1):
        raise ConfigError(
            f"{max(config.min_nodes, 1)} hosts with {what} each are wanted, and "
            f"{len(bundles)} of the {len(hosts)} in Ray's cluster have that (GPUs by "
            f"host: {total}); start Ray on more, or lower min_nodes, num_instances or "
            "gpus_per_instance"
        )
    return bundles[: config.min_nodes or None]


def bundle_for(
    config: EngineConfig, host: Mapping[str, float], *, on_gpus: bool
) -> dict[str, int] | None:
    """What to reserve on a host; None if it has not what the settings ask for.

    Args:
        on_gpus: whether engines run on GPUs.
    """
    if not on_gpus:
        return {"CPU": 1} if host.get("CPU", 0) >= 1 else None
    per, wanted, total = (
        config.gpus_per_instance,
        config.num_instances,
        int(host.get("GPU", 0)),
    )
    least = per * (wanted or 1)
    if total < least:
        return None
    return {"GPU": least if wanted else total - total % per}


class RayNodes:
    """See `Launcher`; for one opening of an engine."""

    def __init__(
        self,
        config: EngineConfig,
        bundles: list[dict[str, int]],
        host: str,
        hosts: Iterable[str] = (),
    ) -> None:
        """Ask nothing of Ray yet.

        Args:
            bundles: to reserve, one a host.
            host: the address that Ray has of this one.
            hosts: ids of those that were looked at for `bundles`.
        """
        self.host = f"[{host}]" if ":" in host else host
        self.num_nodes = len(bundles)
        self.state = "Ray is asked to place them"
        self.failure: AseerError | None = None
        self._config = config
        self._bundles = bundles
        self._lock = threading.Lock()  # nothing is begun once the end has come
        self._is_over = False
        self._group: Any = None
        self._actors: list[Any] = []
        self._serving: list[Any] = []  # an object reference for each actor
        self._seen = set(hosts)
        self._late: dict[str, tuple[Any, Any]] = {}  # group and actor, by host

    async def run(self, address: str, keys: Keys) -> None:
        """See `Launcher`.

        Raises:
            EngineError: Ray does not do it.
        """
        config = self._config
        settings = AgentSettings(
            controller=address,
            keys=keys,
            num_instances=config.num_instances,
            python=None if config.python is None else str(config.python),
            log_dir=config.log_dir,
        )
        await _asked(self._reserve)
        while not await _asked(self._has_room):
            pass
        await _asked(self._start, settings)
        self.state = (
            f"Ray has placed them, and they connect to {address}, which has to be open "
            "to their hosts; what they say is in Ray's logs"
        )
        async with asyncio.TaskGroup() as tasks:
            for serving in self._serving:
                tasks.create_task(self._watch(serving))
            while not config.min_nodes:
                await asyncio.sleep(_HOSTS_INTERVAL_S)
                for serving in await self._taken(settings):
                    tasks.create_task(self._watch(serving, is_late=True))

    async def close(self) -> None:
        """See `Launcher`."""
        try:
            async with asyncio.timeout(_END_S):
                await in_thread(self._end)
        except Exception as error:
            _log.warning("Ray may not have ended its agents: %s", describe(error))

    def _reserve(self) -> None:
        with self._lock:
            if not self._is_over:
                bundles = [dict(bundle) for bundle in self._bundles]
                self._group = placement_group(bundles, strategy="STRICT_SPREAD")

    def _forget_hosts(self) -> None:
        """Reserve anew if a host is gone: Ray counts one that died for a while."""
        with self._lock:
            there = {} if self._is_over else hosts_there()
            if not there or self._seen <= there.keys():
                return
            self._seen &= there.keys()
            left = [there[host] for host in self._seen]
            self._bundles = bundles_for(self._config, left)
            self.num_nodes = len(self._bundles)
            remove_placement_group(self._group)
        self._reserve()

    def _has_room(self) -> bool:
        if self._group.wait(timeout_seconds=_LOOK_S):
            return True
        if not self._config.min_nodes:
            self._forget_hosts()
        total, free = ray.cluster_resources(), ray.available_resources()
        wanted = ", ".join(str(bundle) for bundle in self._bundles)
        self.state = (
            f"Ray has no room for {wanted}, each on a host of its own: of "
            f"{total.get('GPU', 0):g} GPUs {free.get('GPU', 0):g} are free, of "
            f"{total.get('CPU', 0):g} CPUs {free.get('CPU', 0):g}; release what others "
            "have reserved, or lower num_instances or min_nodes"
        )
        return False

    def _start(self, settings: AgentSettings) -> None:
        with self._lock:
            if self._is_over:
                return
            for index, bundle in enumerate(self._bundles):
                actor = _actor_in(self._group, index, bundle)
                self._actors.append(actor)
                self._serving.append(actor.serve.remote(settings))

    async def _taken(self, settings: AgentSettings) -> list[Any]:
        """Take hosts that have joined; what there is to watch of them."""
        try:
            return await _asked(self._take_hosts, settings)
        except EngineError as error:
            _log.warning("hosts that join Ray later are not taken now: %s", error)
            return []

    def _take_hosts(self, settings: AgentSettings) -> list[Any]:
        """Reserve what is to be reserved on hosts that are new, and start actors there.

        While Ray looks for a host in place of one that died, a new one is for that.
        """
        taken = []
        with self._lock:
            there = {} if self._is_over else hosts_there()
            for host in self._late.keys() - there.keys():
                self._give_back(*self._late.pop(host))
            state = placement_group_table(self._group)["state"] if there else ""
            new = there.keys() - self._seen if state == "CREATED" else set()
            self._seen |= new
            on_gpus = "GPU" in self._bundles[0]
            for host in new:
                bundle = bundle_for(self._config, there[host], on_gpus=on_gpus)
                if bundle is None:
                    continue
                group = placement_group(
                    [dict(bundle)],
                    strategy="STRICT_PACK",
                    bundle_label_selector=[{_HOST_LABEL: host}],
                )
                actor = _actor_in(group, 0, bundle)
                self._late[host] = group, actor
                taken.append(actor.serve.remote(settings))
                self._serving.append(taken[-1])
                _log.info("a host has joined Ray, and is taken with %s", bundle)
        return taken

    def _give_back(self, group: Any, actor: Any) -> None:
        ray.kill(actor, no_restart=True)
        remove_placement_group(group)

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            if not ray.is_initialized():
                return
            if self._serving:
                num = len(self._serving)
                ray.wait(self._serving, num_returns=num, timeout=_GOODBYE_S)
            for actor in self._actors:
                ray.kill(actor, no_restart=True)
            if self._group is not None:
                remove_placement_group(self._group)
            for group, actor in self._late.values():
                self._give_back(group, actor)

    async def _watch(self, serving: Any, *, is_late: bool = False) -> None:
        try:
            why = await asyncio.wrap_future(serving.future())
            _log.info("an agent that Ray had placed has ended: %s", why)
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            told = f"an agent that Ray has placed failed: {describe(cause)}"
            _log.error("%s", told)
            if not is_late:
                self.failure = self.failure or EngineError(told)


def _actor_in(group: Any, index: int, bundle: Mapping[str, int]) -> Any:
    """Have Ray keep an actor in a bundle of a placement group."""
    strategy = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=index
    )
    remote = ray.remote(NodeActor)
    return remote.options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=strategy,
    ).remote()


async def _asked(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what asks Ray for something, in a thread.

    Raises:
        EngineError: Ray does not do it.
    """
    try:
        return await in_thread(function, *args, **kwargs)
    except Exception as error:
        raise EngineError(f"Ray cannot start the nodes: {describe(error)}") from error
