"""Engines on model runner V2, on this CPU; see the README beside this file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.tiny import tiny_config
from tests.e2e.v2.vllm_on_cpu import ASYNC

if TYPE_CHECKING:
    import aseer

HERE = Path(__file__).parent
TRITON = HERE.parents[2] / ".venv-v2"


def environment(*, schedules_ahead: bool = False) -> dict[str, str]:
    """What puts an engine on V2; skips the test if `.venv-v2` is not there."""
    if not (TRITON / "triton").is_dir():
        pytest.skip("run `python3 scripts/bootstrap.py --v2` first, or `make test-v2`")
    path = [str(TRITON), str(HERE), *(folder or os.getcwd() for folder in sys.path)]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_BACKEND": "cpu",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        ASYNC: "1" if schedules_ahead else "0",
    }


def v2_config(*, schedules_ahead: bool = False, **settings: Any) -> aseer.EngineConfig:
    """The settings of `tiny_config`, on V2, with as little to interpret as there is."""
    engine_args = {
        "async_scheduling": schedules_ahead,
        **settings.pop("engine_args", {}),
    }
    return tiny_config(
        **{
            "num_instances": 1,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "kv_cache_bytes": 64 << 20,
            "chunk_size": 32,
            "env": environment(schedules_ahead=schedules_ahead),
            "engine_args": engine_args,
            **settings,
        }
    )
