"""The recipe of docs/megatron.md: Megatron-Core trains on what aseer samples.

`make test-trainers` makes the environment, with Megatron-Core and Megatron-Bridge; its
interpreter is named by ASEER_MEGATRON_PYTHON. Two processes, tensor parallel, on CPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.e2e.trainers import DEADLINE_S, keep, left_behind, make_model, run

PLUGIN = Path(__file__).parent / "megatron_plugin"
PYTHON = os.environ.get("ASEER_MEGATRON_PYTHON", "")
STEPS = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(DEADLINE_S + 60),
    pytest.mark.skipif(not PYTHON, reason="ASEER_MEGATRON_PYTHON is not set"),
]


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="mcore-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_megatron_trains_on_what_its_own_weights_generate(folder):
    model = make_model(folder / "model", tied=False)
    results = folder / "results.json"
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(PLUGIN / "train.py")]
    run([*command, str(model), sys.executable, str(results)], folder)
    seen = json.loads(results.read_text())
    assert [each["weight version"] for each in seen] == list(range(STEPS + 1))
    for each in seen:
        assert each["largest difference of a logprob"] < 1e-4
        assert each["responses"] == 16
    for each in seen[:STEPS]:
        assert each["norm of rank 0's gradients"] > 0
        assert each["tensors sent"] == 21
    assert left_behind(folder, 5.0) == []
    keep(
        PYTHON,
        ["megatron-core", "megatron-bridge", "torch", "transformers"],
        "megatron",
        steps=seen,
    )
