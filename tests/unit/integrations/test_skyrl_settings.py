"""What SkyRL's settings become, and which are refused in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.integrations.skyrl_settings import (
    actor_settings,
    check_trains_what_generates,
    group_size,
    group_sizes,
    num_gpus,
    sampling_of,
)
from aseer.sampling import resolve_sampling

# What SkyRL 0.3 makes of its defaults for a request.
SAMPLING = {
    "min_tokens": 1,
    "skip_special_tokens": True,
    "include_stop_str_in_output": True,
    "max_tokens": 1024,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "logprobs": 1,
    "stop": None,
}


def config_of(**changes: Any) -> Any:
    """SkyRL 0.3's defaults, as far as they are looked at.

    Args:
        changes: by dotted names, with "__" for the dots.
    """
    config = SimpleNamespace(
        trainer=SimpleNamespace(
            strategy="fsdp",
            seed=42,
            max_prompt_length=512,
            placement=SimpleNamespace(colocate_all=True),
            fully_async=SimpleNamespace(enabled=False),
            policy=SimpleNamespace(
                model=SimpleNamespace(
                    path="Qwen/Qwen3-8B", lora=SimpleNamespace(rank=0)
                ),
                megatron_config=SimpleNamespace(
                    lora_config=SimpleNamespace(merge_lora=True)
                ),
            ),
        ),
        generator=SimpleNamespace(
            n_samples_per_prompt=5,
            eval_n_samples_per_prompt=1,
            max_input_length=512,
            sampling_params=SimpleNamespace(max_generate_length=1024),
            eval_sampling_params=SimpleNamespace(max_generate_length=2048),
            vision_language_generator=False,
            inference_engine=SimpleNamespace(
                backend="vllm",
                model_dtype="bfloat16",
                run_engines_locally=True,
                external_proxy_url=None,
                external_server_urls=None,
                num_engines=4,
                tensor_parallel_size=2,
                pipeline_parallel_size=1,
                data_parallel_size=1,
                expert_parallel_size=1,
                enable_prefix_caching=True,
                enable_return_routed_experts=False,
                enable_pd=False,
                speculative_config=None,
                language_model_only=False,
                enforce_eager=False,
                max_num_seqs=1024,
                max_num_batched_tokens=8192,
                gpu_memory_utilization=0.8,
                enable_ray_prometheus_stats=True,
                engine_init_kwargs={},
            ),
        ),
    )
    for path, value in changes.items():
        *where, name = path.split("__")
        part = config
        for each in where:
            part = getattr(part, each)
        assert hasattr(part, name), path
        setattr(part, name, value)
    return config


def test_the_trainers_gpus_are_one_engines():
    settings = actor_settings(config_of(), list("01234567"))
    config = EngineConfig(**settings.engine)
    assert list(config.gpus or ()) == list("01234567")
    assert (config.num_instances, config.gpus_per_instance) == (4, 2)
    assert config.max_model_len == 512 + 2048
    assert (config.device, config.seed, config.dtype) == ("cuda", 42, "bfloat16")
    assert config.engine_args == {
        "enforce_eager": False,
        "max_num_batched_tokens": 8192,
        "generation_config": "vllm",
        "trust_remote_code": True,
        "gpu_memory_utilization": 0.8,
        "enable_sleep_mode": True,
    }
    assert settings.sleeps


def test_an_engine_with_gpus_of_its_own_does_not_sleep():
    config = config_of(trainer__placement__colocate_all=False)
    config.generator.inference_engine.data_parallel_size = 2
    assert num_gpus(config) == 16
    settings = actor_settings(config, None)
    engine = EngineConfig(**settings.engine)
    assert (engine.gpus, engine.num_instances, settings.sleeps) == (None, 8, False)
    assert "enable_sleep_mode" not in engine.engine_args


def test_what_is_set_for_vllm_and_for_aseer_comes_last():
    kwargs = {
        "max_model_len": 9000,
        "enable_expert_parallel": True,
        "aseer": {
            "device": "cpu",
            "num_instances": 1,
            "chunk_size": 64,
            "join_s": 1,
            "update_timeout_s": 9,
            "engine_args": {"enforce_eager": True},
        },
    }
    config = config_of(generator__inference_engine__engine_init_kwargs=kwargs)
    assert num_gpus(config) == 0
    settings = actor_settings(config, None)
    engine = EngineConfig(**settings.engine)
    assert (engine.device, engine.gpus_per_instance) == ("cpu", 1)
    assert (engine.num_instances, engine.chunk_size) == (1, 64)
    assert engine.max_model_len == 9000
    assert engine.engine_args["enforce_eager"] is True
    assert engine.engine_args["enable_expert_parallel"] is True
    assert "gpu_memory_utilization" not in engine.engine_args
    assert (settings.join_s, settings.update_timeout_s) == (1.0, 9.0)
    assert not settings.sleeps
    kwargs["aseer"]["no_such"] = 1  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"engine_init_kwargs\.aseer\.no_such is not"):
        actor_settings(config, None)
    kwargs["aseer"] = "cpu"
    with pytest.raises(ConfigError, match=r"engine_init_kwargs\.aseer='cpu' is not"):
        actor_settings(config, None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("generator__inference_engine__backend", "sglang", "backend=sglang"),
        ("generator__inference_engine__external_proxy_url", "http://a", "aseer serve"),
        ("generator__inference_engine__run_engines_locally", False, "aseer serve"),
        ("generator__inference_engine__pipeline_parallel_size", 2, "pipeline"),
        ("generator__inference_engine__enable_pd", True, "enable_pd"),
        ("generator__inference_engine__speculative_config", {}, r"aseer\.speculation"),
        ("generator__inference_engine__enable_prefix_caching", False, "need it"),
        (
            "generator__inference_engine__enable_return_routed_experts",
            True,
            "do not carry",
        ),
        ("generator__vision_language_generator", True, "token ids"),
        ("trainer__fully_async__enabled", True, "synchronous"),
        ("trainer__policy__model__lora__rank", 8, "whole weights"),
    ],
)
def test_what_would_be_ignored_is_refused_in_words(name, value, words):
    with pytest.raises(ConfigError, match=words):
        actor_settings(config_of(**{name: value}), None)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_model_that_fsdp_would_untie_is_refused(strategy):
    def model_of(*, tied: bool) -> SimpleNamespace:
        text = SimpleNamespace(tie_word_embeddings=tied)
        return SimpleNamespace(get_text_config=lambda: text)

    with pytest.raises(ConfigError, match="trains this model's embedding and its out"):
        check_trains_what_generates(strategy, model_of(tied=True))
    check_trains_what_generates(strategy, model_of(tied=False))
    check_trains_what_generates("megatron", model_of(tied=True))


def test_merged_weights_of_lora_are_whole_weights():
    config = config_of(trainer__policy__model__lora__rank=8)
    config.trainer.strategy = "megatron"
    actor_settings(config, ["0"])


def test_sampling_means_what_it_means_to_skyrls_own_client():
    sampling, wants_logprobs = sampling_of(SAMPLING)
    assert wants_logprobs
    found = resolve_sampling(sampling)
    assert (found.max_tokens, found.min_tokens, found.top_k) == (1024, 1, -1)
    assert not found.detokenize, "SkyRL decodes"
    sampling, wants_logprobs = sampling_of(SAMPLING | {"logprobs": None, "stop": ["x"]})
    assert not wants_logprobs
    found = resolve_sampling(sampling)
    assert (found.stop, found.include_stop_str_in_output) == (("x",), True)
    with pytest.raises(ConfigError, match=r"Group\(prompt, n="):
        resolve_sampling(sampling_of(SAMPLING | {"n": 2})[0])


def test_siblings_of_a_batch_are_those_with_equal_prompts():
    prompts = [[1, 2], [3], [1, 2], [1, 2]]
    assert group_sizes(prompts, None, set(), 8) == [3, 1, 3, 3]


def test_only_the_first_turn_of_an_agent_loop_has_siblings():
    seen: set[Any] = set()
    assert group_sizes([[1]], ["a_0"], seen, 8) == [8]
    assert group_sizes([[1]], ["a_1"], seen, 8) == [8]
    assert group_sizes([[1, 5, 6]], ["a_0"], seen, 8) == [1]
    assert seen == {"a_0", "a_1"}
    assert group_sizes([[1]], None, seen, 8) == [8]
    assert group_sizes([], None, seen, 8) == []


def test_a_groups_size_is_that_of_training_or_of_evaluation():
    assert group_size(config_of()) == 5
    assert group_size(config_of(generator__eval_n_samples_per_prompt=16)) == 16
