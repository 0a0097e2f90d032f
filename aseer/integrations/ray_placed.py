"""Nodes on the hosts of a trainer that has its GPUs of Ray already.

The trainer's processes and the engines take turns on the same GPUs, so nothing is
reserved for the engines: on each host of the trainer's Ray keeps an actor, which is
told the GPUs that the trainer has there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aseer.integrations import ray as on_ray
from aseer.integrations.ray import NodeActor, RayNodes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.config import EngineConfig
    from aseer.integrations.ray import AgentSettings
    from aseer.integrations.settings import HostShare


def place_on(hosts: Sequence[HostShare]) -> None:
    """From now on `EngineConfig(nodes="ray")` in this process is on these hosts."""
    on_ray.instead = lambda config: PlacedNodes(config, hosts)


class PlacedNodes(RayNodes):
    """See `Launcher`."""

    def __init__(self, config: EngineConfig, hosts: Sequence[HostShare]) -> None:
        """Ask nothing of Ray yet."""
        super().__init__(config, [{} for _ in hosts], get_node_ip_address())
        self._hosts = hosts

    def _reserve(self) -> None:
        """Nothing: the trainer has it."""

    def _has_room(self) -> bool:
        return True

    def _start(self, settings: AgentSettings) -> None:
        with self._lock:
            if self._is_over:
                return
            for host in self._hosts:
                actor = _actor_on(host.node_id)
                own = replace(
                    settings, gpus=host.gpus, num_instances=host.num_instances
                )
                self._actors.append(actor)
                self._serving.append(actor.serve.remote(own))


def _actor_on(node_id: str) -> Any:
    """Have Ray keep an actor on a host, with nothing of what Ray counts there."""
    return (
        ray.remote(NodeActor)
        .options(
            num_cpus=0,
            num_gpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env={
                "env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            },
        )
        .remote()
    )
