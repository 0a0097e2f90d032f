"""The tiny random model and settings that make runs of it comparable bit for bit."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import aseer
from aseer.compat.versions import installed_vllm
from aseer.models.tiny import make_tiny

_, _VLLM = installed_vllm() or ("", "")
_HAS_AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()
# On a CPU vLLM 0.27 rounds by what else is in the batch, as does 0.26 without AVX-512;
# 0.32 does not.
IS_BITWISE = not (
    _VLLM.startswith("0.27.") or (_VLLM.startswith("0.26.") and not _HAS_AVX512)
)
ROUNDING = 2e-5 if _VLLM.startswith("0.26.") else 1e-5  # where it does


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


def next_version(engine: aseer.Engine) -> None:
    """Pretend that the weights are others: KV so far is not found any more."""
    assert engine._host is not None
    engine._host.weights.version += 1


def undivided(
    engine: aseer.Engine, groups: list[aseer.Group]
) -> dict[str, aseer.Response]:
    """What the engine generates in one chunk a request, apart from all other KV."""
    next_version(engine)
    rollout = engine.rollout_sync(groups, chunk_size=0, policy="group-round-robin")
    responses = by_request(list(rollout))
    assert rollout.report.num_migrations == 0
    next_version(engine)
    return responses


def same(
    found: dict[str, aseer.Response],
    expected: dict[str, aseer.Response],
    *,
    rounding: float = 0.0,
) -> None:
    """Token for token, and bit for bit in the logprobs where `rounding` is 0.

    What is computed again in one step has other last bits than what grew token by
    token: then the logprobs are equal to rounding.
    """
    if not IS_BITWISE:
        rounding = max(rounding, ROUNDING)
    assert found.keys() == expected.keys()
    for request_id, response in found.items():
        assert response.finish_reason == "length", response.error
        reference = expected[request_id]
        assert response.token_ids == reference.token_ids, request_id
        if rounding:
            pairs = zip(response.logprobs, reference.logprobs, strict=True)
            worst = max((abs(one - other) for one, other in pairs), default=0.0)
            assert worst <= rounding, f"{request_id}: a logprob is off by {worst:.2g}"
        else:
            assert response.logprobs == reference.logprobs, "bit for bit"
