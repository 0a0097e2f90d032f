"""How much memory a node has for a pool, and what of it weight updates will want."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.kv.settings import Memory
from aseer.node.machine import free_memory_bytes, free_shm_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.config import EngineConfig

# An update writes the new weights beside those that engines started later must load.
_COPIES_OF_WEIGHTS = 2
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


def node_memory(config: EngineConfig) -> Memory:
    """What this node has free for a pool."""
    return memory_for(config, free_memory_bytes(), free_shm_bytes())


def memory_for(config: EngineConfig, free_bytes: int, shm_free_bytes: int) -> Memory:
    """The same of any node, of which this much is known."""
    updates: int | None = 0  # they go elsewhere
    if config.weights_dir is None:
        model_bytes = checkpoint_bytes(str(config.model))
        updates = model_bytes and _COPIES_OF_WEIGHTS * model_bytes
    return Memory(
        free_bytes=free_bytes, shm_free_bytes=shm_free_bytes, update_bytes=updates
    )


def checkpoint_bytes(model: str, environ: Mapping[str, str] = os.environ) -> int | None:
    """The size of a model's weights on disk; None if they are not here (yet).

    Args:
        model: a directory, or a name whose files are looked for in Hugging Face's cache
            without asking anybody.
    """
    folders = [Path(model)]
    if not folders[0].is_dir():
        home = environ.get("HF_HOME", "~/.cache/huggingface")
        cache = Path(environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
        named = cache / f"models--{model.replace('/', '--')}" / "snapshots"
        folders = sorted(named.glob("*"))
    for pattern in _WEIGHT_FILES:  # the first kind that is there is the one loaded
        sizes = [
            sum(file.stat().st_size for file in folder.glob(pattern) if file.exists())
            for folder in folders
        ]
        if largest := max(sizes, default=0):
            return largest
    return None
