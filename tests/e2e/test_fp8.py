"""A trainer in bfloat16, and engines that compute in FP8.

An engine that quantises a bfloat16 checkpoint as it loads takes bfloat16 weights, and
computes then as one that was started from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.compat.versions import release_of
from aseer.models.tiny import make_tiny
from tests.e2e.tiny import by_request, tiny_config

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        release_of(vllm.__version__) < (0, 32),
        reason="of older builds for CPUs the kernel may be an empty stub (0.26's is)",
    ),
]

# A scale for each channel. "fp8", one for a tensor, takes a GPU, or a CPU with AMX.
QUANTIZATION = "fp8_per_channel"
GREEDY = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
GROUPS = [aseer.Group([5 + i, 6, 7], n=1, sampling=GREEDY) for i in range(4)]


def fp8_config(model: Path) -> aseer.EngineConfig:
    return tiny_config(
        model=model,
        num_instances=1,
        dtype="bfloat16",
        engine_args={"quantization": QUANTIZATION},
    )


def roll(engine: aseer.Engine) -> dict[str, aseer.Response]:
    found = by_request(list(engine.rollout_sync(GROUPS)))
    assert {r.finish_reason for r in found.values()} == {"length"}
    return found


def state_dict_of(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_bfloat16_weights_are_quantised_as_those_of_a_checkpoint(tmp_path):
    old = make_tiny(tmp_path / "old", dtype="bfloat16")
    new = make_tiny(tmp_path / "new", dtype="bfloat16", seed=1)
    weights = state_dict_of(new)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    with aseer.Engine(fp8_config(old)) as engine:
        before = roll(engine)
        engine.update_weights_sync(weights)
        found = roll(engine)
    with aseer.Engine(fp8_config(new)) as engine:
        expected = roll(engine)
    for request_id, response in found.items():
        assert response.token_ids == expected[request_id].token_ids
        assert response.token_ids != before[request_id].token_ids
        assert response.logprobs == pytest.approx(
            expected[request_id].logprobs, abs=1e-4
        )
