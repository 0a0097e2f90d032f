"""verl's trainer with rollouts by aseer: `actor_rollout_ref.rollout.name=aseer`.

verl loads this module by itself, in each of its processes, through the entry point
group `verl.plugins`; importing it registers the name. Agent loops, tools, rewards,
validation and the trainer stay verl's own:

    trainer's driver    AseerReplica --- starts, once a trainer ---> AseerServer (actor)
    agent loop workers  ---------------- generate(), one at a time ------> the engine
    trainer's rank 0    AseerRollout --- writes the weights into shared memory --^
    its other ranks     AseerRollout --- gather the same tensors with it

Several replicas, as verl counts them, share one server: which of the GPUs samples a
request is for the scheduler to decide.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.device import get_device_name
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from aseer.errors import ConfigError
from aseer.integrations.sending import SENDER, send_weights
from aseer.integrations.verl_server import AseerServer
from aseer.integrations.verl_settings import server_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

NAME = "aseer"
_SERVER = "aseer_server"
# The scheduler is to see every request of a step, and none may be in the way of an
# abort: Ray lets no more calls than this run at once.
_MAX_CONCURRENCY = 1_000_000


class AseerRollout(BaseRollout):  # type: ignore[misc]
    """In every process of the trainer: gives the engine new weights."""

    async def resume(self, tags: list[str]) -> None:
        """Take the GPUs' memory back for the weights, or for the KV cache."""
        if self._is_sender():
            await _server().wake_up.remote(tags)

    async def release(self) -> None:
        """Release the GPUs' memory."""
        if self._is_sender():
            await _server().sleep.remote()

    async def update_weights(
        self,
        weights: Iterator[tuple[str, Any]] | AsyncIterator[tuple[str, Any]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        peft_config: Any = None,
        **_: Any,
    ) -> None:
        """Send all tensors from rank 0; the other ranks take them from their iterators,
        since gathering one needs all.

        Raises:
            ConfigError: adapters or differences were given instead of weights.
            WeightUpdateError: the engine keeps the weights it has.
        """
        if wire_format != "named_tensors" or peft_config is not None:
            given = "adapters" if peft_config is not None else f"{wire_format!r}"
            raise ConfigError(
                f"rollout.name=aseer takes whole weights, not {given}; for LoRA set "
                "actor_rollout_ref.model.lora.merge=True"
            )
        actor = _server() if self._is_sender() else None
        await send_weights(weights, actor, global_steps)

    def _is_sender(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == SENDER


class AseerReplica(RolloutReplica):  # type: ignore[misc]
    """In the trainer's driver: starts the server, or finds it started."""

    async def init_hybrid(self, worker_group: Any) -> None:
        """Take all of the trainer's processes, whichever replica this is."""
        self._all_workers = list(worker_group.workers)
        await super().init_hybrid(worker_group)

    async def init_standalone(self) -> None:
        """Not supported."""
        raise ConfigError(_only_hybrid("on GPUs of their own (separate_async)"))

    async def init_colocated(self, resource_pool: Any) -> None:
        """Not supported."""
        raise ConfigError(_only_hybrid("of reward and teacher models"))

    async def launch_servers(self) -> None:
        """Start the actor that has the engine, unless another replica has."""
        places = await asyncio.gather(
            *[worker.__ray_call__.remote(_place) for worker in self._all_workers]
        )
        settings = server_settings(
            self.config,
            self.model_config,
            places,
            on_gpus=get_device_name() == "cuda",
        )
        node, _ = places[SENDER]  # the sender's host: what it writes is read there
        server = (
            ray.remote(AseerServer)
            .options(
                name=_SERVER,
                get_if_exists=True,
                max_concurrency=_MAX_CONCURRENCY,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                # It has no GPU of Ray's, and gives its instances those of the trainer.
                runtime_env={
                    "env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
                },
            )
            .remote(settings)
        )
        await server.start.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"{NAME}:{self.replica_rank}"


def _only_hybrid(what: str) -> str:
    return (
        f"rollout.name=aseer does not support rollouts {what}; it samples where the "
        "trainer's policy is (trainer.v1.trainer_mode=sync)"
    )


def _place(worker: Any) -> tuple[str, str]:
    """A trainer's process's node, and the id of its GPU there."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU") or [""]
    return context.get_node_id(), gpus[0]


def _server() -> Any:
    return ray.get_actor(_SERVER)


_ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.{AseerRollout.__name__}"
RolloutReplicaRegistry.register(NAME, lambda: AseerReplica)
