"""What of aseer is in the processes of SkyRL's policy, and in its trainer's.

`aseer.integrations.skyrl` has SkyRL's entry point. The policy's workers must not import
that: it has processes of theirs begin anew instead of forking, and Python then leaves a
semaphore in /dev/shm for each lock of a worker that Ray kills, as it does at the end.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist
from skyrl.backends.skyrl_train import weight_sync
from skyrl.backends.skyrl_train.inference_servers.base import InferenceEngineInterface
from skyrl.backends.skyrl_train.inference_servers.engine_utils import (
    get_sampling_params_for_backend,
)
from skyrl.backends.skyrl_train.inference_servers.utils import resolve_policy_model_name
from skyrl.backends.skyrl_train.weight_sync.transfer_strategy import (
    WeightSyncInitInfo,
    WeightTransferSender,
    WeightTransferStrategy,
)

from aseer.errors import ConfigError
from aseer.integrations import skyrl_settings as settings
from aseer.integrations.sending import SENDER, send_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NoReturn


@dataclass(frozen=True)
class Served:
    """The engine's actor, and what a client needs to know of it. It can be pickled.

    Attributes:
        actor: Ray's handle of an `EngineActor`.
        node: Ray's id of the node that it is on.
        world: GPUs of all instances, and of one; at least 1.
    """

    actor: Any
    node: str
    world: tuple[int, int]


class AseerClient(InferenceEngineInterface):  # type: ignore[misc]
    """SkyRL's inference engine client. It goes to the policy's workers, too."""

    def __init__(self, config: Any, tokenizer: Any, served: Served) -> None:
        """Make a client of an actor that is started."""
        self.served = served
        self._tokenizer = tokenizer
        self._model_name = str(resolve_policy_model_name(config))
        self._group_size = settings.group_size(config)
        self._sampling = get_sampling_params_for_backend(
            config.generator.inference_engine.backend, config.generator.sampling_params
        )
        self._seen: set[Any] = set()
        self._weight_version = 0

    @property
    def model_name(self) -> str:
        """The name that generators know the policy by."""
        return self._model_name

    @property
    def weight_version(self) -> int:
        """Updates of the weights so far."""
        return self._weight_version

    def increment_weight_version(self) -> None:
        """Called by SkyRL after each update."""
        self._weight_version += 1

    async def generate(
        self, input_batch: Any, model: str | None = None
    ) -> dict[str, Any]:
        """Sample one response a prompt; see `InferenceEngineInterface`.

        Raises:
            ConfigError: they are no texts as token ids, or cannot run.
            AseerError: what ended the rollout.
        """
        prompts = input_batch.get("prompt_token_ids")
        if prompts is None or any(input_batch.get("mm_features") or ()):
            raise ConfigError(
                "aseer takes prompt_token_ids from SkyRL's generators, and neither "
                "conversations nor images"
            )
        given = input_batch.get("sampling_params") or self._sampling
        sampling, wants_logprobs = settings.sampling_of(given)
        sessions = input_batch.get("session_ids")
        sizes = settings.group_sizes(prompts, sessions, self._seen, self._group_size)
        sample = self.served.actor.sample
        responses = await asyncio.gather(
            *[
                sample.remote(prompt, sampling, n=size)
                for prompt, size in zip(prompts, sizes, strict=True)
            ]
        )
        ids = [list(response.token_ids) for response in responses]
        logprobs = [list(response.logprobs) for response in responses]
        return {
            "responses": self._tokenizer.batch_decode(ids),
            "response_ids": ids,
            "stop_reasons": [response.finish_reason for response in responses],
            "response_logprobs": logprobs if wants_logprobs else None,
            "prompt_logprobs": None,
            "rollout_expert_indices": None,
        }

    async def finish_session(self, session_id: Any) -> None:
        """Forget an agent loop."""
        self._seen.discard(session_id)

    async def sleep(self, *_: Any, **__: Any) -> None:
        """End the rollout, and release the GPUs that the trainer shares."""
        await self.served.actor.sleep.remote()

    async def wake_up(self, tags: list[str] | None = None, **_: Any) -> None:
        """Take them back for the weights, or for the KV cache."""
        await self.served.actor.wake_up.remote(tags)

    async def pause_generation(self, *_: Any, **__: Any) -> None:
        """Let what runs finish, and begin nothing: no response is of two weights."""
        await self.served.actor.hold.remote()

    async def resume_generation(self) -> None:
        """Begin requests again."""
        await self.served.actor.resume_generation.remote()

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> None:
        """Nothing is to be done: KV of older weights is never found."""

    async def get_world_size(self) -> tuple[int, int]:
        """GPUs of all instances, and of one."""
        return self.served.world

    async def teardown(self) -> None:
        """End the engine."""
        await self.served.actor.stop.remote()

    async def init_weight_update_communicator(self, init_info: Any) -> None:
        """Nothing is to be done: weights come through shared memory."""

    async def update_named_weights(self, request: Any) -> None:
        """Not supported."""
        raise ConfigError("aseer takes whole weights from SkyRL, and no adapters")

    def get_endpoint_url(self) -> str:
        """Not supported."""
        _raise_no_http()

    async def chat_completion(self, request_payload: Any) -> dict[str, Any]:
        """Not supported."""
        _raise_no_http()

    async def render_chat_completion(self, request_payload: Any) -> dict[str, Any]:
        """Not supported."""
        _raise_no_http()

    async def completion(self, request_payload: Any) -> dict[str, Any]:
        """Not supported."""
        _raise_no_http()


def _raise_no_http() -> NoReturn:
    raise ConfigError(
        "this generator asks for an OpenAI endpoint, which aseer does not have; use "
        "one that calls the client's generate(), such as SkyRLGymGenerator"
    )


class AseerSender(WeightTransferSender):  # type: ignore[misc]
    """In every process of the policy: gives the engine new weights."""

    def __init__(self, client: AseerClient) -> None:
        """Raise ConfigError where the sender cannot reach the engine's memory."""
        self._actor = client.served.actor if dist.get_rank() == SENDER else None
        here = ray.get_runtime_context().get_node_id()
        if self._actor is not None and here != client.served.node:
            raise ConfigError(
                "the policy's rank 0 and aseer's engine are on different nodes, and "
                "weights go through shared memory; set "
                "trainer.placement.colocate_all=true, or use one node"
            )

    async def send_chunks(
        self, chunks: Iterable[Any], weight_metadata: Any = None
    ) -> None:
        """Send all tensors from rank 0; the other ranks take them from their chunks.

        Raises:
            WeightUpdateError: the engine keeps the weights it has.
        """
        await send_weights(_pairs(chunks), self._actor)

    def teardown(self) -> None:
        """Nothing is held."""


def _pairs(chunks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for chunk in chunks:
        yield from zip(chunk.names, chunk.tensors, strict=True)


class AseerStrategy(WeightTransferStrategy):  # type: ignore[misc]
    """Weights through the shared memory of the engine's machine."""

    @staticmethod
    def create_init_info(ie_cfg: Any, inference_world_size: Any = None) -> Any:
        """Nothing is to be agreed upon."""
        return WeightSyncInitInfo(override_existing_receiver=True)

    @staticmethod
    def get_vllm_transfer_engine() -> type:
        """There is none."""
        raise ConfigError("aseer has no weight transfer engine of vLLM's")

    @staticmethod
    def create_sender(init_info: Any, inference_client: AseerClient) -> AseerSender:
        """A process's sender."""
        return AseerSender(inference_client)


class TakesAseer:
    """For a policy worker's class: its weights go to aseer."""

    async def init_weight_sync_state(self, client: Any, config: Any) -> None:
        """As SkyRL's own, which takes one of two strategies that it knows."""
        # There is no other way to name a third; this process has one policy only.
        weight_sync.get_transfer_strategy_cls = lambda **_: AseerStrategy
        await super().init_weight_sync_state(client, config)  # type: ignore[misc]


def policy_worker(strategy: str) -> type:
    """The policy worker's class of SkyRL's strategy, with its weights to aseer."""
    if strategy == "megatron":
        from skyrl.backends.skyrl_train.workers.megatron.megatron_worker import (
            MegatronPolicyWorkerBase as Base,
        )
    else:
        from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import (
            FSDPPolicyWorkerBase as Base,
        )
    return type("AseerPolicyWorker", (TakesAseer, Base), {})
