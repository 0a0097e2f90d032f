"""An engine's arguments as vLLM gets them, the same in all processes of one engine."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from aseer.instance.vllm.asking import HAS_REQUEST_INTERVAL, STREAM_INTERVAL
from aseer.instance.vllm.transfer import with_our_receivers

# Without it vLLM takes limits for an unknown use, 128 requests and 2,048 tokens a step,
# which are a fraction of what a GPU computes in one.
USAGE = UsageContext.LLM_CLASS

# By default vLLM keeps what sliding windows and recurrent states need for a resume only
# at the end of a request's prompt, and a resumed chunk would compute the whole chunk
# before it again. None keeps it at every block's end, and changes no other model.
_HAS_RETENTION_INTERVAL = "prefix_cache_retention_interval" in {
    field.name for field in fields(AsyncEngineArgs)
}


def with_our_defaults(args: dict[str, Any]) -> dict[str, Any]:
    """What a spec has, with what every engine of ours has unless its user says else."""
    args = dict(with_our_receivers(args))
    if not HAS_REQUEST_INTERVAL:
        args.setdefault("stream_interval", STREAM_INTERVAL)
    if _HAS_RETENTION_INTERVAL:
        args.setdefault("prefix_cache_retention_interval", None)
    return args


def engine_args_of(args: dict[str, Any]) -> AsyncEngineArgs:
    """vLLM's own structure of them, with what aseer cannot do without."""
    return AsyncEngineArgs(
        **args,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        disable_log_stats=True,  # vLLM's own loggers; ours is added
    )
