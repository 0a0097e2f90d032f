"""TRL's `GRPOTrainer` with rollouts by aseer.

    from aseer.integrations.trl import rollout_func

    with aseer.Engine(aseer.EngineConfig(model=model)) as engine:
        trainer = GRPOTrainer(model=model, rollout_func=rollout_func(engine), ...)
        trainer.train()

Before a rollout the engines get the weights that the trainer has, whenever it has taken
a step since the last. TRL hands over every prompt as often as it wants completions of
it, one after the other; neighbours that are equal become one group.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from aseer.errors import ConfigError
from aseer.groups import Group
from aseer.sampling import resolve_sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aseer.engine import Engine
    from aseer.sampling import SamplingParams
    from aseer.types import Response


def rollout_func(
    engine: Engine, *, sampling: Mapping[str, Any] | None = None
) -> Callable[[list[Any], Any], dict[str, list[Any]]]:
    """A `rollout_func` for `trl.GRPOTrainer`.

    Reward functions get two more columns: `finish_reason` and `weight_version`.

    Args:
        engine: open, started from the model that is trained, one trainer process long.
        sampling: settings that the trainer's arguments do not have, or should not
            decide; they take precedence.
    Raises:
        ConfigError: at the first rollout, if the trainer runs in several processes.
    """
    return _RolloutFunc(engine, dict(sampling or {}))


class _RolloutFunc:
    def __init__(self, engine: Engine, sampling: dict[str, Any]) -> None:
        self._engine = engine
        self._sampling = sampling
        self._synced_step: int | None = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        self._sync_weights(trainer)
        sampling = sampling_of(trainer.args, self._sampling)
        groups = group_prompts(prompts, sampling)
        members: dict[str, list[Response]] = {}
        for responses in self._engine.rollout_sync(groups).by_group():
            members[responses[0].group_id] = responses
        ordered = [r for group in groups for r in members[str(group.group_id)]]
        return {
            "prompt_ids": [r.prompt_token_ids for r in ordered],
            "completion_ids": [r.token_ids for r in ordered],
            "logprobs": [r.logprobs for r in ordered],
            "finish_reason": [r.finish_reason for r in ordered],
            "weight_version": [r.weight_version for r in ordered],
        }

    def _sync_weights(self, trainer: Any) -> None:
        if trainer.accelerator.num_processes > 1:
            raise ConfigError(
                "aseer's rollout_func works with a trainer of one process, not "
                f"{trainer.accelerator.num_processes}"
            )
        step = trainer.state.global_step
        if step != self._synced_step:
            model = trainer.accelerator.unwrap_model(trainer.model)
            self._engine.update_weights_sync(model)
            self._synced_step = step


def sampling_of(args: Any, overrides: Mapping[str, Any]) -> SamplingParams:
    """The sampling that a `GRPOConfig` asks for.

    Raises:
        ConfigError: a setting that aseer does not know.
    """
    wanted = {
        "max_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        **(args.generation_kwargs or {}),
        **overrides,
    }
    return resolve_sampling({k: v for k, v in wanted.items() if v is not None})


def group_prompts(prompts: list[Any], sampling: SamplingParams) -> list[Group]:
    """A group for every run of equal prompts, in order."""
    runs = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
    return [
        Group(prompt, n, sampling, group_id=f"{i}")
        for i, (prompt, n) in enumerate(runs)
    ]
