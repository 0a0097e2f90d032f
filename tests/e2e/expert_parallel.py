"""Expert parallelism on a CPU, for `test_ranks.py`.

vLLM's kernel for CPUs takes a router's numbers of experts for places among the worker's
own, which are fewer. Here each worker computes its own, and weighs those of others with
nothing; the sum over workers is vLLM's.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_apply = CPUUnquantizedExperts.apply


def _apply_own(*args: Any, **kwargs: Any) -> None:
    call = signature(_apply).bind(*args, **kwargs)
    given = call.arguments
    if given["expert_map"] is not None:
        places = given["expert_map"][given["topk_ids"].long()]  # -1 = another worker's
        is_own = places >= 0
        given["topk_ids"] = torch.where(is_own, places, 0).to(given["topk_ids"].dtype)
        given["topk_weights"] = given["topk_weights"] * is_own
    _apply(*call.args, **call.kwargs)


CPUUnquantizedExperts.apply = _apply_own


class Extension:
    """Of vLLM's workers, which import this module by it."""
