"""verl's own classes, configuration and Ray around the server; no trainer, no model.

    python contract.py ENGINE_PYTHON [NUM_HOSTS]

Run in verl's environment. The engine is simulated, and has two small tensors. On two
hosts, as Ray sees them, each has one of the trainer's processes.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import verl
from hydra import compose, initialize_config_dir
from ray.cluster_utils import Cluster
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.base import BaseRollout, get_rollout_class
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

SIM = "{num_kv_blocks:256,step_s:0.001,weights:{a:[4,3],b:[5]}}"
OVERRIDES = [
    "actor_rollout_ref.rollout.name=aseer",
    "actor_rollout_ref.model.path=/no/such/model",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.n=4",
    "+actor_rollout_ref.rollout.engine_kwargs.aseer.device=sim",
    f"+actor_rollout_ref.rollout.engine_kwargs.aseer.engine_args={SIM}",
]


def two_hosts() -> Cluster:
    """Two of Ray's nodes on this machine, each with a GPU in name."""
    host = {"num_cpus": 16, "num_gpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=host)
    cluster.add_node(**host)
    return cluster


@ray.remote(num_gpus=1)
class Trainer:
    """A process of the trainer, as far as rollouts see it."""

    def __init__(self, rollout, model):
        self.rollout = get_rollout_class("aseer")(rollout, model, None)

    async def update_weights(self, value, step, asynchronous):
        def pairs():
            yield "a", torch.full((4, 3), value)
            yield "b", torch.full((5,), value)

        async def async_pairs():
            for pair in pairs():
                yield pair

        await self.rollout.resume(["weights"])
        await self.rollout.update_weights(
            async_pairs() if asynchronous else pairs(),
            global_steps=step,
            peft_config=None,
            base_sync_done=True,
        )
        await self.rollout.resume(["kv_cache"])


def check_parameters(ours: type, names: list[str]) -> None:
    """Whatever verl may give to its own server, ours takes. Without vLLM verl's own
    cannot be imported, so it is read.
    """
    source = Path(verl.__file__).parent / "workers/rollout/vllm_rollout"
    tree = ast.parse((source / "vllm_async_server.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    (server,) = (node for node in classes if node.name == "vLLMHttpServer")
    theirs = {n.name: n for n in server.body if isinstance(n, ast.AsyncFunctionDef)}
    for name in names:
        mine = inspect.signature(getattr(ours, name)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in mine.values())
        for argument in theirs[name].args.args:
            assert argument.arg in mine or takes_any, (name, argument.arg)


async def main(python: str, num_hosts: int) -> None:
    config_dir = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(config_dir), version_base=None):
        own = f"+actor_rollout_ref.rollout.engine_kwargs.aseer.python={python}"
        config = compose("ppo_trainer", [*OVERRIDES, own])
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    replica_class = RolloutReplicaRegistry.get("aseer")
    rollout_class = get_rollout_class("aseer")
    assert issubclass(replica_class, RolloutReplica)
    assert issubclass(rollout_class, BaseRollout)

    from aseer.integrations.verl_server import AseerServer

    names = ["generate", "wake_up", "sleep", "abort_all_requests", "clear_kv_cache"]
    names += ["release_kv_cache", "resume_kv_cache", "resume_generation"]
    check_parameters(AseerServer, names)

    if num_hosts == 1:
        ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=True)
    else:
        ray.init(address=two_hosts().address, log_to_driver=True)
    dataclass = omega_conf_to_dataclass(rollout)
    workers = [Trainer.remote(dataclass, dataclass) for _ in range(2)]
    group = SimpleNamespace(workers=workers)
    replicas = [replica_class(rank, rollout, model, 2) for rank in range(2)]
    await asyncio.gather(*[replica.init_hybrid(group) for replica in replicas])
    assert len({replica._server_address for replica in replicas}) == 2
    first, second = (replica._server_handle for replica in replicas)
    assert first._actor_id == second._actor_id
    instances = await first.__ray_call__.remote(
        lambda server: [info.node for info in server._engine.instances]
    )
    assert len(instances) == 2
    assert all(instances) == (num_hosts > 1), "on several hosts all are on nodes"

    sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
    sampling["repetition_penalty"] = 1.0

    async def generate(handle):
        return await handle.generate.remote(
            request_id="id",
            prompt_ids=[5, 6, 7],
            sampling_params=sampling,
            image_data=None,
            video_data=None,
        )

    seen = []
    for step in range(3):
        await asyncio.gather(*[replica.sleep() for replica in replicas])
        await workers[0].update_weights.remote(float(step), step, step % 2 == 1)
        outputs = await asyncio.gather(*[generate(h) for h in (first, second) * 2])
        for output in outputs:
            assert output.extra_fields["global_steps"] == step
            assert output.stop_reason == "completed"
            assert output.token_ids == outputs[0].token_ids, "greedy"
            assert len(output.log_probs) == len(output.token_ids)
        seen.append(tuple(outputs[0].token_ids))
    assert len(set(seen)) == 3, "each step's weights sample something else"
    ray.kill(first)  # as at a job's end: nothing of ours is run
    sys.stdout.write("the contract is kept\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1))
