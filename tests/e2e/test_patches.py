"""The patches of vLLM's reload are still needed; the others are in integration/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.families import make_family

ROOT = Path(__file__).parents[2]
# What it shows changes with vLLM's release only.
pytestmark = pytest.mark.slow


def test_reloaded_weights_are_right_with_both_patches_and_with_no_fewer(tmp_path):
    """A mixture of experts whose output layer is its embedding, on a CPU."""
    models = [tmp_path / "old", tmp_path / "new"]
    for seed, model in enumerate(models):
        make_family(model, "qwen3_moe", seed, tie_word_embeddings=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.reload_faults", *map(str, models)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(is_changed for _, is_changed, _ in found), "by the other weights"
    right = [names for names, _, is_right in found if is_right]
    assert right == [["pack_tied_heads", "pack_experts"]]
