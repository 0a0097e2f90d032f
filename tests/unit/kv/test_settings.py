"""What a pool is made of: sizes, keys, and what engines are told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.inputs.kv_pool import KvPoolConfig
from aseer.kv.pool import model_obstacle
from aseer.kv.settings import (
    CHUNK_KEY,
    Memory,
    PoolPlan,
    cache_salt,
    misfit,
    plan_pool,
    server_args,
    transfer_config,
    version_of,
)
from aseer.models.traits import traits_of
from tests.unit.builders import info_of

GB = 10**9


def plan(
    *,
    num_instances: int = 2,
    block_size: int | None = 32,
    free: int = 10 * GB,
    shm: int = 10 * GB,
    updates: int | None = 0,
    obstacle: str | None = None,
    config: dict[str, Any] | None = None,
    **pool: Any,
) -> tuple[PoolPlan | None, str]:
    settings = {"model": "m", "kv_pool": KvPoolConfig(**pool)} | (config or {})
    return plan_pool(
        EngineConfig(**settings),
        num_instances,
        block_size,
        Memory(free_bytes=free, shm_free_bytes=shm, update_bytes=updates),
        obstacle=obstacle,
    )


def test_two_engines_have_a_pool_by_themselves_and_one_has_none():
    found, why = plan()
    assert found is not None
    assert found.dram_bytes == 2 * GB
    assert why == "2.00 GB of DRAM (20% of 10.0 GB of free memory)"
    assert plan(num_instances=1) == (None, "one engine keeps its KV itself")


def test_where_no_request_is_divided_a_pool_is_only_had_on_demand():
    for settings, text in [
        ({"chunk_size": 0}, "chunk_size=0 divides no request"),
        ({"chunk_size": 512, "max_model_len": 512}, "of max_model_len=512"),
    ]:
        found, why = plan(config=settings)
        assert found is None
        assert text in why
        assert plan(config=settings, mode="lmcache")[0] is not None
    assert plan(config={"chunk_size": 511, "max_model_len": 512})[0] is not None
    assert plan(config={"chunk_size": 4096})[0] is not None, "the model's is not known"


def test_what_is_in_the_way_is_said():
    for settings, text in [
        ({"mode": "off"}, "switched off"),
        (
            {"obstacle": "LMCache is not installed"},
            "LMCache is not installed",
        ),
        ({"config": {"kv_transfer_config": {"kv_connector": "X"}}}, "another"),
        ({"config": {"model": "a@b"}}, "'@'"),
        ({"free": GB // 10}, "too little"),
        ({"shm": GB // 20}, "too little"),
    ]:
        found, why = plan(**settings)
        assert found is None
        assert text in why


def test_a_model_that_keeps_more_than_full_attention_has_no_pool():
    for settings, words in [
        ({"model_type": "gemma2", "sliding_window": 64}, "attention to a window"),
        ({"model_type": "jamba", "mamba_d_state": 16}, "recurrent states"),
        ({"model_type": "mistral", "sliding_window": 64}, "attention to a window"),
    ]:
        obstacle = model_obstacle(traits_of(settings))
        assert obstacle is not None
        assert words in obstacle
        assert plan(obstacle=obstacle) == (None, obstacle)
        with pytest.raises(ConfigError, match=f"cannot be had: .*{words}"):
            plan(mode="lmcache", obstacle=obstacle)
    assert model_obstacle(traits_of({"model_type": "llama"})) is None
    latent = {"model_type": "deepseek_v3", "kv_lora_rank": 512}
    assert model_obstacle(traits_of(latent)) is None
    assert model_obstacle(None) is None


def test_a_pool_that_was_asked_for_is_an_error_where_it_cannot_be():
    for settings in (
        {"obstacle": "LMCache is not installed"},
        {"free": GB // 10},
        {"dram_bytes": 11 * GB},
        {"config": {"kv_transfer_config": {"kv_connector": "X"}}},
    ):
        with pytest.raises(ConfigError, match="kv_"):
            plan(mode="lmcache", **settings)
    assert plan(mode="lmcache", num_instances=1)[0] is not None


def test_another_connectors_pool_needs_no_server_and_a_connector():
    connector = {"kv_transfer_config": {"kv_connector": "X"}}
    found, why = plan(mode="external", config=connector, num_instances=1, free=0)
    assert found is not None
    assert found.num_servers == 0
    assert found.chunk_tokens == 128
    assert why == "the connector of kv_transfer_config"
    with pytest.raises(ConfigError, match="name it in kv_transfer_config"):
        plan(mode="external")


def test_shared_memory_bounds_the_size_and_servers_share_it():
    found, _ = plan(shm=GB, num_servers=2)
    assert found is not None
    assert found.dram_bytes == 450_000_000


def test_weight_updates_are_left_their_room_in_shared_memory():
    found, why = plan(free=1000 * GB, shm=100 * GB, updates=30 * GB)
    assert found is not None
    assert found.dram_bytes == 60 * GB
    assert "less 30.0 GB for weight updates" in why
    found, why = plan(free=1000 * GB, shm=100 * GB, updates=None)
    assert found is not None
    assert found.dram_bytes == 50 * GB
    assert "weight updates need room there, too" in why
    assert plan(shm=10 * GB, updates=9 * GB)[0] is None


def test_a_large_node_page_locks_no_more_than_it_can_in_minutes_unless_told():
    found, why = plan(free=2000 * GB, shm=1000 * GB)
    assert found is not None
    assert found.dram_bytes == 128 << 30
    assert "unless dram_bytes is set" in why
    found, _ = plan(free=2000 * GB, shm=1000 * GB, dram_bytes=400 * GB)
    assert found is not None
    assert found.dram_bytes == 400 * GB


def test_engines_copy_their_kv_themselves_on_every_device():
    found, _ = plan()
    assert found is not None
    args = server_args(found, 1, "name", Path())
    assert args[args.index("--supported-transfer-mode") + 1] == "engine_driven"
    extra = transfer_config(found.timeout_s, 1, "log", 128)["kv_connector_extra_config"]
    assert extra["lmcache.mp.mp_transfer_mode"] == "engine_driven"


@pytest.mark.parametrize(
    ("heartbeat_timeout_s", "reap_s", "grace_s"),
    [(60.0, "120.0", "3600.0"), (300.0, "600.0", "3600.0"), (4e3, "8000.0", "8000.0")],
)
def test_a_workers_memory_is_not_given_to_others_before_its_engine_is_killed(
    heartbeat_timeout_s, reap_s, grace_s
):
    found, _ = plan(config={"heartbeat_timeout_s": heartbeat_timeout_s})
    assert found is not None
    args = server_args(found, 1, "name", Path())
    assert args[args.index("--worker-reap-timeout-seconds") + 1] == reap_s
    assert args[args.index("--worker-registration-grace-seconds") + 1] == grace_s


def test_what_is_found_together_is_whole_blocks():
    for block_size, tokens in ((32, 128), (None, 128), (96, 384), (256, 256)):
        found, _ = plan(block_size=block_size)
        assert found is not None
        assert found.chunk_tokens == tokens


@pytest.mark.parametrize("size", [1, 16, 32, 64, 128])
def test_blocks_that_divide_what_is_found_together_fit(size):
    assert misfit([size], 128) == ""


@pytest.mark.parametrize(("size", "advice"), [(48, 384), (256, 256), (528, 4224)])
def test_blocks_that_do_not_are_told_with_what_to_set(size, advice):
    why = misfit([size], 128)
    assert f"blocks of {size} tokens" in why
    assert f"kv_pool={{'chunk_tokens': {advice}}}" in why
    assert misfit([size], advice) == ""


def test_groups_of_layers_do_not_fit_whatever_their_blocks():
    assert "2 groups of layers" in misfit([16, 16], 128)


def test_the_disk_is_used_if_it_has_a_limit():
    found, _ = plan(disk_dir="/x", disk_bytes=3 << 30)
    assert found is not None
    args = server_args(found, 5, "s", Path("/x/y"))
    disk = json.loads(args[args.index("--l2-adapter") + 1])
    assert disk["base_path"] == "/x/y"
    assert disk["max_capacity_gb"] == 3
    assert disk["eviction"]["eviction_policy"] == "LRU", "or it would have no limit"
    found, _ = plan(disk_dir="/x")
    assert found is not None
    assert "--l2-adapter" not in server_args(found, 5, "s", Path("/x/y"))
    with pytest.raises(ConfigError, match="disk_dir"):
        KvPoolConfig(disk_bytes=1)


def test_engines_are_told_to_store_what_they_generate_and_to_recompute_what_fails():
    found, _ = plan(timeout_s=3)
    assert found is not None
    told = transfer_config(found.timeout_s, 7, "/logs/kv-pool-0.log", 384)
    assert told["kv_load_failure_policy"] == "recompute"
    assert told["kv_connector_extra_config"]["lmcache.mp.save_decode_cache"] is True
    assert told["kv_connector_extra_config"]["lmcache.mp.port"] == 7
    assert told["kv_connector_extra_config"][CHUNK_KEY] == 384


def test_whatever_makes_other_kv_of_the_same_tokens_is_in_the_salt():
    info = dataclasses.replace(info_of(), model="m", dtype="bfloat16")
    salts = {
        cache_salt("run", info, 0),
        cache_salt("run", info, 1),
        cache_salt("other", info, 0),
        cache_salt("run", dataclasses.replace(info, model="n"), 0),
        cache_salt("run", dataclasses.replace(info, dtype="float32"), 0),
        cache_salt("run", dataclasses.replace(info, block_size=64), 0),
    }
    assert len(salts) == 6
    assert not any(c in salt for salt in salts for c in "@/\\\0")
    assert max(map(len, salts)) < 128
    assert version_of(cache_salt("run", info, 41)) == 41
    assert version_of("something else") is None
