"""What verl's settings become, and which are refused in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.integrations.settings import HostShare, check_placement
from aseer.integrations.verl_settings import (
    sampling_of,
    server_settings,
)
from aseer.sampling import resolve_sampling

OFF = SimpleNamespace(enable=False, enabled=False, enable_rollout=False)


def rollout_of(**changes: Any) -> SimpleNamespace:
    """verl 0.9.1's defaults, as far as they are looked at."""
    defaults: dict[str, Any] = {
        "tensor_model_parallel_size": 2,
        "data_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_parallel_size": 1,
        "engine_kwargs": {},
        "dtype": "bfloat16",
        "max_model_len": None,
        "prompt_length": 512,
        "response_length": 1024,
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": False,
        "cudagraph_capture_sizes": None,
        "free_cache_engine": True,
        "n": 8,
        "val_kwargs": SimpleNamespace(n=1),
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "full_determinism": False,
        "seed": 42,
        "quantization": None,
        "qat": None,
        "enable_rollout_routing_replay": False,
        "mtp": OFF,
        "disaggregation": OFF,
        "prometheus": OFF,
        "logprobs_mode": "processed_logprobs",
        "scheduling_policy": "fcfs",
        "checkpoint_engine": SimpleNamespace(backend="naive"),
    }
    return SimpleNamespace(**defaults | changes)


PAIR = [("a", "0"), ("a", "1")]


def model_of(**changes: Any) -> SimpleNamespace:
    defaults: dict[str, Any] = {
        "path": "Qwen/Qwen3-8B",
        "trust_remote_code": False,
        "lora_rank": 0,
        "lora": {"rank": 0, "merge": False},
    }
    return SimpleNamespace(**defaults | changes)


def settings_of(
    *, gpus: int = 8, hosts: str = "a", on_gpus: bool = True, **changes: Any
) -> Any:
    places = [(host, f"{number}") for host in hosts for number in range(gpus)]
    return server_settings(rollout_of(**changes), model_of(), places, on_gpus=on_gpus)


def test_on_several_hosts_each_has_a_node_with_the_trainers_gpus_there():
    settings = settings_of(gpus=4, hosts="ab")
    assert settings.hosts == (
        HostShare("a", tuple("0123"), 2),
        HostShare("b", tuple("0123"), 2),
    )
    config = EngineConfig(**settings.engine)
    assert (config.nodes, config.min_nodes, config.gpus) == ("ray", 2, None)
    assert (config.num_instances, config.gpus_per_instance) == (2, 2)
    one = {"aseer": {"num_instances": 1}}
    shares = settings_of(gpus=4, hosts="ab", engine_kwargs=one).hosts
    assert [share.num_instances for share in shares] == [1, 1]
    with pytest.raises(ConfigError, match="has 1 processes on a host, which"):
        settings_of(gpus=1, hosts="ab")
    assert settings_of().hosts == ()


def test_all_of_the_trainers_gpus_are_one_engines():
    settings = settings_of()
    config = EngineConfig(**settings.engine)
    assert list(config.gpus or ()) == list("01234567")
    assert (config.num_instances, config.gpus_per_instance) == (4, 2)
    assert config.max_model_len == 512 + 1024
    assert config.engine_args["enable_sleep_mode"] is True
    assert config.engine_args["gpu_memory_utilization"] == 0.5
    assert settings.sleeps
    assert settings.group_size == 8
    assert settings_of(n=1, val_kwargs=SimpleNamespace(n=16)).group_size == 16


def test_on_a_cpu_nothing_sleeps_and_no_gpu_is_named():
    settings = settings_of(gpus=2, on_gpus=False, tensor_model_parallel_size=1)
    config = EngineConfig(**settings.engine)
    assert (config.device, config.num_instances, config.gpus) == ("cpu", 2, None)
    assert not settings.sleeps
    assert "enable_sleep_mode" not in config.engine_args


def test_users_own_settings_come_last():
    own = {
        "speculation": "dgds",
        "join_s": 1.0,
        "update_timeout_s": 9.0,
        "num_instances": 2,
        "engine_args": {"enforce_eager": True},
    }
    vllm = {"max_num_batched_tokens": 100, "block_size": 32}
    settings = settings_of(engine_kwargs={"aseer": own, "vllm": vllm})
    config = EngineConfig(**settings.engine)
    assert (config.speculation.method, config.num_instances) == ("dgds", 2)
    assert config.engine_args["enforce_eager"] is True
    assert config.engine_args["max_num_batched_tokens"] == 100
    assert config.engine_args["block_size"] == 32
    assert (settings.join_s, settings.update_timeout_s) == (1.0, 9.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline_model_parallel_size": 2}, "pipeline"),
        ({"expert_parallel_size": 2}, "enable_expert_parallel"),
        ({"quantization": "fp8"}, "engine_args.quantization"),
        ({"qat": {"enable": True}}, "qat"),
        ({"enable_rollout_routing_replay": True}, "routing_replay"),
        ({"mtp": SimpleNamespace(enable=True, enable_rollout=True)}, "speculation"),
        ({"disaggregation": SimpleNamespace(enabled=True)}, "disaggregation"),
        ({"prometheus": SimpleNamespace(enable=True)}, "prometheus"),
        ({"logprobs_mode": "raw_logprobs"}, "processed_logprobs"),
        ({"scheduling_policy": "priority"}, "scheduling_policy=priority"),
        ({"checkpoint_engine": SimpleNamespace(backend="nccl")}, "backend=nccl"),
        ({"engine_kwargs": {"aseer": {"chunksize": 3}}}, "aseer.chunksize is not"),
        ({"engine_kwargs": "aseer"}, "engine_kwargs='aseer' is not"),
        ({"engine_kwargs": {"aseer": 512}}, "engine_kwargs.aseer=512 is not"),
        ({"engine_kwargs": {"vllm": ["a"]}}, r"engine_kwargs.vllm=\['a'\] is not"),
        ({"engine_kwargs": {"aseer": {"engine_args": 3}}}, "engine_args=3 is not"),
        ({"tensor_model_parallel_size": 3}, "does not divide"),
    ],
)
def test_what_would_be_ignored_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings_of(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 8}, "merge=True"),
        ({"lora": {"rank": 8}}, "merge=True"),
        ({"path": "hdfs://somewhere"}, "hdfs://somewhere"),
    ],
)
def test_models_that_it_cannot_serve_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        server_settings(rollout_of(), model_of(**changes), PAIR, on_gpus=True)
    merged = model_of(lora_rank=8, lora={"merge": True})
    server_settings(rollout_of(), merged, PAIR, on_gpus=True)


def test_several_nodes_are_refused():
    said = ("a trainer", "set nnodes=1")
    assert check_placement(["a", "a"], *said) == "a"
    with pytest.raises(ConfigError, match="are on 2; set nnodes"):
        check_placement(["a", "b", "a"], *said)


def test_sampling_means_what_it_means_to_verls_own_servers():
    settings = settings_of(repetition_penalty=1.2, ignore_eos=True)
    given = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "logprobs": True,
    }
    found = resolve_sampling(sampling_of(settings, given, 100))
    assert (found.temperature, found.top_p, found.top_k) == (0.7, 0.9, -1)
    assert (found.repetition_penalty, found.ignore_eos) == (1.0, True)
    assert found.max_tokens == 1024
    assert given["logprobs"] is True, "the caller's own"
    # A later turn has what is left of both lengths.
    assert sampling_of(settings, {}, 1000)["max_tokens"] == 536
    assert sampling_of(settings, {"max_tokens": 5}, 1000)["max_tokens"] == 5
    assert sampling_of(settings, {"max_new_tokens": 6}, 1000)["max_tokens"] == 6
    assert sampling_of(settings, {"max_tokens": 5000}, 1000)["max_tokens"] == 536
    with pytest.raises(ConfigError, match="prompt_logprobs"):
        sampling_of(settings, {"prompt_logprobs": 1}, 100)
    with pytest.raises(ConfigError, match=r"'max_new_tokens'.='many' is not"):
        sampling_of(settings, {"max_new_tokens": "many"}, 100)
    seeded = settings_of(full_determinism=True)
    assert sampling_of(seeded, {}, 1)["seed"] == 42
