"""The tiny random model and settings that make runs of it comparable bit for bit."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import aseer
from aseer.models.tiny import make_tiny


def tiny_model() -> Path:
    """A directory with the model, made once for a test run."""
    directory = Path(tempfile.gettempdir()) / f"tiny-{os.getpid()}"
    if not directory.exists():
        make_tiny(directory)
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def tiny_config(**settings: Any) -> aseer.EngineConfig:
    """Float32 on the CPU: greedy runs are equal whatever the batch."""
    defaults: dict[str, Any] = {
        "model": tiny_model(),
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "kv_cache_bytes": 256 << 20,
        "start_timeout_s": 400.0,
        "kv_pool": "off",  # it has tests of its own
    }
    return aseer.EngineConfig(**defaults | settings)


def by_request(responses: list[aseer.Response]) -> dict[str, aseer.Response]:
    return {r.request_id: r for r in responses}
