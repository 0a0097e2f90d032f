"""Which steps are measured when an engine starts, for its step times to begin with.

A GPU replays CUDA graphs for steps of up to a number of tokens. Larger steps are
launched kernel by kernel, and take longer by a jump. So that drafts push no step over
it before that is known to pay, a step on either side is among those measured.
"""

from __future__ import annotations

from typing import Any

# Requests of a step, and tokens drafted for each; the first warms up.
_SIZES = (
    *((1, 8), (1, 0), (1, 3), (1, 8), (4, 0), (4, 8)),
    *((16, 0), (16, 3), (64, 0)),
)


def graph_tokens(config: Any) -> int | None:
    """The most tokens of a step that replays CUDA graphs; None = no step does.

    Args:
        config: vLLM's VllmConfig.
    """
    compilation = config.compilation_config
    if compilation.cudagraph_mode.name == "NONE":
        return None
    return compilation.max_cudagraph_capture_size or None


def profile_sizes(
    max_num_seqs: int,
    max_draft_tokens: int,
    graph_tokens: int | None,
    max_verified: int,
) -> list[tuple[int, int]]:
    """Rows, and drafted tokens of each, of the steps to measure.

    Args:
        max_num_seqs: rows that a step has at most.
        max_draft_tokens: that a row of a large step has at most.
        graph_tokens: as of the function of this name.
        max_verified: tokens that a step may verify at most.
    """
    sizes = list(_SIZES)
    if graph_tokens is not None:
        each = 1 + max_draft_tokens
        below = graph_tokens // each
        # Requests do not all begin in one step; with some more, enough run together.
        above = below + 1 + below // 8
        if above <= max_num_seqs and above * each <= max_verified:
            sizes += [(below, max_draft_tokens), (above, max_draft_tokens)]
    return [size for size in sizes if 0 < size[0] <= max_num_seqs]
