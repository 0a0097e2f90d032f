"""Every engine gets its own share of the machine; what is not there is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.models.traits import ModelTraits, traits_of
from aseer.node.machine import Machine, fast_cpu_dtype, free_memory_bytes, visible_gpus
from aseer.node.messages import Located
from aseer.runtime.launch import (
    member_args,
    member_env,
    plan_instances,
    rank_args,
)

GIB = 1 << 30


def machine(
    *, gpus=(), cores=(0, 1), memory=20 * GIB, cpu_only=False, cpu_dtype="bfloat16"
):
    return Machine(
        gpus=gpus,
        cores=cores,
        free_memory_bytes=memory,
        cpu_only=cpu_only,
        cpu_dtype=cpu_dtype,
    )


def bindings(launches):
    return [launch.env["VLLM_CPU_OMP_THREADS_BIND"] for launch in launches]


def devices(launches):
    return [launch.env["CUDA_VISIBLE_DEVICES"] for launch in launches]


def test_without_gpus_every_engine_is_bound_to_cores_of_its_own():
    launches = plan_instances(EngineConfig(model="m"), machine())
    assert bindings(launches) == ["0", "1"]
    assert [launch.cores for launch in launches] == [(0,), (1,)]
    config = EngineConfig(model="m", num_instances=3)
    assert bindings(plan_instances(config, machine(cores=tuple(range(6))))) == [
        "0,1",
        "2,3",
        "4,5",
    ]


def test_more_engines_than_cores_take_turns():
    config = EngineConfig(model="m", num_instances=3)
    assert bindings(plan_instances(config, machine())) == ["0", "1", "0"]


def test_an_engines_cores_and_kv_are_shared_out_among_its_workers():
    config = EngineConfig(model="m", gpus_per_instance=2, kv_cache_bytes=4 * GIB)
    (launch,) = plan_instances(config, machine())
    assert bindings([launch]) == ["0|1"]
    assert launch.cores == (0, 1)
    assert launch.engine_args["tensor_parallel_size"] == 2
    assert launch.engine_args["kv_cache_memory_bytes"] == 2 * GIB
    launches = plan_instances(config, machine(cores=tuple(range(8))))
    assert bindings(launches) == ["0,1|2,3", "4,5|6,7"]
    config = EngineConfig(model="m", gpus_per_instance=4)
    (launch,) = plan_instances(config, machine())
    assert bindings([launch]) == ["0|1|0|1"]


def test_experts_are_spread_over_gpus_and_not_over_a_cpus_workers():
    args = {"enable_expert_parallel": True}
    config = EngineConfig(model="m", gpus_per_instance=2, engine_args=args)
    with pytest.raises(ConfigError, match=r"enable_expert_parallel.*leave it out"):
        plan_instances(config, machine())
    with pytest.raises(ConfigError, match=r"enable_expert_parallel.*leave it out"):
        plan_instances(spanning(engine_args=args), machine())
    gpus = machine(gpus=("0", "1"), cpu_only=False)
    (launch,) = plan_instances(config, gpus)
    assert launch.engine_args["enable_expert_parallel"] is True
    config = EngineConfig(model="m", engine_args=args)
    assert plan_instances(config, machine()), "one worker has all of them"


@pytest.mark.parametrize(
    ("settings", "gpus", "cpu_dtype", "dtype"),
    [
        ({}, (), "bfloat16", "auto"),
        ({}, (), "float32", "float32"),
        ({"dtype": "bfloat16"}, (), "float32", "bfloat16"),
        ({}, ("0",), "float32", "auto"),
    ],
)
def test_a_cpu_that_emulates_bfloat16_computes_in_float32_unless_told(
    settings, gpus, cpu_dtype, dtype
):
    config = EngineConfig(model="m", **settings)
    for launch in plan_instances(config, machine(gpus=gpus, cpu_dtype=cpu_dtype)):
        assert launch.engine_args["dtype"] == dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fma avx2", "float32"),
        ("avx2 avx512f avx512_bf16x", "float32"),
        ("avx512f avx512_bf16 amx_tile", "bfloat16"),
        ("asimd bf16 i8mm", "bfloat16"),
    ],
)
def test_a_cpus_flags_tell_whether_it_has_bfloat16(tmp_path, flags, dtype):
    assert fast_cpu_dtype(tmp_path) == "float32"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert fast_cpu_dtype(tmp_path) == dtype


def test_on_gpus_there_is_an_engine_for_each_and_each_sees_only_its_own():
    launches = plan_instances(EngineConfig(model="m"), machine(gpus=("0", "1", "2")))
    assert devices(launches) == ["0", "1", "2"]
    config = EngineConfig(model="m", gpus_per_instance=2)
    launches = plan_instances(config, machine(gpus=("4", "5", "6", "7")))
    assert devices(launches) == ["4,5", "6,7"]
    assert launches[0].env["HIP_VISIBLE_DEVICES"] == "4,5"
    assert launches[0].engine_args["tensor_parallel_size"] == 2


@pytest.mark.parametrize(
    ("environ", "nvidia", "amd", "ids"),
    [
        ({}, (), (), ()),
        ({}, ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"), (), ("0", "1")),
        ({}, (), ("0", "50432", "0", "4711"), ("0", "1")),
        ({"CUDA_VISIBLE_DEVICES": "3, GPU-a"}, ("nvidia0",), (), ("3", "GPU-a")),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ("nvidia0",), (), ()),
        ({"HIP_VISIBLE_DEVICES": "1"}, (), ("4711", "50432"), ("1",)),
    ],
)
def test_gpus_are_those_the_environment_names_or_all(
    tmp_path, environ, nvidia, amd, ids
):
    for name in nvidia:
        (tmp_path / name).touch()
    for number, gpu_id in enumerate(amd):
        (tmp_path / "nodes" / str(number)).mkdir(parents=True)
        (tmp_path / "nodes" / str(number) / "gpu_id").write_text(f"{gpu_id}\n")
    assert visible_gpus(environ, tmp_path, tmp_path / "nodes") == ids


def test_a_container_counts_its_devices_from_0_whatever_their_names(tmp_path):
    for name in ("nvidia4", "nvidia5", "nvidia6", "nvidia7"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path, tmp_path) == ("0", "1", "2", "3")


def test_workers_are_spawned_and_not_forked_unless_the_user_says_otherwise():
    found = machine(gpus=("0",))
    (launch,) = plan_instances(EngineConfig(model="m"), found)
    assert launch.env["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    config = EngineConfig(model="m", env={"VLLM_WORKER_MULTIPROC_METHOD": "fork"})
    (launch,) = plan_instances(config, found)
    assert launch.env["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"


def test_how_long_engines_may_take_is_ours_to_say_and_not_vllms():
    for found in (machine(gpus=("0",)), machine(cores=(0,))):
        (launch,) = plan_instances(EngineConfig(model="m", num_instances=1), found)
        for name in ("ENGINE_READY_TIMEOUT_S", "EXECUTE_MODEL_TIMEOUT_SECONDS"):
            limit_s = int(launch.env[f"VLLM_{name}"])
            assert 7 * 24 * 3600 < limit_s < 2**31 / 1000


@pytest.mark.parametrize("method", ["off", "ngram", "dgds"])
def test_gpus_have_the_model_runner_that_vllm_has_for_them(method):
    found = machine(gpus=("0",))
    config = EngineConfig(model="m", speculation=method)
    (launch,) = plan_instances(config, found)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in launch.env


def test_an_engines_kv_is_shared_out_among_its_gpus():
    config = EngineConfig(model="m", gpus_per_instance=4, kv_cache_bytes=4 * GIB)
    (launch,) = plan_instances(config, machine(gpus=tuple("0123")))
    assert launch.engine_args["kv_cache_memory_bytes"] == GIB


@pytest.mark.parametrize(("rank", "vllms"), [(1, 1), (9, 16), (300, 320), (512, 512)])
def test_adapters_have_the_next_rank_that_vllm_allows(rank, vllms):
    config = EngineConfig(model="m", max_lora_rank=rank)
    for found in (machine(gpus=("0",)), machine()):
        args = plan_instances(config, found)[0].engine_args
        names = ("enable_lora", "max_lora_rank", "max_loras")
        assert [args[name] for name in names] == [True, vllms, 2]
    (launch,) = plan_instances(EngineConfig(model="m"), machine(gpus=("0",)))
    assert "enable_lora" not in launch.engine_args


def test_a_cpu_build_of_vllm_runs_on_the_cpu_though_there_are_gpus():
    found = machine(gpus=("0",), cpu_only=True)
    assert bindings(plan_instances(EngineConfig(model="m"), found)) == ["0", "1"]


def test_gpus_are_those_asked_for_whatever_the_trainer_sees():
    config = EngineConfig(model="m", gpus=[4, "5"])
    assert devices(plan_instances(config, machine(gpus=("0", "1")))) == ["4", "5"]
    with pytest.raises(ConfigError, match=r"gpus=\('4', '5'\).* built for CPUs"):
        plan_instances(config, machine(cpu_only=True))


def test_too_few_gpus_are_counted():
    config = EngineConfig(model="m", num_instances=3, gpus_per_instance=2)
    with pytest.raises(ConfigError, match=r"need 6, but 4 are visible \(0,1,2,3\)"):
        plan_instances(config, machine(gpus=("0", "1", "2", "3")))
    config = EngineConfig(model="m", num_instances=2, gpus=[7])
    with pytest.raises(ConfigError, match=r"need 2, but 1 are given \(7\)"):
        plan_instances(config, machine(gpus=("0", "1")))
    config = EngineConfig(model="m", device="cuda")
    with pytest.raises(ConfigError, match=r"0 are visible \(none\)"):
        plan_instances(config, machine())


@pytest.mark.parametrize(
    ("container", "free_gib"),
    [
        ({}, 8),
        ({"memory.max": "max", "memory.current": str(GIB)}, 8),
        ({"memory.max": str(4 * GIB), "memory.current": str(GIB)}, 3),
        ({"memory.max": str(64 * GIB), "memory.current": str(GIB)}, 8),
        (
            {
                "memory.max": str(4 * GIB),
                "memory.current": str(3 * GIB),
                "memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            2,
        ),
    ],
)
def test_free_memory_is_the_containers_if_that_is_less(tmp_path, container, free_gib):
    (tmp_path / "meminfo").write_text(
        f"MemTotal: 1 kB\nMemAvailable: {8 * GIB >> 10} kB\n"
    )
    for name, text in container.items():
        (tmp_path / name).write_text(text + "\n")
    assert free_memory_bytes(tmp_path, tmp_path) == free_gib * GIB


def test_the_cpu_cache_is_a_share_of_free_memory_unless_it_is_given():
    args = [
        plan_instances(config, machine(memory=memory))[0].engine_args
        for config, memory in [
            (EngineConfig(model="m"), 20 * GIB),
            (EngineConfig(model="m"), 200 * GIB),
            (EngineConfig(model="m", kv_cache_bytes=5), 20 * GIB),
        ]
    ]
    sizes = [a["kv_cache_memory_bytes"] for a in args]
    assert sizes == [3 * GIB, 4 * GIB, 5]


def test_engine_args_and_env_have_the_last_word():
    config = EngineConfig(
        model="m",
        engine_args={"enforce_eager": False, "block_size": 64},
        env={"VLLM_CPU_OMP_THREADS_BIND": "7"},
    )
    launch = plan_instances(config, machine())[0]
    assert launch.engine_args["enforce_eager"] is False
    assert launch.engine_args["block_size"] == 64
    assert launch.env["VLLM_CPU_OMP_THREADS_BIND"] == "7"
    assert launch.cores == ()  # they may be others than this machine's plan


def test_another_kv_connector_is_passed_on_as_it_is():
    told = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    config = EngineConfig(model="m", kv_transfer_config=told)
    for launch in plan_instances(config, machine()):
        assert launch.engine_args["kv_transfer_config"] == told
    plain = plan_instances(EngineConfig(model="m"), machine())[0]
    assert "kv_transfer_config" not in plain.engine_args
    with pytest.raises(ConfigError, match="use instead: kv_transfer_config"):
        EngineConfig(model="m", engine_args={"kv_transfer_config": told})


@pytest.mark.parametrize("gpus", [(), ("0",)])
def test_a_users_worker_extension_is_joined_with_ours(gpus):
    args = {"worker_extension_cls": "package.module.Extension"}
    config = EngineConfig(model="m", engine_args=args)
    (launch, *_) = plan_instances(config, machine(gpus=gpus))
    joined = "aseer.instance.vllm.joined.package:module:Extension"
    assert launch.engine_args["worker_extension_cls"] == joined
    (launch, *_) = plan_instances(EngineConfig(model="m"), machine(gpus=gpus))
    ours = "aseer.instance.vllm.worker.WorkerExtension"
    assert launch.engine_args["worker_extension_cls"] == ours


@pytest.mark.parametrize("given", ["mp", None])
def test_the_executor_that_drafts_need_on_a_cpu_is_not_replaced(given):
    args = {"distributed_executor_backend": given}
    config = EngineConfig(model="m", speculation="dgds", engine_args=args)
    with pytest.raises(ConfigError, match=r"'dgds' come by an executor.*leave it out"):
        plan_instances(config, machine())
    (launch, *_) = plan_instances(config, machine(gpus=("0",)))
    assert launch.engine_args["distributed_executor_backend"] == given


LATENT = traits_of({"kv_lora_rank": 512, "qk_rope_head_dim": 64})


def compilation(traits: ModelTraits | None, given: Any = None) -> Any:
    settings = {} if given is None else {"compilation_config": given}
    config = EngineConfig(model="m", engine_args=settings)
    (first, *_) = plan_instances(config, machine(), traits)
    return first.engine_args.get("compilation_config")


def test_slices_are_rotated_without_vllms_kernel_on_a_cpu():
    assert compilation(LATENT) == {"custom_ops": ["-rotary_embedding"]}
    assert compilation(traits_of({"model_type": "llama"})) is None
    assert compilation(None) is None
    on_gpu = machine(gpus=("0",))
    (launch,) = plan_instances(EngineConfig(model="m"), on_gpu, LATENT)
    assert "compilation_config" not in launch.engine_args
    assert launch.traits is LATENT


def test_latent_attention_in_float32_has_the_kernels_that_take_it():
    def backend(dtype: str, traits: ModelTraits | None = LATENT, **args: Any) -> Any:
        config = EngineConfig(model="m", dtype=dtype, engine_args=args)
        (first, *_) = plan_instances(config, machine(), traits)
        return first.engine_args.get("attention_backend")

    assert backend("float32") == "CPU_MLA"
    assert backend("bfloat16") is None
    assert backend("float32", traits_of({"model_type": "llama"})) is None
    assert backend("float32", None) is None
    assert backend("float32", attention_backend="AMX_MLA") == "AMX_MLA"
    assert backend("float32", attention_config={"backend": "AMX_MLA"}) is None


def test_the_users_compilation_settings_stay():
    given = {"mode": 0, "custom_ops": ["none"]}
    assert compilation(LATENT, given) == {
        "mode": 0,
        "custom_ops": ["none", "-rotary_embedding"],
    }
    assert given == {"mode": 0, "custom_ops": ["none"]}, "not changed"
    chosen = {"custom_ops": ["+rotary_embedding"]}
    assert compilation(LATENT, chosen) == chosen
    with pytest.raises(ConfigError, match="must be a mapping"):
        compilation(LATENT, 3)


def spanning(**settings: Any) -> EngineConfig:
    listen = "tcp://127.0.0.1:5557"
    return EngineConfig(
        model="m", nodes_per_instance=2, listen=listen, min_nodes=2, **settings
    )


def test_a_node_has_a_part_of_an_engine_that_spans_nodes():
    config = spanning(gpus_per_instance=4, kv_cache_bytes=8 * GIB)
    gpus = tuple(map(str, range(8)))
    launches = plan_instances(config, machine(gpus=gpus), num_instances=0)
    assert devices(launches) == ["0,1,2,3", "4,5,6,7"]
    for launch in launches:
        assert launch.engine_args["tensor_parallel_size"] == 8
        assert launch.engine_args["kv_cache_memory_bytes"] == GIB
        assert launch.env["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == "60"
    (launch,) = plan_instances(config, machine(gpus=gpus), num_instances=1)
    assert devices([launch]) == ["0,1,2,3"]
    with pytest.raises(ConfigError, match="need 12, but 8 are visible"):
        plan_instances(config, machine(gpus=gpus), num_instances=3)
    (launch,) = plan_instances(spanning(), machine(), num_instances=1)
    assert bindings([launch]) == ["0,1"]
    assert launch.engine_args["tensor_parallel_size"] == 2


def test_a_step_within_a_host_has_no_limit_of_vllms():
    (launch, _) = plan_instances(EngineConfig(model="m"), machine())
    assert int(launch.env["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"]) >= 1_000_000


def test_parts_have_the_arguments_of_the_first_but_for_what_is_of_their_host():
    places = [Located("10.0.0.1", "eth0", 5000), Located("10.0.0.2", "", 6000)]
    numa = machine(gpus=("0", "1"))
    first, second = (
        plan_instances(
            spanning(dtype="bfloat16"), replace(numa, numa_nodes=nodes), num_instances=2
        )[1]
        for nodes in ((0, 1), (1, 0))
    )
    args = {**first.engine_args, "seed": 3}
    found = member_args(second, args, 1, places)
    assert found["numa_bind_nodes"] == [0]
    assert (found["dtype"], found["seed"]) == ("bfloat16", 3)
    parallel = ("nnodes", "node_rank", "master_addr", "master_port")
    assert [found[name] for name in parallel] == [2, 1, "10.0.0.1", 5000]
    assert member_args(first, args, 0, places)["numa_bind_nodes"] == [1]
    none = plan_instances(spanning(), numa, num_instances=1)[0]
    assert "numa_bind" not in member_args(none, args, 1, places)
    env = member_env(replace(second, env={"VLLM_HOST_IP": "the user's"}), places[1])
    assert env == {"VLLM_HOST_IP": "the user's"}
    assert member_env(first, places[0])["GLOO_SOCKET_IFNAME"] == "eth0"


def test_as_many_whole_teams_as_a_machine_has_room_for():
    config = EngineConfig(model="m", data_parallel_size=2, gpus_per_instance=2)
    gpus = tuple(map(str, range(7)))
    assert devices(plan_instances(config, machine(gpus=gpus))) == ["0,1", "2,3"]
    alone = plan_instances(config, machine(gpus=gpus), num_instances=0)
    assert len(alone) == 3, "a node's engines may be in a team with another's"
    with pytest.raises(ConfigError, match="data_parallel_size=2 instances run togeth"):
        plan_instances(config, machine(gpus=("0", "1")))


def test_on_a_cpu_experts_are_not_shared_out():
    config = EngineConfig(model="m", data_parallel_size=2)
    with pytest.raises(ConfigError, match="vLLM on CPUs has no way to share out"):
        plan_instances(config, machine())


def test_a_rank_is_told_where_the_first_one_is():
    config = EngineConfig(model="m", data_parallel_size=2)
    first, second = plan_instances(config, machine(gpus=("0", "1")))
    assert rank_args(second, 1, 2, Located("10.0.0.1", "eth0", 5000)) == {
        "data_parallel_size": 2,
        "data_parallel_size_local": 1,
        "data_parallel_rank": 1,
        "data_parallel_address": "10.0.0.1",
        "data_parallel_rpc_port": 5000,
    }
    simulated = replace(first, backend="sim")
    assert rank_args(simulated, 0, 2, Located("10.0.0.1", port=5000)) == {}
