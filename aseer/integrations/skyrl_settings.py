"""What SkyRL's settings mean to aseer, and which it refuses. Pure; no SkyRL here.

Settings that would be ignored are refused in words: a run that silently does something
else than its configuration says is worse than one that does not start.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from aseer.errors import ConfigError
from aseer.integrations.settings import ActorSettings, mapping, own_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ENGINE = "generator.inference_engine"
_KWARGS = f"{_ENGINE}.engine_init_kwargs"
_OWN = f"{_KWARGS}.aseer"


def actor_settings(config: Any, gpus: list[str] | None) -> ActorSettings:
    """Settings of the actor that has the engine.

    Args:
        config: SkyRL's whole configuration.
        gpus: ids of the GPUs that the trainer shares with the engine (colocate_all);
            None = the engine has GPUs of its own, those that its actor sees.
    Raises:
        ConfigError: something is set that aseer does not do.
    """
    check_supported(config)
    engines = config.generator.inference_engine
    kwargs = mapping(engines.engine_init_kwargs, _KWARGS)
    own = own_settings(kwargs.pop("aseer", None), _OWN)
    on_gpus = uses_gpus(config)
    sleeps = on_gpus and bool(config.trainer.placement.colocate_all)
    engine: dict[str, Any] = {
        "model": config.trainer.policy.model.path,
        "dtype": engines.model_dtype,
        "device": "cuda",
        "num_instances": num_instances(config),
        "max_model_len": kwargs.pop("max_model_len", None) or _longest(config),
        "max_num_seqs": kwargs.pop("max_num_seqs", engines.max_num_seqs),
        "seed": config.trainer.seed,
    }
    if on_gpus:
        engine["gpus_per_instance"] = int(engines.tensor_parallel_size)
        if gpus is not None:
            engine["gpus"] = gpus
    engine |= own.engine
    engine["engine_args"] = (
        _engine_args(config, on_gpus=on_gpus, sleeps=sleeps)
        | kwargs
        | dict(own.engine_args)
    )
    if engine["device"] == "sim":
        engine["engine_args"] = dict(own.engine_args)
    return ActorSettings(engine=engine, sleeps=sleeps, **own.times)


def uses_gpus(config: Any) -> bool:
    """Whether the engine runs on GPUs, and not on CPUs or simulated."""
    kwargs = mapping(config.generator.inference_engine.engine_init_kwargs, _KWARGS)
    own = own_settings(kwargs.get("aseer"), _OWN)
    return own.engine.get("device", "cuda") in ("auto", "cuda")


def num_instances(config: Any) -> int:
    """vLLM engines; replicas of SkyRL's data parallelism are engines like others."""
    engines = config.generator.inference_engine
    return int(engines.num_engines) * int(engines.data_parallel_size)


def num_gpus(config: Any) -> int:
    """GPUs of all instances together; 0 on CPUs."""
    each = int(config.generator.inference_engine.tensor_parallel_size)
    return num_instances(config) * each if uses_gpus(config) else 0


def group_size(config: Any) -> int:
    """The most requests that SkyRL makes of one prompt."""
    generator = config.generator
    sizes = (generator.n_samples_per_prompt, generator.eval_n_samples_per_prompt)
    return max(int(size) for size in sizes)


def _longest(config: Any) -> int:
    generator = config.generator
    prompt = generator.max_input_length or config.trainer.max_prompt_length
    settings = (generator.sampling_params, generator.eval_sampling_params)
    return int(prompt) + max(int(each.max_generate_length) for each in settings)


def _engine_args(config: Any, *, on_gpus: bool, sleeps: bool) -> dict[str, Any]:
    """vLLM's arguments as SkyRL sets them for its own engines."""
    engines = config.generator.inference_engine
    args: dict[str, Any] = {
        "enforce_eager": bool(engines.enforce_eager),
        "max_num_batched_tokens": int(engines.max_num_batched_tokens),
        "generation_config": "vllm",
        "trust_remote_code": True,
    }
    if on_gpus:
        args["gpu_memory_utilization"] = float(engines.gpu_memory_utilization)
    if engines.language_model_only:
        args["language_model_only"] = True
    if engines.expert_parallel_size > 1:
        args["enable_expert_parallel"] = True
    if sleeps:
        args["enable_sleep_mode"] = True
    return args


def sampling_of(given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A request's sampling in aseer's words, and whether logprobs are wanted.

    SkyRL decodes responses itself, and takes of all logprobs the sampled token's.
    """
    sampling = {name: value for name, value in given.items() if value is not None}
    wants_logprobs = sampling.pop("logprobs", None) is not None
    if not sampling.get("stop"):
        sampling["detokenize"] = False
    return sampling, wants_logprobs


def group_sizes(
    prompts: Sequence[Sequence[int]],
    sessions: Sequence[Any] | None,
    seen: set[Any],
    group_size: int,
) -> list[int]:
    """How many siblings each request can have, itself included.

    Of prompts that come in one call those that are equal are siblings. An agent loop
    brings one: that of its first turn has siblings in other loops, which come at the
    same time, and that of a later turn has none.

    Args:
        sessions: of agent loops, by request.
        seen: sessions that have had their first turn; those of this call are added.
        group_size: the most requests that are made of one prompt.
    """
    if len(prompts) > 1:
        same = Counter(map(tuple, prompts))
        return [same[tuple(prompt)] for prompt in prompts]
    session = sessions[0] if sessions else None
    is_first = session is None or session not in seen
    if session is not None:
        seen.add(session)
    return [group_size if is_first else 1 for _ in prompts]


def check_supported(config: Any) -> None:
    """Refuse, in words, what aseer does not do.

    Raises:
        ConfigError: something is set that would not be done.
    """
    engines, generator = config.generator.inference_engine, config.generator
    trainer = config.trainer
    lora_is_merged = trainer.strategy == "megatron" and bool(
        trainer.policy.megatron_config.lora_config.merge_lora
    )
    refusals = {
        f"{_ENGINE}.backend={engines.backend}": engines.backend != "vllm",
        f"{_ENGINE}.external_proxy_url, external_server_urls and run_engines_locally="
        "false: SkyRL's own client speaks to `aseer serve`; leave "
        "trainer.override_entrypoint out": bool(
            engines.external_proxy_url
            or engines.external_server_urls
            or not engines.run_engines_locally
        ),
        "LoRA (trainer.policy.model.lora.rank): engines take whole weights": (
            trainer.policy.model.lora.rank > 0 and not lora_is_merged
        ),
        "trainer.fully_async.enabled: rollouts are synchronous": bool(
            trainer.fully_async.enabled
        ),
        f"{_ENGINE}.pipeline_parallel_size above 1": engines.pipeline_parallel_size > 1,
        f"{_ENGINE}.enable_return_routed_experts: responses do not carry them": bool(
            engines.enable_return_routed_experts
        ),
        f"{_ENGINE}.enable_pd": bool(engines.enable_pd),
        f"{_ENGINE}.speculative_config: drafts come from {_OWN}.speculation": (
            engines.speculative_config is not None
        ),
        f"{_ENGINE}.enable_prefix_caching=false: resumed chunks need it": (
            not engines.enable_prefix_caching
        ),
        "generator.vision_language_generator: aseer takes token ids": bool(
            generator.vision_language_generator
        ),
    }
    found = [words for words, is_set in refusals.items() if is_set]
    if found:
        raise ConfigError("aseer does not support in SkyRL " + "; nor ".join(found))


def check_trains_what_generates(strategy: str, model_config: Any) -> None:
    """Refuse a model with one tensor for embedding and output layer under FSDP.

    SkyRL moves a model to the device "meta" before it shards it, and two parameters
    come back, which are trained apart. An engine has one, and would generate with
    what nobody trains.

    Args:
        model_config: the policy's, of transformers.
    Raises:
        ConfigError: it is such a model.
    """
    is_tied = getattr(model_config.get_text_config(), "tie_word_embeddings", False)
    if is_tied and strategy != "megatron":
        raise ConfigError(
            f"trainer.strategy={strategy} of SkyRL trains this model's embedding and "
            "its output layer apart, though its config has tie_word_embeddings=true"
            ", and an engine has one tensor for both; give "
            "trainer.policy.model.path a copy of the checkpoint with both tensors and "
            "tie_word_embeddings=false (docs/skyrl.md has the lines that make it)"
        )
