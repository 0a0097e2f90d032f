"""What verl's settings mean to aseer, and which of them it refuses. Pure; no verl here.

Settings that would be ignored are refused in words: a run that silently does something
else than its configuration says is worse than one that does not start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.errors import ConfigError
from aseer.inputs.fields import refusal
from aseer.inputs.plain import as_int
from aseer.integrations.settings import (
    ActorSettings,
    HostShare,
    mapping,
    own_settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KWARGS = "actor_rollout_ref.rollout.engine_kwargs"
_OWN = f"{_KWARGS}.aseer"


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ActorSettings):
    """What the process that has the engine is told. All of it is plain data.

    Attributes:
        group_size: the most requests that verl makes of one prompt.
        prompt_length, response_length: verl's limits, in tokens.
        sampling: what requests have that do not say otherwise.
    """

    group_size: int
    prompt_length: int
    response_length: int
    sampling: Mapping[str, Any]


def server_settings(
    rollout: Any, model: Any, places: Sequence[tuple[str, str]], *, on_gpus: bool
) -> ServerSettings:
    """Settings of the one server that all of a trainer's processes share.

    Args:
        rollout: verl's `actor_rollout_ref.rollout`.
        model: verl's `actor_rollout_ref.model`.
        places: Ray's id of the host, and the id of the GPU there, of each of the
            trainer's processes, by rank. The engine is on the first one's host.
        on_gpus: whether they are GPUs indeed.
    Raises:
        ConfigError: something is set that aseer does not do.
    """
    check_supported(rollout, model)
    tensor_parallel = int(rollout.tensor_model_parallel_size)
    gpus: dict[str, list[str]] = {}
    for node_id, gpu in places:
        gpus.setdefault(node_id, []).append(gpu)
    for there in gpus.values():
        if len(there) % tensor_parallel:
            raise ConfigError(
                f"the trainer has {len(there)} processes on a host, which rollout."
                f"tensor_model_parallel_size={tensor_parallel} does not divide"
            )
    kwargs = mapping(rollout.engine_kwargs, _KWARGS)
    own = own_settings(kwargs.get("aseer"), _OWN)
    device = own.engine.get("device", "cuda" if on_gpus else "cpu")
    sleeps = bool(rollout.free_cache_engine) and device in ("auto", "cuda")
    engine: dict[str, Any] = {
        "model": model.path,
        "dtype": rollout.dtype,
        "device": device,
        "num_instances": len(gpus[places[0][0]]) // tensor_parallel,
        "max_model_len": rollout.max_model_len
        or rollout.prompt_length + rollout.response_length,
        "max_num_seqs": rollout.max_num_seqs,
    }
    if device in ("auto", "cuda"):
        engine["gpus_per_instance"] = tensor_parallel
    hosts: tuple[HostShare, ...] = ()
    if len(gpus) > 1:
        num = own.engine.get("num_instances")
        hosts = tuple(
            HostShare(node_id, tuple(there), num or len(there) // tensor_parallel)
            for node_id, there in gpus.items()
        )
        engine |= {"nodes": "ray", "min_nodes": len(hosts)}
    elif device in ("auto", "cuda"):
        engine["gpus"] = gpus[places[0][0]]
    engine |= own.engine
    engine["engine_args"] = (
        _engine_args(rollout, model, device=device, sleeps=sleeps)
        | mapping(kwargs.get("vllm"), f"{_KWARGS}.vllm")
        | dict(own.engine_args)
    )
    return ServerSettings(
        engine=engine,
        group_size=max(int(rollout.n), int(rollout.val_kwargs.n)),
        prompt_length=int(rollout.prompt_length),
        response_length=int(rollout.response_length),
        sampling=_sampling(rollout),
        sleeps=sleeps,
        hosts=hosts,
        **own.times,
    )


def _engine_args(
    rollout: Any, model: Any, *, device: str, sleeps: bool
) -> dict[str, Any]:
    if device == "sim":
        return {}
    args: dict[str, Any] = {
        "enforce_eager": bool(rollout.enforce_eager),
        "max_num_batched_tokens": int(rollout.max_num_batched_tokens),
    }
    if model.trust_remote_code:
        args["trust_remote_code"] = True
    if device in ("auto", "cuda"):
        args["gpu_memory_utilization"] = float(rollout.gpu_memory_utilization)
        if rollout.cudagraph_capture_sizes:
            args["cudagraph_capture_sizes"] = list(rollout.cudagraph_capture_sizes)
    if sleeps:
        args["enable_sleep_mode"] = True
    return args


def _sampling(rollout: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "repetition_penalty": float(rollout.repetition_penalty),
        "ignore_eos": bool(rollout.ignore_eos),
    }
    if rollout.full_determinism:
        given["seed"] = int(rollout.seed)
    return given


def sampling_of(
    settings: ServerSettings, given: Mapping[str, Any], num_prompt_tokens: int
) -> dict[str, Any]:
    """A request's sampling, as verl's own servers understand what they are given.

    Raises:
        ConfigError: logprobs of more than the sampled tokens are wanted, or a limit is
            no whole number.
    """
    sampling = {**settings.sampling, **given}
    for name in ("logprobs", "prompt_logprobs"):
        wanted = sampling.pop(name, None)
        if not (wanted is None or isinstance(wanted, bool)) and wanted != 0:
            raise ConfigError(
                f"sampling_params[{name!r}]={wanted!r} is not allowed: responses carry "
                "the logprobs of the sampled tokens, and no others"
            )
    limits = [_limit(sampling, name) for name in ("max_tokens", "max_new_tokens")]
    longest = settings.prompt_length + settings.response_length - num_prompt_tokens
    limit = next((each for each in limits if each is not None), None)
    if limit is None:
        limit = min(settings.response_length, longest)
    room = int(settings.engine["max_model_len"]) - num_prompt_tokens
    sampling["max_tokens"] = max(1, min(limit, room))
    return sampling


def _limit(sampling: dict[str, Any], name: str) -> int | None:
    given = sampling.pop(name, None)
    limit = as_int(given)
    if given is not None and limit is None:
        raise refusal(f"sampling_params[{name!r}]", given, "an int")
    return limit


def check_supported(rollout: Any, model: Any) -> None:
    """Refuse, in words, what aseer does not do.

    Raises:
        ConfigError: something is set that would not be done.
    """
    path = str(model.path)
    lora = model.lora or {}
    rank = int(model.lora_rank or 0) or int(lora.get("rank", 0) or 0)
    backend = rollout.checkpoint_engine.backend
    refusals = {
        f"model.path={path}: give a directory, or the name of a model": "://" in path,
        "a LoRA adapter of its own (model.lora_rank): set model.lora.merge=True, which "
        "sends merged weights": bool(rank) and not lora.get("merge", False),
        "rollout.pipeline_model_parallel_size above 1": (
            rollout.pipeline_model_parallel_size > 1
        ),
        "rollout.expert_parallel_size above 1: set "
        f"+{_OWN}.engine_args.enable_expert_parallel=True": (
            (rollout.expert_parallel_size or 1) > 1
        ),
        f"rollout.quantization: set it in +{_OWN}.engine_args.quantization": bool(
            rollout.quantization
        ),
        "rollout.qat": bool((rollout.qat or {}).get("enable", False)),
        "rollout.enable_rollout_routing_replay": bool(
            rollout.enable_rollout_routing_replay
        ),
        f"rollout.mtp.enable_rollout: drafts come from +{_OWN}.speculation": bool(
            rollout.mtp.enable and rollout.mtp.enable_rollout
        ),
        "rollout.disaggregation": bool(rollout.disaggregation.enabled),
        "rollout.prometheus: aseer logs a report of each rollout": bool(
            rollout.prometheus.enable
        ),
        f"rollout.logprobs_mode={rollout.logprobs_mode}: logprobs are of the "
        "distribution that is sampled from (processed_logprobs)": (
            rollout.logprobs_mode not in (None, "processed_logprobs")
        ),
        f"rollout.scheduling_policy={rollout.scheduling_policy}: the order is aseer's "
        f"own; see +{_OWN}.policy": rollout.scheduling_policy not in (None, "fcfs"),
        f"rollout.checkpoint_engine.backend={backend}: trainers whose rollouts have "
        "GPUs of their own (separate_async) are not supported; use naive": (
            backend != "naive"
        ),
    }
    found = [words for words, is_set in refusals.items() if is_set]
    if found:
        raise ConfigError("rollout.name=aseer does not support " + "; nor ".join(found))
