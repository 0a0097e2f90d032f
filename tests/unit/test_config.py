"""Engine settings: checked when made."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from aseer.config import (
    POLICY_NAMES,
    EngineConfig,
    SpeculationConfig,
    check_chunk_size,
    check_policy,
)
from aseer.errors import ConfigError
from aseer.policies import POLICIES

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "a model name or a directory"),
    ({"model": None}, "a model name or a directory"),
    ({"num_instances": 0}, "an int >= 1, or None for the default"),
    ({"num_instances": True}, "an int >= 1"),
    ({"max_model_len": 0}, "an int >= 1, or None"),
    ({"max_num_seqs": "many"}, "an int >= 1, or None"),
    ({"kv_cache_bytes": 1.5e9}, "an int >= 1, or None"),
    ({"gpus": []}, "ids such as [4, 5], or None"),
    ({"gpus": "0,1"}, "ids such as [4, 5], or None"),
    ({"gpus": [0, -1]}, "ids such as [4, 5], or None"),
    ({"gpus": [True]}, "ids such as [4, 5], or None"),
    ({"gpus_per_instance": 0}, "an int >= 1"),
    ({"gpus_per_instance": None}, "an int >= 1"),
    ({"chunk_size": -1}, "an int >= 0"),
    ({"starvation_interval": -1}, "an int >= 0"),
    ({"max_pending_requests": 0}, "an int >= 1"),
    ({"max_restarts": -1}, "an int >= 0"),
    ({"max_request_retries": -1}, "an int >= 0"),
    ({"report_interval_s": 0}, "a number of seconds above 0"),
    ({"start_timeout_s": -5}, "a number of seconds above 0"),
    ({"heartbeat_timeout_s": float("nan")}, "a number of seconds above 0"),
    ({"heartbeat_timeout_s": 0.9}, "at least 4 reports"),
    ({"stall_timeout_s": None}, "a number of seconds above 0"),
    ({"shutdown_timeout_s": True}, "a number of seconds above 0"),
    ({"device": "tpu"}, "one of auto, cuda, cpu, sim"),
    ({"policy": "lifo"}, "one of context-aware, fcfs"),
    ({"sampling": {"top_k": 3}}, "an aseer.SamplingParams"),
    ({"speculation": "telepathy"}, "one of off, dgds, suffix, ngram"),
]


@pytest.mark.parametrize(("setting", "allowed"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_refused_value_is_named_with_what_is_allowed(
    setting: dict[str, Any], allowed: str
) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError) as error:
        EngineConfig(**({"model": "m"} | setting))
    assert f"{name}={value!r} is not allowed; give {allowed}" in str(error.value)


@pytest.mark.parametrize("argument", ["model", "max_num_seqs", "enable_prefix_caching"])
def test_an_engine_argument_that_is_ours_is_refused_with_what_to_use(
    argument: str,
) -> None:
    with pytest.raises(ConfigError, match=f"engine_args has '{argument}'; use instead"):
        EngineConfig(model="m", engine_args={argument: 1})


def test_other_engine_arguments_go_through() -> None:
    config = EngineConfig(model="m", engine_args={"block_size": 32})
    assert config.engine_args == {"block_size": 32}


def test_only_the_model_is_required() -> None:
    required = {
        f.name
        for f in fields(EngineConfig)
        if f.default is f.default_factory  # both are "missing"
    }
    assert required == {"model"}


def test_a_directory_is_a_model() -> None:
    config = EngineConfig(model=Path("/models/m"), tokenizer=Path("/models/t"))
    assert (config.model, config.tokenizer) == ("/models/m", "/models/t")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dtype", object()),
        ("engine_args", {"download_dir": Path("/models")}),
        ("engine_args", None),
        ("env", None),
        ("kv_transfer_config", {"kv_connector": object()}),
        ("env", {"OMP_NUM_THREADS": 1}),
    ],
)
def test_what_another_process_cannot_be_told_is_refused(
    setting: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=setting):
        EngineConfig(model="m", **{setting: value})


def test_settings_do_not_change() -> None:
    config = EngineConfig(model="m")
    with pytest.raises(FrozenInstanceError):
        config.chunk_size = 1  # type: ignore[misc]


def test_every_setting_is_documented() -> None:
    for config in (EngineConfig, SpeculationConfig):
        for field in fields(config):
            assert f"{field.name}: " in (config.__doc__ or ""), field.name


def test_a_speculation_method_stands_for_its_settings() -> None:
    config = EngineConfig(model="m", speculation="dgds")
    assert config.speculation == SpeculationConfig(method="dgds")


def test_every_policy_named_exists_and_is_named_after_itself() -> None:
    assert set(POLICIES) == set(POLICY_NAMES)
    assert all(policy.name == name for name, policy in POLICIES.items())
    assert [check_policy(name) for name in POLICY_NAMES] == list(POLICY_NAMES)


def test_no_chunks_is_a_chunk_size() -> None:
    assert [check_chunk_size(n) for n in (0, 1, 2048)] == [0, 1, 2048]


@pytest.mark.parametrize("chunk_size", [-1, 1.0, True, None, "8"])
def test_a_chunk_size_is_a_whole_number(chunk_size: object) -> None:
    with pytest.raises(ConfigError, match="an int >= 1, or 0 for undivided"):
        check_chunk_size(chunk_size)
