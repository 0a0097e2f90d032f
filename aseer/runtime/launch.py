"""How each instance is started: its share of the machine, its engine arguments, its
command.

Pure, given what the machine is (`Machine`). On a CPU every engine is bound to cores of
its own: left to itself vLLM pins every engine to the same first core. That goes for all
its processes: the one that schedules polls for the worker's results, and on another
engine's core it takes that engine's time. On GPUs every engine sees only its own
devices. An engine of several GPUs has a worker for each; on a CPU its cores are shared
out among as many workers.

Of an engine that spans nodes a machine has a part. What depends on the machine is each
part's own, and all else is as the first part, which leads, has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aseer.config import MAX_LORA_RANK
from aseer.errors import ConfigError
from aseer.instance.vllm import EXECUTOR, WORKER_EXTENSION
from aseer.instance.vllm.joined import joined_name
from aseer.kv.settings import QUIET_LMCACHE
from aseer.node.machine import GPU_VARIABLES, Launch, Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.config import EngineConfig
    from aseer.models.traits import ModelTraits
    from aseer.node.interpreter import Interpreter
    from aseer.node.messages import Located

_GIB = 1 << 30
_NO_LIMIT_S = "1000000"  # eleven days; in milliseconds it still has 31 bits
_MAX_CPU_KV_BYTES = 4 * _GIB
_CPU_KV_SHARE = 0.3  # of the memory that is free at the start, for all engines together
_CPU_BLOCK_SIZE = 32  # vLLM's CPU kernels want multiples of 32; resumes want it small
_MAX_CPU_INSTANCES = 2
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, MAX_LORA_RANK)  # those vLLM has
_EXTENSION_ARG = "worker_extension_cls"
_EXECUTOR_ARG = "distributed_executor_backend"
_EXPERTS_ARG = "enable_expert_parallel"
# How long an engine that spans nodes waits for a step of its workers on other nodes,
# which a network that was cut may never tell of. Far above any step's time, and below
# `stall_timeout_s`, whose end is not told apart from other ones.
_STEP_TIMEOUT_S = "60"
# What depends on the machine that a part of an engine runs on.
_OWN_ARGS = ("kv_cache_memory_bytes", "numa_bind", "numa_bind_nodes")
_ROTARY_OP = "rotary_embedding"
_DRAFTER = "aseer.dgds.proposer.GroupDrafter"


def plan_instances(
    config: EngineConfig,
    machine: Machine,
    traits: ModelTraits | None = None,
    interpreter: Interpreter | None = None,
    num_instances: int | None = None,
) -> list[Launch]:
    """Share the machine out among the instances.

    Args:
        traits: of the model; None = not known.
        interpreter: that their processes run on; None = the one of this process.
        num_instances: how many; 0 = as many as it has room for, None = as the settings
            say.
    Raises:
        ConfigError: it has not what the settings ask for.
    """
    if config.speculation.method == "suffix":
        _check_arctic(interpreter)
    num = (config.num_instances if num_instances is None else num_instances) or 0
    launches = _plan(config, machine, traits, num)
    if num_instances is None and config.num_instances is None:
        size = config.data_parallel_size
        if len(launches) < size:
            raise ConfigError(
                f"data_parallel_size={size} instances run together, and this machine "
                f"has room for {len(launches)}; lower it or gpus_per_instance, or set "
                "num_instances=0, listen and min_nodes, so that nodes have them"
            )
        # Room is shared out among those that there are.
        num = len(launches) // size * size
        if num < len(launches):
            launches = _plan(config, machine, traits, num)
    return [replace(launch, interpreter=interpreter) for launch in launches]


def member_args(
    launch: Launch, args: Mapping[str, Any], rank: int, places: Sequence[Located]
) -> dict[str, Any]:
    """Engine arguments of a part of an engine that spans nodes.

    Args:
        launch: of the part. args: of the engine. places: where its parts are.
    """
    if launch.backend != "vllm":
        return dict(args)
    shared = {name: value for name, value in args.items() if name not in _OWN_ARGS}
    own = {k: launch.engine_args[k] for k in _OWN_ARGS if k in launch.engine_args}
    return {
        **shared,
        **own,
        "nnodes": len(places),
        "node_rank": rank,
        "master_addr": places[0].address,
        "master_port": places[0].port,
        _EXECUTOR_ARG: "mp",
    }


def rank_args(launch: Launch, rank: int, num: int, place: Located) -> dict[str, Any]:
    """What an engine is told of the data-parallel ranks of which it is one.

    Args:
        place: where the first of them is.
    """
    if launch.backend != "vllm":
        return {}
    return {
        "data_parallel_size": num,
        "data_parallel_size_local": 1,  # in its process, whatever its host has
        "data_parallel_rank": rank,
        "data_parallel_address": place.address,
        "data_parallel_rpc_port": place.port,
    }


def member_env(launch: Launch, place: Located) -> dict[str, str]:
    """The environment of a part of an engine that spans nodes: by which way the parts
    reach each other, unless the user says another.
    """
    if launch.backend != "vllm":
        return dict(launch.env)
    found = {"VLLM_HOST_IP": place.address, "GLOO_SOCKET_IFNAME": place.interface}
    return {k: v for k, v in found.items() if v} | dict(launch.env)


def _check_arctic(interpreter: Interpreter | None) -> None:
    if interpreter is None or interpreter.is_ours:
        is_there = importlib.util.find_spec("arctic_inference") is not None
    else:
        is_there = "arctic-inference" in interpreter.packages
    if not is_there:
        raise ConfigError(
            "speculation='suffix' is vLLM's own and needs another package: run "
            "`pip install --no-deps arctic-inference`, or use 'dgds'"
        )


def _plan(
    config: EngineConfig, machine: Machine, traits: ModelTraits | None, num: int
) -> list[Launch]:
    if config.gpus is not None:
        machine = replace(machine, gpus=config.gpus)
    device = _device(config, machine)
    if device == "sim":
        args = dict(config.engine_args)
        for name in ("max_model_len", "max_num_seqs", "max_lora_rank"):
            if getattr(config, name) is not None:
                args[name] = getattr(config, name)
        return [
            Launch(
                instance_id=i,
                backend="sim",
                engine_args=args,
                env={},
                share="simulated",
            )
            for i in range(num or 2)
        ]
    if device == "cuda":
        launches = _plan_gpus(config, machine, num)
    else:
        launches = _plan_cores(config, machine, traits, num)
    return [replace(launch, traits=traits) for launch in launches]


def _device(config: EngineConfig, machine: Machine) -> str:
    if config.device != "auto":
        return config.device
    if config.gpus is not None and machine.cpu_only:
        raise ConfigError(
            f"gpus={config.gpus!r}, but the vLLM that is installed is built for CPUs; "
            "install one for GPUs, or leave gpus out"
        )
    return "cuda" if machine.gpus and not machine.cpu_only else "cpu"


def _plan_gpus(config: EngineConfig, machine: Machine, num: int) -> list[Launch]:
    per = config.gpus_per_instance
    num = num or len(machine.gpus) // per
    if num * per > len(machine.gpus) or not num:
        raise ConfigError(
            f"{max(num, 1)} instances of {per} GPUs need {max(num, 1) * per}, but "
            f"{len(machine.gpus)} are {'visible' if config.gpus is None else 'given'} "
            f"({','.join(machine.gpus) or 'none'}); lower num_instances or "
            "gpus_per_instance, or check gpus and CUDA_VISIBLE_DEVICES"
        )
    num_ranks = per * config.nodes_per_instance
    args = _engine_args(config) | {"tensor_parallel_size": num_ranks}
    if config.kv_cache_bytes is not None:  # vLLM is told what is on each GPU
        args["kv_cache_memory_bytes"] = max(1, config.kv_cache_bytes // num_ranks)
    args |= _users_args(config)
    launches = []
    for i in range(num):
        devices = ",".join(machine.gpus[i * per : (i + 1) * per])
        env = dict.fromkeys(GPU_VARIABLES, devices)
        bound = _numa_args(config, machine, machine.gpus[i * per : (i + 1) * per])
        launches.append(_launch(config, i, args | bound, env, f"GPU {devices}"))
    return launches


def _numa_args(
    config: EngineConfig, machine: Machine, gpus: tuple[str, ...]
) -> dict[str, Any]:
    """What has vLLM keep an engine's processes, and their memory, near its GPUs."""
    known = {str(gpu): node for gpu, node in enumerate(machine.numa_nodes)}
    users = any(name.startswith("numa_bind") for name in config.engine_args)
    if users or not known.keys() >= set(gpus):
        return {}
    return {"numa_bind": True, "numa_bind_nodes": [known[gpu] for gpu in gpus]}


def _plan_cores(
    config: EngineConfig, machine: Machine, traits: ModelTraits | None, num: int
) -> list[Launch]:
    cores, per = machine.cores, config.gpus_per_instance
    num = num or max(1, min(len(cores) // per, _MAX_CPU_INSTANCES))
    free = int(machine.free_memory_bytes * _CPU_KV_SHARE) // num
    num_nodes = config.nodes_per_instance
    kv_bytes = config.kv_cache_bytes or min(_MAX_CPU_KV_BYTES, free * num_nodes)
    defaults: dict[str, Any] = {
        "tensor_parallel_size": per * num_nodes,
        "enforce_eager": True,  # compiling takes long, at every first start
        "block_size": _CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": max(1, kv_bytes // (per * num_nodes)),
    }
    if config.speculation.method == "dgds":
        if _EXECUTOR_ARG in config.engine_args:
            raise ConfigError(
                f"engine_args has {_EXECUTOR_ARG!r}, and drafts of speculation='dgds' "
                "come by an executor of aseer's on a CPU; leave it out"
            )
        defaults[_EXECUTOR_ARG] = EXECUTOR
    if config.dtype == "auto" and machine.cpu_dtype == "float32":
        # vLLM's "auto" makes bfloat16 of float32, too, slow where a CPU emulates it.
        defaults["dtype"] = "float32"
    args = _engine_args(config) | defaults
    args |= _users_args(config)
    check_experts(config)
    if traits is not None and traits.rotates_slices:
        args["compilation_config"] = _without_rotary_kernel(
            args.get("compilation_config")
        )
    is_float32 = args["dtype"] in ("float32", "float")
    is_chosen = "attention_config" in args
    if traits is not None and traits.has_latent and is_float32 and not is_chosen:
        # With AMX vLLM takes kernels that fail at once for anything but bfloat16.
        args.setdefault("attention_backend", "CPU_MLA")
    launches = []
    for i in range(num):
        own = _shared_out(cores, num)[i]
        bind = "|".join(",".join(map(str, c)) for c in _shared_out(own, per))
        env = {"VLLM_CPU_OMP_THREADS_BIND": bind}
        launch = _launch(config, i, args, env, f"core {','.join(map(str, own))}")
        if launch.env["VLLM_CPU_OMP_THREADS_BIND"] == bind:  # the user named no others
            launch = replace(launch, cores=own)
        launches.append(launch)
    return launches


def check_experts(config: EngineConfig) -> None:
    """Refuse on a CPU to spread experts over workers.

    vLLM's kernel for CPUs looks for experts of the others among a worker's own: it
    reads past their end, and computes nonsense or crashes.
    """
    num_ranks = config.gpus_per_instance * config.nodes_per_instance
    if num_ranks > 1 and config.engine_args.get(_EXPERTS_ARG):
        raise ConfigError(
            f"engine_args has {_EXPERTS_ARG!r}, and vLLM's kernel for CPUs reads past "
            "the end of a worker's experts with it; leave it out: every worker then "
            "has a part of each expert"
        )
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size={config.data_parallel_size}, and vLLM on CPUs has no "
            "way to share out experts among engines; leave it out, as is right for "
            "models without experts anywhere"
        )


def _shared_out(cores: tuple[int, ...], num: int) -> list[tuple[int, ...]]:
    """As many parts of the cores; one core each in turn if there are too few."""
    size = len(cores)
    if num > size:
        return [(cores[i % size],) for i in range(num)]
    return [cores[i * size // num : (i + 1) * size // num] for i in range(num)]


def _without_rotary_kernel(compilation: Any) -> Any:
    """vLLM's compilation settings, but with rotations computed by torch.

    vLLM's kernel for CPUs takes the rows it rotates to lie one behind another. A slice
    of wider rows does not, and comes out wrong: no error, other tokens.

    Args:
        compilation: the user's settings, None or a mapping; a choice of theirs stays.
    """
    settings = {} if compilation is None else compilation
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"engine_args: compilation_config={compilation!r} must be a mapping, such "
            "as {'mode': 0}, for this model on a CPU"
        )
    ops = list(settings.get("custom_ops", ()))
    if not any(str(op).endswith(_ROTARY_OP) for op in ops):
        ops.append(f"-{_ROTARY_OP}")
    return {**settings, "custom_ops": ops}


def _engine_args(config: EngineConfig) -> dict[str, Any]:
    wanted = {
        "model": config.model,
        "tokenizer": config.tokenizer,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "kv_transfer_config": config.kv_transfer_config,
    }
    args = {k: v for k, v in wanted.items() if v is not None}
    if config.max_lora_rank is not None:
        # An update's adapters are loaded while the last one's still serve.
        rank = next(r for r in _LORA_RANKS if r >= config.max_lora_rank)
        args |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 2}
    theirs = config.engine_args.get(_EXTENSION_ARG)
    args[_EXTENSION_ARG] = joined_name(theirs) if theirs else WORKER_EXTENSION
    return args | _speculation_args(config)


def _users_args(config: EngineConfig) -> dict[str, Any]:
    """What `engine_args` has that is not joined with ours."""
    return {k: v for k, v in config.engine_args.items() if k != _EXTENSION_ARG}


def _speculation_args(config: EngineConfig) -> dict[str, Any]:
    settings = config.speculation
    num_tokens = settings.max_draft_tokens
    if settings.method == "off":
        return {}
    method: dict[str, Any] = {"method": settings.method}
    if settings.method == "dgds":
        num_tokens = max(num_tokens, settings.tail_draft_tokens)
        method = {"method": "custom_class", "model": _DRAFTER}
    return {"speculative_config": {**method, "num_speculative_tokens": num_tokens}}


def _launch(
    config: EngineConfig,
    instance_id: int,
    args: Mapping[str, Any],
    env: dict[str, str],
    share: str,
) -> Launch:
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # By default vLLM forks its workers from a process that runs an event loop and
        # threads, and a fork copies locks that another thread holds.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # How long a start and a step may take is said by `start_timeout_s` and
        # `stall_timeout_s`. vLLM's own limits are fixed ones, and count the time in
        # which the engine was stopped.
        "VLLM_ENGINE_READY_TIMEOUT_S": _NO_LIMIT_S,
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": _NO_LIMIT_S,
        **QUIET_LMCACHE,
    }
    if config.nodes_per_instance > 1:
        ours["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = _STEP_TIMEOUT_S
    return Launch(
        instance_id=instance_id,
        backend="vllm",
        engine_args=args,
        env={**ours, **env, **config.env},
        share=share,
    )
