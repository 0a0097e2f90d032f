"""What vLLM's configuration says of an engine's limits, as they are counted here."""

from __future__ import annotations

from typing import Any

from aseer.instance.vllm.speculation import ends_with_chunk
from aseer.types import KvGroup


def are_mixed(groups: list[KvGroup]) -> bool:
    """Whether there is more to say of the groups than one block size."""
    return len(groups) != 1 or groups[0] != KvGroup(groups[0].block_size)


def kv_world_size(config: Any) -> int:
    """Pieces of a token's KV, as LMCache's keys count them.

    Every rank of a tensor-parallel group has all of a latent (MLA), which is stored
    once; other KV is split by heads.
    """
    parallel = config.parallel_config
    if not config.model_config.use_mla:
        return int(parallel.world_size)
    num_stages = parallel.world_size // parallel.tensor_parallel_size
    return int(num_stages * getattr(parallel, "decode_context_parallel_size", 1))


def num_lookahead_tokens(config: Any) -> int:
    """KV slots one step may write past a request's last token.

    Our own drafts end where the chunk does.
    """
    speculative = config.speculative_config
    drafts = 0
    if speculative is not None and not ends_with_chunk(speculative):
        drafts = int(speculative.num_speculative_tokens)
    if not config.scheduler_config.async_scheduling:
        return drafts
    # While a step computes, the next one is planned as if all its drafts were accepted.
    return 2 * drafts + 1
