"""What a model's layers keep of a request, group by group, as vLLM has planned it.

vLLM puts layers that keep KV alike into groups. Each group has blocks of its own for
every request, all out of one pool of blocks. A sliding window holds the blocks of its
last tokens, a recurrent state two of any length.

A window also holds all tokens of the step that computes a prompt, until the next one.
A step computes no more than `max_num_batched_tokens` tokens, whoever's they are, so
these blocks are set aside once for all requests, not for each. So are the blocks for
states that vLLM keeps of a prompt it computes to the end, at its last block's end: it
does so in steps that compute more than a block of the prompt.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from aseer.types import KvGroup

if TYPE_CHECKING:
    from collections.abc import Sequence


def describe_groups(
    specs: Sequence[Any],
    *,
    batched_tokens: int,
    step_tokens: int,
    num_steps: int,
    max_num_seqs: int,
    hash_tokens: int | None = None,
) -> tuple[list[KvGroup], int]:
    """The groups, and how many blocks to set aside for steps that compute prompts.

    Args:
        specs: vLLM's `KVCacheSpec` of each group.
        batched_tokens: that a step computes at most, of all requests together.
        step_tokens: that a step computes at most of a request that generates: drafts
            and the token itself.
        num_steps: that are under way at once.
        max_num_seqs: requests that a step computes at most.
        hash_tokens: that a prompt is looked up by; None = what divides the blocks of
            all groups.
    """
    from vllm.v1 import kv_cache_interface as kv

    ring = getattr(kv, "CircularBufferSpec", ())  # later releases have it
    unit = hash_tokens or math.gcd(*(spec.block_size for spec in specs))
    # A request that has computed its prompt holds its blocks until its next step, which
    # may come after others of that step have taken theirs.
    num_prompts = min(max_num_seqs, (num_steps + 1) * batched_tokens // (unit + 1))
    groups = []
    num_set_aside = 0
    for group_spec in specs:
        spec = group_spec
        if isinstance(spec, kv.UniformTypeKVCacheSpecs):  # all of one type
            spec = next(iter(spec.kv_cache_specs.values()))
        size = group_spec.block_size
        window = _window(spec, kv)
        if isinstance(spec, kv.MambaSpec):
            groups.append(_state_group(spec, num_steps, unit))
            if groups[-1].max_blocks is not None and spec.block_size == unit:
                num_set_aside += _num_checkpoints(spec) * num_prompts
        elif isinstance(spec, ring):
            groups.append(KvGroup(size, 1))
        elif window is None:
            groups.append(KvGroup(size))
        else:
            # One block more, since a window may begin within one.
            held = window + step_tokens * num_steps
            groups.append(KvGroup(size, -(-held // size) + 1))
            num_set_aside += -(-batched_tokens * num_steps // size)
    return groups, num_set_aside


def _window(spec: Any, kv: Any) -> int | None:
    """Tokens before the one that is computed that must stay; None = all."""
    if isinstance(spec, kv.SlidingWindowSpec):
        return int(spec.sliding_window) - 1 + getattr(spec, "extra_retained_tokens", 0)
    if isinstance(spec, kv.ChunkedLocalAttentionSpec):
        return int(spec.attention_chunk_size)
    return None


def _state_group(spec: Any, num_steps: int, unit: int) -> KvGroup:
    """A state's blocks: one for each drafted token, besides those below."""
    extra = spec.num_speculative_blocks
    mode = spec.mamba_cache_mode
    if mode == "all":  # the state at every block's end stays
        return KvGroup(spec.block_size, None, extra)
    if mode == "align":  # the last one that is kept, and the one each step writes
        if unit < spec.block_size:  # a state within a block is kept and copied, too
            extra += 1 + _num_checkpoints(spec)
        return KvGroup(spec.block_size, 1 + num_steps, extra)
    return KvGroup(spec.block_size, 1, extra)


def _num_checkpoints(spec: Any) -> int:
    return int(getattr(spec, "num_prefill_checkpoint_blocks", 0))
