"""What `EngineConfig.engine_args` may have: vLLM's arguments that aseer can live with.

Some are aseer's own to set. Others would change what aseer counts (GPUs, KV blocks,
requests) or needs (its drafter, text, logprobs that a resumed chunk repeats), and an
engine started with them would go wrong later and without a word: these are refused by
name. Everything else goes to vLLM as it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

# What aseer sets itself, and the setting to use instead.
_OWN: Mapping[str, str] = {
    "model": "model",
    "tokenizer": "tokenizer",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_num_active_seqs": "max_num_seqs",
    "tensor_parallel_size": "gpus_per_instance",
    "device_ids": "gpus",
    "enable_prefix_caching": "nothing: resumed chunks need it",
    "logprobs_mode": "nothing: responses carry processed logprobs",
    "disable_log_stats": "nothing: reports need the statistics",
    "stream_interval": "nothing: every request has its own",
    "seed": "seed",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "kv_transfer_config": "kv_transfer_config",
    "enable_lora": "max_lora_rank",
    "max_lora_rank": "max_lora_rank",
    "max_loras": "max_lora_rank: engines have the adapters of one policy",
    "max_cpu_loras": "max_lora_rank: engines have the adapters of one policy",
    "kv_offloading_size": "kv_pool or kv_transfer_config",
}

_OTHER_LAYOUT = (
    "an engine's GPUs are counted as gpus_per_instance, all of them tensor parallel: "
    "leave it out, and set gpus_per_instance to all the GPUs that an engine shall have"
)
_OTHER_REPLICAS = (
    "its ranks are schedulers with a KV cache each, of which aseer would see one, so "
    "that resumed requests miss their KV: leave it out, and set num_instances, each of "
    "which is an engine of its own, and EngineConfig(data_parallel_size=...) for those "
    "that share out the experts of one model"
)
_OTHER_NODES = (
    "the nodes that an engine spans are counted as nodes_per_instance, and found by "
    "aseer: leave it out"
)
_OTHER_PROCESSES = (
    "aseer ends the processes that an engine starts on this machine, and no others: "
    'leave it out, or give "mp" or "uni"'
)
_OTHER_QUEUE = (
    "aseer decides how many requests an engine has, and reserves KV for them: leave it "
    "out"
)
_HISTORY = (
    "a resumed chunk would begin its history anew, and the rest of a response be "
    "sampled otherwise: leave it out"
)
_EMBEDDINGS = (
    "it keeps embeddings of images outside the engine, where those of old weights "
    "would be found after an update: leave it out"
)
_NO_TOKENS = "engines generate text from left to right: leave it out"
_NO_TEXT = (
    "aseer looks for stop strings in text: leave it out, and set "
    "SamplingParams(detokenize=False) where no text is wanted"
)

# Of what aseer does not support: the values that change nothing, and the way out.
_REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "pipeline_parallel_size": ((1,), _OTHER_LAYOUT),
    "prefill_context_parallel_size": ((1,), _OTHER_LAYOUT),
    "decode_context_parallel_size": ((1,), _OTHER_LAYOUT),
    "data_parallel_size": ((1,), _OTHER_REPLICAS),
    "data_parallel_size_local": ((None, 1), _OTHER_REPLICAS),
    "data_parallel_rank": ((None,), _OTHER_REPLICAS),
    "data_parallel_start_rank": ((None,), _OTHER_REPLICAS),
    "data_parallel_address": ((None,), _OTHER_REPLICAS),
    "data_parallel_rpc_port": ((None,), _OTHER_REPLICAS),
    "data_parallel_hybrid_lb": ((False,), _OTHER_REPLICAS),
    "data_parallel_external_lb": ((False,), _OTHER_REPLICAS),
    "data_parallel_multi_port_external_lb": ((False,), _OTHER_REPLICAS),
    "enable_elastic_ep": ((False,), _OTHER_REPLICAS),
    "nnodes": ((1,), _OTHER_NODES),
    "node_rank": ((0,), _OTHER_NODES),
    "master_addr": (("127.0.0.1",), _OTHER_NODES),
    "master_port": ((29501,), _OTHER_NODES),
    "distributed_executor_backend": ((None, "mp", "uni"), _OTHER_PROCESSES),
    "scheduler_cls": ((None,), _OTHER_QUEUE),
    "max_num_queued_reqs": ((None,), _OTHER_QUEUE),
    "max_num_queued_tokens": ((None,), _OTHER_QUEUE),
    "watermark": ((0,), _OTHER_QUEUE),
    "logits_processors": ((None,), _HISTORY),
    "watermark_config": ((None,), _HISTORY),
    "ec_transfer_config": ((None,), _EMBEDDINGS),
    "diffusion_config": ((None,), _NO_TOKENS),
    "runner": (("auto", "generate"), _NO_TOKENS),
    "convert": (("auto", "none"), _NO_TOKENS),
    "skip_tokenizer_init": ((False,), _NO_TEXT),
    "tokens_only": ((False,), _NO_TEXT),
}
# vLLM takes them where its arguments say nothing.
_REFUSED_VARIABLES = ("VLLM_DP_SIZE", "VLLM_DP_RANK", "VLLM_DP_RANK_LOCAL")
# A drafter of the user's, which goes with no other.
_DRAFTER = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
_CLASS_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def has_drafter(args: Mapping[str, Any]) -> bool:
    """Whether vLLM is told to speculate by a drafter of the user's."""
    return any(args.get(name) is not None for name in _DRAFTER)


def check_engine_args(args: Mapping[str, Any], method: str) -> None:
    """Refuse what aseer sets itself or cannot live with.

    Args:
        args: as they are given.
        method: of the engine's speculation.
    Raises:
        ConfigError: there is one; it is named, with what to do instead.
    """
    for name, value in sorted(args.items()):
        if name in _OWN:
            raise ConfigError(f"engine_args has {name!r}; use instead: {_OWN[name]}")
        harmless, advice = _REFUSED.get(name, ((value,), ""))
        if value not in harmless:
            raise ConfigError(
                f"engine_args has {name}={value!r:.100}, which aseer does not support: "
                f"{advice}"
            )
    if method != "off" and has_drafter(args):
        raise ConfigError(
            f"engine_args has a drafter of its own, and speculation={method!r} sets "
            f"another; leave {', '.join(_DRAFTER)} out, or set speculation='off'"
        )
    extension = args.get("worker_extension_cls")
    if extension and not (
        isinstance(extension, str) and _CLASS_NAME.fullmatch(extension)
    ):
        raise ConfigError(
            f"engine_args has worker_extension_cls={extension!r:.100}; give the name "
            'of a class with its module, such as "package.module.Extension"'
        )


def check_variables(env: Mapping[str, str]) -> None:
    """Refuse environment variables that stand for arguments that are refused.

    Raises:
        ConfigError: there is one; it is named, with what to do instead.
    """
    for name in sorted(env.keys() & set(_REFUSED_VARIABLES)):
        raise ConfigError(
            f"env has {name}={env[name]!r:.100}, which aseer does not support: "
            f"{_OTHER_REPLICAS}"
        )
