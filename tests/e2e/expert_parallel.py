"""Expert parallelism on a CPU, for `test_ranks.py` and `test_data_parallel.py`.

vLLM's kernel for CPUs takes a router's numbers of experts for places among the worker's
own, which are fewer. Here each worker computes its own, and weighs those of others with
nothing; the sum over workers is vLLM's.

For data-parallel ranks, whose numbers of tokens differ, vLLM on CPUs lacks the two
operations by which they hand tokens to all and take back sums. Here they are made of
operations that it has.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
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


def _all_gatherv(
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Rows of all ranks, one rank's behind another's; `sizes` has how many of each."""
    assert dim == 0
    if isinstance(input_, list):
        return [_all_gatherv(self, each, dim, sizes) for each in input_]  # type: ignore[misc]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    found = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(found, padded, group=self.cpu_group)
    return torch.cat([each[:size] for each, size in zip(found, sizes, strict=True)])


def _reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """This rank's rows of the sum over ranks."""
    assert dim == 0
    total = input_.clone()
    distributed.all_reduce(total, group=self.cpu_group)
    sizes = sizes or [len(total) // self.world_size] * self.world_size
    start = sum(sizes[: self.rank_in_group])
    return total[start : start + sizes[self.rank_in_group]].contiguous()


CpuCommunicator.all_gatherv = _all_gatherv
CpuCommunicator.reduce_scatterv = _reduce_scatterv


class Extension:
    """Of vLLM's workers, which import this module by it."""
