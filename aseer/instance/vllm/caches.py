"""What an engine computed with weights that it has no more, forgotten.

vLLM keeps two things that depend on the weights beyond a request's end: blocks of KV,
and the encoder's embeddings of images, by the image. Its cache of processed images is
no result of the weights and stays.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aseer.errors import EngineError

_INTERVAL_S = 0.1
# Ten seconds: what has ended holds its blocks until a KV pool has stored them.
_TRIES = 100


async def empty_caches(engine: Any) -> None:
    """Empty the caches of an engine (vLLM's AsyncLLM) that nothing runs on.

    Raises:
        EngineError: blocks of KV stay in use.
    """
    # vLLM has it from the release on that keeps such embeddings between requests.
    reset_encoder_cache = getattr(engine, "reset_encoder_cache", None)
    if reset_encoder_cache is not None:
        await reset_encoder_cache()
    for _ in range(_TRIES):
        if await engine.reset_prefix_cache():
            return
        await asyncio.sleep(_INTERVAL_S)
    raise EngineError("its prefix cache cannot be emptied: blocks are in use")
