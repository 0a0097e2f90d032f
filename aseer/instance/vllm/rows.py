"""Rows of a batch, a request each, which some releases of vLLM mix up.

What is here mends it; `aseer/instance/vllm/patches.py` says where and when.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from aseer.compat.versions import release_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

# From it on a row's mask moves with its request, and is cleared where it was.
_KEEPS_MASKS = (0, 31)


def keep_masks_apart() -> bool:
    """Have requests sample from their own `allowed_token_ids`, not from a neighbour's.

    While requests come and go their rows change places. In older releases the mask of a
    row that has moved stays behind for whoever comes next, and of two that swap one is
    lost.
    """
    import vllm
    from vllm.v1.worker.gpu_input_batch import InputBatch

    if release_of(vllm.__version__) >= _KEEPS_MASKS:
        return False
    condense, swap_states = InputBatch.condense, InputBatch.swap_states

    @functools.wraps(condense)
    def condense_rows(batch: Any) -> None:
        end = batch.num_reqs + len(batch.batch_update_builder.removed)
        condense(batch)
        masks = batch.allowed_token_ids_mask_cpu_tensor
        if masks is not None:
            masks[batch.num_reqs : end] = False

    @functools.wraps(swap_states)
    def swap_rows(batch: Any, i1: int, i2: int) -> None:
        masks = batch.allowed_token_ids_mask_cpu_tensor
        swapped = None if masks is None else masks[[i2, i1]]  # a copy
        swap_states(batch, i1, i2)
        if masks is not None:
            masks[[i1, i2]] = swapped

    InputBatch.condense, InputBatch.swap_states = condense_rows, swap_rows
    return True


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """Repeat each request's value for each of its tokens; vLLM's function, mended.

    Args:
        x: [num_requests]. cu_num_tokens: [num_requests], running sums.
        num_tokens: their last.
        replace_from: this value becomes `replace_to`.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


def expands_rightly(function: Callable[..., torch.Tensor], device: Any) -> bool:
    """Whether the function is right, by values that no left-over memory can hold."""
    import torch

    counts = torch.tensor([2, 0, 3, 1], device=device)
    running = counts.cumsum(0).to(torch.int32)
    for _ in range(4):
        values = torch.rand(4, device=device) + 0.5
        for x in (values, (values * 1e6).to(torch.int32)):
            expected = x.repeat_interleave(counts)
            if not torch.equal(function(x, running, 6), expected):
                return False
    return True
