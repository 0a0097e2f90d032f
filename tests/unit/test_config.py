"""Engine settings: checked when made."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest

from aseer.config import (
    POLICY_NAMES,
    EngineConfig,
    check_policy,
    is_speculating,
    takes_nodes,
)
from aseer.errors import ConfigError
from aseer.inputs.calls import check_chunk_size, check_pause, check_transfer
from aseer.inputs.engine_args import _DRAFTER, _OWN, _REFUSED
from aseer.inputs.kv_pool import KvPoolConfig
from aseer.inputs.speculation import SpeculationConfig
from aseer.policies import POLICIES

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "a model name or a directory"),
    ({"model": None}, "a model name or a directory"),
    ({"num_instances": 0}, "an int >= 1, or None for the default"),
    ({"num_instances": True}, "an int >= 1"),
    ({"min_nodes": -1}, "an int >= 0"),
    ({"listen": "head:5557"}, "tcp://HOST:PORT"),
    ({"nodes": "slurm"}, "'ray', or None"),
    ({"node_timeout_s": 0}, "a number of seconds above 0"),
    ({"max_model_len": 0}, "an int >= 1, or None"),
    ({"max_num_seqs": "many"}, "an int >= 1, or None"),
    ({"kv_cache_bytes": 1.5e9}, "an int >= 1, or None"),
    ({"gpus": []}, "ids such as [4, 5], or None"),
    ({"gpus": "0,1"}, "ids such as [4, 5], or None"),
    ({"gpus": [0, -1]}, "ids such as [4, 5], or None"),
    ({"gpus": [True]}, "ids such as [4, 5], or None"),
    ({"gpus_per_instance": 0}, "an int >= 1"),
    ({"max_lora_rank": 0}, "an int >= 1, or None"),
    ({"max_lora_rank": 513}, "an int <= 512, or None"),
    ({"gpus_per_instance": None}, "an int >= 1"),
    ({"chunk_size": -1}, "an int >= 0"),
    ({"starvation_interval": -1}, "an int >= 0"),
    ({"max_pending_requests": 0}, "an int >= 1"),
    ({"max_restarts": -1}, "an int >= 0"),
    ({"max_request_retries": -1}, "an int >= 0"),
    ({"report_interval_s": 0}, "a number of seconds above 0"),
    ({"start_timeout_s": -5}, "a number of seconds above 0"),
    ({"heartbeat_timeout_s": float("nan")}, "a number of seconds above 0"),
    ({"start_timeout_s": float("inf")}, "a number of seconds above 0, at most 1e+09"),
    ({"shutdown_timeout_s": "soon"}, "a number of seconds above 0"),
    ({"max_model_len": 1 << 31}, "an int <= 2147483647, or None"),
    ({"seed": 1 << 63}, "an int <= 9223372036854775807, or None"),
    ({"kv_cache_bytes": 1 << 63}, "an int <= 9223372036854775807, or None"),
    ({"length_priors": 1}, "True or False"),
    ({"log_dir": ""}, "a directory, in valid Unicode, or None"),
    ({"weights_dir": 7}, "a directory, in valid Unicode, or None"),
    ({"weights_dir": "\udcff"}, "a directory, in valid Unicode, or None"),
    ({"model": "\udcff"}, "a model name or a directory, in valid Unicode"),
    ({"dtype": "\udcff"}, "a name, such as"),
    ({"tokenizer": ""}, "a model name or a directory"),
    ({"env": {"A=B": "1"}}, "texts by texts, without NUL, or = in a name"),
    ({"env": {"A": "\0"}}, "texts by texts, without NUL"),
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


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        ({"pipeline_parallel_size": 2}, "set gpus_per_instance to all"),
        ({"decode_context_parallel_size": 2}, "gpus_per_instance"),
        ({"prefill_context_parallel_size": 2}, "gpus_per_instance"),
        ({"data_parallel_size": 2}, "set num_instances"),
        ({"data_parallel_size_local": 2}, "set num_instances"),
        ({"data_parallel_rank": 0}, "set num_instances"),
        ({"data_parallel_address": "10.0.0.1"}, "set num_instances"),
        ({"data_parallel_external_lb": True}, "set num_instances"),
        ({"nnodes": 2}, "counted as nodes_per_instance"),
        ({"node_rank": 1}, "counted as nodes_per_instance"),
        ({"distributed_executor_backend": "ray"}, 'give "mp" or "uni"'),
        ({"scheduler_cls": "mine.Scheduler"}, "reserves KV"),
        ({"watermark": 0.1}, "reserves KV"),
        ({"max_num_queued_reqs": 4}, "reserves KV"),
        ({"logits_processors": ["mine.Processor"]}, "begin its history anew"),
        ({"watermark_config": {"a": 1}}, "begin its history anew"),
        ({"ec_transfer_config": {"ec_role": "ec_both"}}, "of old weights"),
        ({"runner": "pooling"}, "from left to right"),
        ({"skip_tokenizer_init": True}, "detokenize=False"),
    ],
)
def test_an_engine_argument_that_goes_wrong_later_is_refused_by_name(
    args: dict[str, Any], advice: str
) -> None:
    ((name, value),) = args.items()
    with pytest.raises(ConfigError) as error:
        EngineConfig(model="m", engine_args=args)
    assert f"engine_args has {name}={value!r}, which aseer" in str(error.value)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("kv_offloading_size", "kv_pool"),
        ("enable_lora", "max_lora_rank"),
        ("max_loras", "max_lora_rank"),
        ("device_ids", "gpus"),
        ("max_num_active_seqs", "max_num_seqs"),
        ("stream_interval", "nothing"),
    ],
)
def test_an_engine_argument_that_another_setting_has_is_refused_with_it(
    argument: str, instead: str
) -> None:
    with pytest.raises(ConfigError, match=f"{argument!r}; use instead: {instead}"):
        EngineConfig(model="m", engine_args={argument: 1})


@pytest.mark.parametrize("name", ["speculative_config", "spec_method", "spec_model"])
def test_a_drafter_of_the_users_goes_with_no_other(name: str) -> None:
    args = {name: "ngram"}
    with pytest.raises(ConfigError, match=r"speculation='dgds' sets another"):
        EngineConfig(model="m", speculation="dgds", engine_args=args)
    assert is_speculating(EngineConfig(model="m", engine_args=args))
    assert is_speculating(EngineConfig(model="m", speculation="dgds"))
    assert not is_speculating(EngineConfig(model="m", engine_args={name: None}))


@pytest.mark.parametrize("name", ["VLLM_DP_SIZE", "VLLM_DP_RANK"])
def test_data_parallel_ranks_are_refused_as_variables_too(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"env has {name}='2'.*set num_instances"):
        EngineConfig(model="m", env={name: "2"})


def test_an_engine_argument_that_changes_nothing_goes_through() -> None:
    args = {
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "distributed_executor_backend": "mp",
        "scheduler_cls": None,
        "watermark": 0.0,
        "runner": "generate",
        "skip_tokenizer_init": False,
    }
    assert EngineConfig(model="m", engine_args=args).engine_args == args


@pytest.mark.parametrize("name", ["Extension", "a.b:C", ".C", 7, "a..C"])
def test_a_worker_extension_is_named_with_its_module(name: object) -> None:
    with pytest.raises(ConfigError, match=r"worker_extension_cls=.*package\.module"):
        EngineConfig(model="m", engine_args={"worker_extension_cls": name})


def test_every_argument_that_is_refused_is_one_of_vllms() -> None:
    """Or a name of another version would be refused in vain."""
    source = find_spec("vllm")
    if source is None or source.origin is None:
        pytest.skip("vLLM is not installed")
    text = (Path(source.origin).parent / "engine" / "arg_utils.py").read_text()
    for name in (*_OWN, *_REFUSED, *_DRAFTER):
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name


def test_an_engine_without_instances_of_its_own_waits_for_a_node() -> None:
    listen = "tcp://127.0.0.1:5557"
    config = EngineConfig(model="m", num_instances=0, listen=listen, min_nodes=1)
    assert config.num_instances == 0
    with pytest.raises(ConfigError, match=r"min_nodes=0 .*since num_instances is 0"):
        EngineConfig(model="m", num_instances=0, listen=listen)
    for setting in ({"min_nodes": 1}, {"controller_file": "run.json"}):
        with pytest.raises(ConfigError, match=r"listen=None is not allowed"):
            EngineConfig(model="m", **setting)


def test_nodes_that_ray_places_need_no_address_and_are_given_their_gpus() -> None:
    config = EngineConfig(model="m", nodes="ray", min_nodes=2, controller_file="run")
    assert (takes_nodes(config), config.listen) == (True, None)
    assert not takes_nodes(EngineConfig(model="m"))
    with pytest.raises(ConfigError, match=r"gpus=.*Ray says which GPUs"):
        EngineConfig(model="m", nodes="ray", gpus=[0])
    listen = "tcp://127.0.0.1:5557"
    with pytest.raises(ConfigError, match=r"num_instances=0 is not .* an int >= 1"):
        EngineConfig(model="m", nodes="ray", num_instances=0, listen=listen)


def spanning(**settings: Any) -> EngineConfig:
    """Settings of engines that span two nodes."""
    listen = "tcp://127.0.0.1:5557"
    defaults = {"nodes_per_instance": 2, "listen": listen, "min_nodes": 2}
    return EngineConfig(model="m", **defaults | settings)


def test_engines_that_span_nodes_are_none_of_this_host() -> None:
    assert spanning().num_instances == spanning(num_instances=0).num_instances == 0
    assert EngineConfig(model="m").num_instances is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"nodes_per_instance": 0}, "nodes_per_instance=0 .* an int >= 1"),
        ({"listen": None}, "listen=None .* since nodes_per_instance is 2"),
        ({"nodes": "ray"}, "nodes='ray' .* start nodes by `aseer node`"),
        ({"num_instances": 2}, "num_instances=2 .*`aseer node` on this host"),
        ({"min_nodes": 1}, "min_nodes=1 .* as many or more"),
        ({"max_lora_rank": 8}, "max_lora_rank=8 .* within a host"),
        ({"kv_transfer_config": {"kv_connector": "x"}}, "kv_transfer_config"),
        ({"kv_pool": "lmcache"}, "kv_pool='lmcache' .* 'auto' or 'off'"),
        ({"speculation": "dgds"}, "speculation='dgds' .* within a host"),
        ({"engine_args": {"spec_method": "ngram"}}, "a drafter; leave it out, since"),
        ({"engine_args": {"master_port": 1}}, "counted as nodes_per_instance"),
    ],
)
def test_what_engines_that_span_nodes_cannot_have_is_refused(
    settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        spanning(**settings)


def test_numbers_may_be_numpys_and_are_kept_as_plain_data() -> None:
    config = EngineConfig(
        model=np.str_("m"),
        num_instances=np.int64(2),
        max_model_len=np.array(64),
        gpus=np.array([1, 2]),
        chunk_size=np.uint16(7),
        report_interval_s=np.float32(0.5),
        length_priors=np.True_,
        speculation=SpeculationConfig(
            max_draft_tokens=np.int64(4), probe_weight=np.float64(1.5)
        ),
        kv_pool=KvPoolConfig(disk_bytes=np.int64(0), timeout_s=np.float32(2)),
        engine_args={"block_size": np.int64(32), "a": {"b": (np.float64(0.5), None)}},
        env={np.str_("A"): np.str_("b")},
    )
    assert config.engine_args == {"block_size": 32, "a": {"b": [0.5, None]}}
    assert config.gpus == ("1", "2")

    def check_plain(value: object) -> None:
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if is_dataclass(value):
            value = [getattr(value, f.name) for f in fields(value)]
        if isinstance(value, list | tuple):
            for item in value:
                check_plain(item)
        else:
            allowed = (int, float, str, bool, type(None), PosixPath)
            assert type(value) in allowed, value

    check_plain([getattr(config, f.name) for f in fields(config)])


def test_settings_may_come_from_a_yaml_file() -> None:
    """There a bare `off` is False, and settings of settings are mappings."""
    config = EngineConfig(model="m", kv_pool=False, speculation=False)
    assert config == EngineConfig(model="m", kv_pool="off", speculation="off")
    config = EngineConfig(
        model="m",
        kv_pool={"mode": "lmcache", "chunk_tokens": 64},
        speculation={"method": "dgds", "max_draft_tokens": 4},
    )
    assert config.kv_pool == KvPoolConfig(mode="lmcache", chunk_tokens=64)
    assert config.speculation == SpeculationConfig(method="dgds", max_draft_tokens=4)
    with pytest.raises(ConfigError, match=r"kv_pool's key='modes' .* mode, dram_bytes"):
        EngineConfig(model="m", kv_pool={"modes": "off"})
    with pytest.raises(ConfigError, match="no message that calls such a copy back"):
        KvPoolConfig(transfer="lmcache_driven")
    with pytest.raises(ConfigError, match=r"transfer='cuda_ipc'.*engine_driven"):
        KvPoolConfig(transfer="cuda_ipc")
    with pytest.raises(ConfigError, match="policy=False is not allowed"):
        EngineConfig(model="m", policy=False)
    with pytest.raises(ConfigError, match="kv_pool=True is not allowed"):
        EngineConfig(model="m", kv_pool=True)


def test_settings_do_not_change_with_what_they_were_made_of() -> None:
    args = {"hf_overrides": {"a": 1}}
    config = EngineConfig(model="m", engine_args=args)
    args["hf_overrides"]["a"] = 2
    assert config.engine_args == {"hf_overrides": {"a": 1}}


def test_paths_are_those_of_when_the_settings_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = EngineConfig(
        model="models/m",
        tokenizer=Path("models/m"),
        log_dir="logs",
        weights_dir=Path("weights"),
        kv_pool=KvPoolConfig(disk_dir="kv", disk_bytes=1),
    )
    monkeypatch.chdir("/")
    assert config.model == config.tokenizer == str(tmp_path / "models" / "m")
    assert config.log_dir == tmp_path / "logs"
    assert config.weights_dir == tmp_path / "weights"
    assert isinstance(config.kv_pool, KvPoolConfig)
    assert config.kv_pool.disk_dir == tmp_path / "kv"
    assert EngineConfig(model="./later").model == "/later"


@pytest.mark.parametrize("name", ["org/name", "name", "x" * 5000, "s3://bucket/name"])
def test_a_models_name_stays_a_name(name: str) -> None:
    assert EngineConfig(model=name, tokenizer=name).model == name


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


def test_what_is_no_choice_is_refused_whatever_it_is() -> None:
    choices = ((check_policy, "fcfs"), (check_pause, "wait"), (check_transfer, "ipc"))
    for check, name in choices:
        with pytest.raises(ConfigError, match="is not allowed; give"):
            check(np.ones(2))
        check(np.str_(name))


def test_no_chunks_is_a_chunk_size() -> None:
    assert [check_chunk_size(n) for n in (0, 1, 2048)] == [0, 1, 2048]


@pytest.mark.parametrize("chunk_size", [-1, 1.0, True, None, "8"])
def test_a_chunk_size_is_a_whole_number(chunk_size: object) -> None:
    with pytest.raises(ConfigError, match="an int >= 1, or 0 for undivided"):
        check_chunk_size(chunk_size)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size=0 .* an int >= 1"),
        ({"num_instances": 3}, "num_instances=3 .* a multiple of 2, since"),
        ({"nodes": "ray"}, "nodes='ray' .* start nodes by `aseer node`"),
        (
            {"nodes_per_instance": 2, "listen": "tcp://127.0.0.1:5557"},
            "nodes_per_instance=2 .* since data_parallel_size is 2",
        ),
        ({"max_lora_rank": 8}, "max_lora_rank=8 .* that compute alone"),
        ({"kv_pool": "lmcache"}, "kv_pool='lmcache' .* 'auto' or 'off'"),
        ({"speculation": "dgds"}, "speculation='dgds' .* that compute alone"),
        ({"engine_args": {"spec_method": "ngram"}}, "a drafter; leave it out, since"),
        ({"engine_args": {"data_parallel_size": 2}}, "EngineConfig.data_parallel_size"),
        ({"engine_args": {"data_parallel_rank": 1}}, "EngineConfig.data_parallel_size"),
    ],
)
def test_what_engines_that_compute_together_cannot_have_is_refused(
    settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        EngineConfig(model="m", **{"data_parallel_size": 2} | settings)


def test_engines_that_compute_together_are_counted_one_by_one() -> None:
    for num in (None, 2, 4):
        config = EngineConfig(model="m", data_parallel_size=2, num_instances=num)
        assert config.num_instances == num
