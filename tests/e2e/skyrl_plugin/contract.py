"""SkyRL's own classes around the client, the engine's actor and the sender; no Ray.

    python contract.py MODEL

Run in SkyRL's environment. The engine is simulated and has the model's tensors; the
generator, its agent loops and environments, and what extracts weights are SkyRL's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from skyrl.backends.skyrl_train.inference_servers.engine_utils import (
    get_sampling_params_for_backend,
)
from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import FSDPWeightExtractor
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.generators.base import TrajectoryID
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl.train.utils import validate_cfg
from transformers import AutoModelForCausalLM, AutoTokenizer

from aseer.integrations import skyrl_policy as ours
from aseer.integrations import skyrl_settings as settings
from aseer.integrations.actor import EngineActor

PROMPTS, SIBLINGS = 3, 4
NODE = "the only node"


class Handle:
    """Ray's handle of an actor, for one that lives here."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        def remote(*args, **kwargs):
            return getattr(self._actor, name)(*args, **kwargs)

        return SimpleNamespace(remote=remote)


def config_of(directory: str, shapes: dict[str, list[int]]):
    config = SkyRLTrainConfig.from_cli_overrides(
        [
            f"trainer.policy.model.path={directory}",
            f"data.train_data=['{directory}/prompts.jsonl']",
            "trainer.logger=console",
            "trainer.max_prompt_length=64",
            "trainer.train_batch_size=4",
            "trainer.policy_mini_batch_size=4",
            f"generator.n_samples_per_prompt={SIBLINGS}",
            "generator.sampling_params.max_generate_length=24",
            "environment.env_class=letters",
        ]
    )
    config.generator.inference_engine.engine_init_kwargs = {
        "aseer": {
            "device": "sim",
            "join_s": 5.0,
            "engine_args": {"num_kv_blocks": 256, "step_s": 0.001, "weights": shapes},
        }
    }
    validate_cfg(config)
    return config


def asked(config) -> dict:
    """What the trainer gives its generator."""
    pairs = [(i, j) for i in range(PROMPTS) for j in range(SIBLINGS)]
    sampling = get_sampling_params_for_backend("vllm", config.generator.sampling_params)
    return {
        "prompts": [[{"role": "user", "content": f"{i}+1="}] for i, _ in pairs],
        "env_classes": ["letters" for _ in pairs],
        "env_extras": [{} for _ in pairs],
        "sampling_params": sampling,
        "trajectory_ids": [TrajectoryID(f"p{i}", j) for i, j in pairs],
    }


async def main(directory: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = config_of(directory, shapes)
    actor = EngineActor(settings.actor_settings(config, None))
    await actor.start()
    try:
        served = ours.Served(Handle(actor), NODE, (1, 1))
        client = ours.AseerClient(config, tokenizer, served)
        context = SimpleNamespace(get_node_id=lambda: NODE)
        ours.ray = SimpleNamespace(get_runtime_context=lambda: context)
        sender = ours.AseerStrategy.create_sender(
            ours.AseerStrategy.create_init_info(None), inference_client=client
        )
        extractor = FSDPWeightExtractor(model)
        for batched in (False, True):
            await client.wake_up(tags=["weights"])
            await client.pause_generation()
            await sender.send_chunks(
                extractor.extract_weights(torch.float32),
                weight_metadata=extractor.get_weight_metadata(torch.float32),
            )
            await client.resume_generation()
            client.increment_weight_version()
            await client.wake_up(tags=["kv_cache"])
            config.generator.batched = batched
            generator = SkyRLGymGenerator(
                generator_cfg=config.generator,
                skyrl_gym_cfg=config.environment.skyrl_gym,
                inference_engine_client=client,
                tokenizer=tokenizer,
                policy_model_name=client.model_name,
            )
            output = await generator.generate(asked(config), disable_tqdm=True)
            responses = output["response_ids"]
            logprobs = output["rollout_logprobs"]
            assert len(responses) == PROMPTS * SIBLINGS
            assert all(0 < len(each) <= 24 for each in responses)
            assert list(map(len, responses)) == list(map(len, logprobs))
            assert set(output["stop_reasons"]) <= {"stop", "length"}
            await client.sleep()
        assert not client._seen, "SkyRL ends its sessions"
    finally:
        await actor.stop()
    dist.destroy_process_group()


asyncio.run(main(sys.argv[1]))
sys.stdout.write("the contract is kept\n")
