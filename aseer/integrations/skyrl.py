"""SkyRL's trainer with rollouts by aseer.

    python -m skyrl.train.entrypoints.main_base \
        trainer.override_entrypoint=aseer.integrations.skyrl ...

SkyRL imports this module then; nothing else of aseer does. Generators, environments,
rewards, evaluation and the trainer stay SkyRL's own. What is ours is behind its hooks
for inference clients and weight transfer (`aseer.integrations.skyrl_policy`):

    trainer's process  AseerClient --- requests, one at a time ----------> EngineActor
    policy's rank 0    AseerSender --- writes the weights into shared memory --^
    its other ranks    AseerSender --- gather the same tensors with it
"""

from __future__ import annotations

import sys
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray
from transformers import AutoConfig

from aseer.integrations import skyrl_settings as settings
from aseer.integrations.actor import EngineActor
from aseer.integrations.settings import check_placement
from aseer.integrations.skyrl_policy import AseerClient, Served, policy_worker

# The scheduler is to see every request of a step: Ray lets no more calls than this run
# at once.
_MAX_CONCURRENCY = 1_000_000
_STOP_TIMEOUT_S = 60.0


class AseerPPOExp(BasePPOExp):  # type: ignore[misc]
    """SkyRL's experiment, with rollouts by aseer; further hooks may be overridden."""

    _actor: Any = None

    def __init__(self, cfg: Any) -> None:
        """Prepare data and placement; the engine starts in `run`."""
        settings.check_supported(cfg)
        # What it scrapes are figures of SkyRL's own vLLM servers.
        cfg.generator.inference_engine.enable_ray_prometheus_stats = False
        super().__init__(cfg)

    def get_inference_client(self) -> AseerClient:
        """Start the engine, in an actor; asleep, if it shares the trainer's GPUs."""
        trainer = self.cfg.trainer
        model = AutoConfig.from_pretrained(
            trainer.policy.model.path, trust_remote_code=True
        )
        settings.check_trains_what_generates(trainer.strategy, model)
        group = self.colocate_pg
        each = int(self.cfg.generator.inference_engine.tensor_parallel_size)
        options: dict[str, Any] = {"num_gpus": settings.num_gpus(self.cfg)}
        gpus = None
        if group is not None:
            node = check_placement(
                list(group.bundle_node_ids), "aseer's engine", "use one node"
            )
            gpus = [str(gpu) for gpu in group.bundle_gpu_ids]
            # It has no GPU of Ray's, and gives its instances those of the trainer.
            hidden = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            options = {
                "num_gpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
                "runtime_env": {"env_vars": hidden},
            }
        told = settings.actor_settings(self.cfg, gpus)
        actor = ray.remote(EngineActor).options(
            num_cpus=0, max_concurrency=_MAX_CONCURRENCY, **options
        )
        self._actor = actor.remote(told)
        ray.get(self._actor.start.remote())
        if group is not None:
            ray.get(self._actor.sleep.remote())

        def place(_: Any) -> str:  # it is pickled whole, so that the actor has no SkyRL
            return str(ray.get_runtime_context().get_node_id())

        node = ray.get(self._actor.__ray_call__.remote(place))
        world = (settings.num_instances(self.cfg) * each, each)
        return AseerClient(self.cfg, self.tokenizer, Served(self._actor, node, world))

    def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
        """SkyRL's trainer, whose policy gives its weights to the engine."""
        trainer = super().get_trainer(*args, **kwargs)
        build = trainer.build_models
        worker = ray.remote(num_gpus=1)(policy_worker(self.cfg.trainer.strategy))
        trainer.build_models = lambda _, *others: build(worker, *others)
        return trainer

    def run(self) -> None:
        """Train, and end the engine with all its processes."""
        try:
            super().run()
        finally:
            if self._actor is not None:
                ray.get(self._actor.stop.remote(), timeout=_STOP_TIMEOUT_S)


def _run(config: Any) -> None:
    AseerPPOExp(config).run()


def main() -> None:
    """What SkyRL's entry point calls for `trainer.override_entrypoint`."""
    chosen = "trainer.override_entrypoint="
    overrides = [given for given in sys.argv[1:] if not given.startswith(chosen)]
    config = SkyRLTrainConfig.from_cli_overrides(overrides)
    settings.check_supported(config)
    validate_cfg(config)
    initialize_ray(config)
    # Not on the head node, as SkyRL's own.
    ray.get(ray.remote(num_cpus=1)(_run).remote(config))
