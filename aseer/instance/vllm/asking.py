"""What vLLM is asked for a chunk, and what its answers mean."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from aseer.instance.vllm.text import SETTINGS
from aseer.types import ChunkEnd

if TYPE_CHECKING:
    from aseer.instance.vllm.text import Text
    from aseer.types import Chunk, FinishReason

STREAM_INTERVAL = 16
HAS_REQUEST_INTERVAL = "stream_interval" in inspect.signature(SamplingParams).parameters


def engine_params(chunk: Chunk) -> SamplingParams:
    """vLLM's settings for one chunk; stop strings and text are `Text`'s."""
    settings = {k: v for k, v in chunk.sampling.items() if k not in SETTINGS}
    structured = settings.pop("structured_outputs")
    for name in ("stop_token_ids", "allowed_token_ids", "bad_words"):
        if settings[name] is not None:
            settings[name] = list(settings[name])
    if HAS_REQUEST_INTERVAL:
        settings["stream_interval"] = 1 if chunk.sampling["stop"] else STREAM_INTERVAL
    return SamplingParams(
        **settings
        | {
            "max_tokens": chunk.max_tokens,
            "min_tokens": chunk.min_tokens,
            "seed": chunk.seed,
            "structured_outputs": StructuredOutputsParams(**structured)
            if structured
            else None,
            "logprobs": 0,
            "flat_logprobs": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA,
        }
    )


def sampled_logprobs(logprobs: Any, tokens: list[int]) -> list[float]:
    """The sampled token's logprob of each position; it comes first in vLLM's rows."""
    if not tokens:
        return []
    return [logprobs.logprobs[start] for start in logprobs.start_indices]


def not_finite(tokens: list[int], logprobs: list[float], text: Text | None) -> ChunkEnd:
    """No trainer can use a token of such a logprob, nor what was sampled after it."""
    bad = next(i for i, x in enumerate(logprobs) if not math.isfinite(x))
    return ChunkEnd(
        reason="error",
        error=f"the engine says that it sampled token {tokens[bad]} with the logprob "
        f"{logprobs[bad]}: the model's logits are not finite, or the sampling "
        "parameters leave no token that may be sampled",
        held_text=text.take(finished=True) if text else "",
    )


def end_of(done: Any, text: Text | None) -> ChunkEnd:
    reason = done.finish_reason
    if reason == "stop":
        stop = done.stop_reason  # None for the model's own end token: say which it was
        return ChunkEnd(
            reason="stop", stop_reason=done.token_ids[-1] if stop is None else stop
        )
    held = text.take(finished=True) if text else ""
    if reason in ("length", "abort"):
        kind: FinishReason = "length" if reason == "length" else "aborted"
        return ChunkEnd(reason=kind, held_text=held)
    return ChunkEnd(
        reason="error", error=f"vLLM ended it with {reason!r}", held_text=held
    )
