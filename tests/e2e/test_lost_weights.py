"""Of all families: vLLM's reload takes all new weights, or the update of them fails."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import aseer
from tests.e2e.families import FAMILIES
from tests.e2e.tiny import by_request, same, tiny_config, tiny_model
from tests.e2e.vision import TORCHVISION

pytestmark = pytest.mark.slow  # vLLM looks at every family's code first
ROOT = Path(__file__).parents[2]
MODULE = "tests.e2e.reload_families"
VARIANTS = ["qwen3:tied", "qwen3:int8", "qwen3:lora", "qwen3_moe:tied"]
SEEING = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
LOSES = "gpt_oss"
GREEDY = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
GROUPS = [aseer.Group([5 + i, 6, 7], n=2, sampling=GREEDY) for i in range(2)]


@cache
def found() -> dict[str, tuple[str, list[str]]]:
    """Of each family, aseer's error, and the parameters that are not the new ones."""
    seeing = SEEING if TORCHVISION.is_dir() else []
    done = subprocess.run(
        [sys.executable, "-m", MODULE, *FAMILIES, *VARIANTS, *seeing],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (error, stale) for name, error, stale in map(json.loads, lines)}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS, *SEEING])
def test_new_weights_are_all_taken_or_the_load_fails(name: str) -> None:
    if name in SEEING and not TORCHVISION.is_dir():
        pytest.skip("run `python3 scripts/bootstrap.py --images` first")
    error, stale = found()[name]
    if name != LOSES:
        assert (error, stale) == ("", [])
        return
    assert error.startswith("vLLM's reload lost new weights"), error
    assert f"{sorted(stale)[0]}, " in error
    assert f" and {len(stale) - 3} others" in error
    assert all(".mlp.experts." in parameter for parameter in stale)


def test_an_update_that_vllm_loses_a_part_of_fails_and_the_engine_stays_as_it_was():
    config = tiny_config(
        num_instances=1,
        engine_args={"worker_extension_cls": "tests.e2e.losing.Extension"},
    )
    new = {name: tensor * 1.25 for name, tensor in _tensors().items()}
    with aseer.Engine(config) as engine:
        before = by_request(list(engine.rollout_sync(GROUPS)))
        with pytest.raises(
            aseer.WeightUpdateError,
            match=r"the model has none in model\.layers\.1\.mlp\.down_proj\.weight\.",
        ):
            engine.update_weights_sync(new)
        assert engine.weight_version == 0
        same(by_request(list(engine.rollout_sync(GROUPS))), before)


def _tensors() -> dict[str, object]:
    from safetensors.torch import load_file

    return dict(load_file(tiny_model() / "model.safetensors"))
