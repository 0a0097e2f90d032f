"""TRL's `GRPOTrainer` with rollouts by aseer.

    from aseer.integrations.trl import rollout_func

    with aseer.Engine(aseer.EngineConfig(model=model)) as engine:
        trainer = GRPOTrainer(model=model, rollout_func=rollout_func(engine), ...)
        trainer.train()

Before a rollout the engines get the weights that the trainer has, whenever it has taken
a step since the last, or it is another trainer or another training. Prompts are encoded
by the trainer itself, as they are where it generates: with its own processing class,
chat template, `chat_template_kwargs`, tools and environments, and go to the engines
with their images. TRL hands over every prompt as often as it wants completions of it,
one after the other; neighbours that are equal become one group.

Of a trainer of several processes the main one has the engine, and the others give None:

    rank 0   prompts --+                   +--> completions
    rank 1   prompts --+--> one rollout ---+--> completions
    rank 2   prompts --+                   +--> completions

A group may then begin on one process and end on the next, and still is one group.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from aseer.config import is_speculating
from aseer.errors import ConfigError
from aseer.groups import Group
from aseer.inputs.images import read_image
from aseer.integrations.processes import Processes
from aseer.sampling import resolve_sampling
from aseer.weights.adapters import has_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aseer.runtime.engine import Engine
    from aseer.sampling import SamplingParams
    from aseer.types import Response


_NEVER = -1e20  # added to a token's logit


def rollout_func(
    engine: Engine | None, *, sampling: Mapping[str, Any] | None = None
) -> Callable[[list[Any], Any], dict[str, list[Any]]]:
    """A `rollout_func` for `trl.GRPOTrainer`.

    Reward functions get two more columns: `finish_reason` and `weight_version`.

    Args:
        engine: open, started from the model that is trained; None in all processes of
            the trainer but the main one.
        sampling: settings that the trainer's arguments do not have, or should not
            decide; they take precedence. The main process's count.
    Raises:
        ConfigError: at the first rollout, if the main process has no engine or another
            has one.
    """
    return _RolloutFunc(engine, dict(sampling or {}))


class Encoded(NamedTuple):
    """A prompt as the trainer's processing class makes it.

    Attributes:
        ids: with as many tokens an image as it takes.
        images: as the trainer has them.
    """

    ids: list[int]
    images: list[Any]


class _RolloutFunc:
    def __init__(self, engine: Engine | None, sampling: dict[str, Any]) -> None:
        self._engine = engine
        self._sampling = sampling
        # The state is the trainer's own, and a new one each time that it trains.
        self._synced: tuple[Any, int] = (None, 0)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        is_main = trainer.accelerator.is_main_process
        if is_main != (self._engine is not None):
            raise ConfigError(
                "rollout_func is given the engine in the trainer's main process and "
                f"None in the others; process {trainer.accelerator.process_index} of "
                f"{trainer.accelerator.num_processes} gave {self._engine!r}"
            )
        state, step = trainer.state, trainer.state.global_step
        is_synced = state is self._synced[0] and step == self._synced[1]
        weights = None if is_synced else _weights_of(trainer)
        everyones = self._processes.gather(encoded(trainer, prompts))
        columns = self._processes.scatter(
            lambda: self._rollout(everyones, trainer, weights)
        )
        self._synced = state, step
        return columns

    @cached_property
    def _processes(self) -> Processes:
        return Processes()

    def _rollout(
        self, everyones: list[list[Encoded]], trainer: Any, weights: Any | None
    ) -> list[dict[str, list[Any]]]:
        """Columns for the prompts of each process."""
        assert self._engine is not None
        speculates = is_speculating(self._engine.config)
        wanted = without_image_tokens(trainer, self._sampling, speculates=speculates)
        if weights is not None:
            self._engine.update_weights_sync(weights)
        prompts = [prompt for prompts in everyones for prompt in prompts]
        groups = group_prompts(prompts, sampling_of(trainer.args, wanted))
        members: dict[str, list[Response]] = {}
        for responses in self._engine.rollout_sync(groups).by_group():
            members[responses[0].group_id] = responses
        ordered = [r for group in groups for r in members[str(group.group_id)]]
        shares, start = [], 0
        for prompts in everyones:
            shares.append(_columns(ordered[start : start + len(prompts)]))
            start += len(prompts)
        return shares


def without_image_tokens(
    trainer: Any, sampling: Mapping[str, Any], *, speculates: bool
) -> Mapping[str, Any]:
    """Sampling with which a model that sees does not generate its image token.

    The trainer's model would take one in a response for an image, and find none. TRL
    suppresses it, too, where it generates. What the user says of tokens stays, and an
    engine that speculates can be told of allowed tokens only, which the user knows.
    """
    token = getattr(trainer.processing_class, "image_token_id", None)
    given = {**(trainer.args.generation_kwargs or {}), **sampling}
    says = any(given.get(name) for name in ("logit_bias", "allowed_token_ids"))
    if token is None or says or speculates:
        return sampling
    return {**sampling, "logit_bias": {int(token): _NEVER}}


def _weights_of(trainer: Any) -> Any:
    """What the trainer trains, whole; if it is sharded, in the main process only."""
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if has_adapters(model):
        if accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise ConfigError(
                "adapters are merged where every process has the whole model; this "
                f"one may be sharded ({accelerator.distributed_type}): use DDP, or "
                "train without a peft_config"
            )
        return model
    weights = dict(accelerator.get_state_dict(trainer.model_wrapped))
    # Gathering copies what is tied once for each name; as one tensor it is seen to be.
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if name in weights and first in weights:
            weights[name] = weights[first]
    return weights


def _columns(responses: Sequence[Response]) -> dict[str, list[Any]]:
    return {
        "prompt_ids": [r.prompt_token_ids for r in responses],
        "completion_ids": [r.token_ids for r in responses],
        "logprobs": [r.logprobs for r in responses],
        "finish_reason": [r.finish_reason for r in responses],
        "weight_version": [r.weight_version for r in responses],
    }


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


def encoded(trainer: Any, prompts: list[Any]) -> list[Encoded]:
    """Texts or chats as the trainer encodes them where it generates.

    Raises:
        ConfigError: this version of TRL encodes elsewhere.
    """
    encode = getattr(trainer, "_tokenize_prompts", None)
    if encode is None:
        raise ConfigError(
            f"{type(trainer).__name__} has no _tokenize_prompts, by which TRL encodes "
            "prompts from version 1.16 on; install trl>=1.16"
        )
    prompt_ids, images, _ = encode(prompts)
    of_each = images or [None] * len(prompt_ids)
    return [
        Encoded(list(map(int, ids)), list(images or ()))
        for ids, images in zip(prompt_ids, of_each, strict=True)
    ]


def group_prompts(prompts: Sequence[Encoded], sampling: SamplingParams) -> list[Group]:
    """A group for every run of equal prompts, in order."""
    runs: list[tuple[Encoded, int]] = []
    for prompt in prompts:
        if runs and _are_equal(runs[-1][0], prompt):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((prompt, 1))
    return [
        Group(prompt.ids, n, sampling, group_id=f"{i}", images=prompt.images or None)
        for i, (prompt, n) in enumerate(runs)
    ]


def _are_equal(one: Encoded, other: Encoded) -> bool:
    if one.ids != other.ids or len(one.images) != len(other.images):
        return False
    pairs = zip(one.images, other.images, strict=True)
    # Those that another process sent are copies.
    return all(a is b or read_image(a).key == read_image(b).key for a, b in pairs)
