"""The real `trl.GRPOTrainer` on the tiny model: what generates is what is trained."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.tiny import tiny_model
from tests.e2e.vision import vision_env, vision_model

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("trl")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SEEING = "qwen2_vl"
STEPS = 3
BATCH = 12
DEADLINE_S = 400
TRAINER = ["-m", "tests.e2e.trl_trainer"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of TRL and what it uses
]


def train(directory: Path, num_processes: int, *args: str) -> list[dict[str, Any]]:
    """What each process saw."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [sys.executable]
    if num_processes > 1:
        command += [*launcher, f"{num_processes}"]
    subprocess.run(
        [*command, *TRAINER, str(directory), *args], timeout=DEADLINE_S, check=True
    )
    return [
        json.loads((directory / f"rank-{rank}.json").read_text())
        for rank in range(num_processes)
    ]


def make_model(directory: Path, *, tied: bool) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_model())
    config.tie_word_embeddings = tied
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(
    ("num_processes", "args", "tied", "weights"),
    [
        pytest.param(1, (), False, "Tensor", id="one process"),
        pytest.param(1, ("--chat",), False, "Tensor", id="one process, chats"),
        pytest.param(2, (), True, "Tensor", id="two processes"),
        pytest.param(2, ("--sharded",), True, "DTensor", id="two, sharded"),
        pytest.param(2, ("--lora",), True, "Tensor", id="two, with adapters"),
    ],
)
def test_a_trainer_of_trl_trains_on_what_its_own_weights_generate(
    tmp_path, monkeypatch, num_processes, args, tied, weights
):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    make_model(tmp_path / "model", tied=tied)
    for seen in train(tmp_path, num_processes, *args):
        assert seen["weights"] == weights, "sharded, or not"
        assert seen["worst"] < 1e-3
        assert seen["versions"] == [1, 2, 3], "each step's rollout has its own weights"
        for before, after in zip(seen["probes"], seen["probes"][1:], strict=False):
            off = [abs(b - a) for b, a in zip(before, after, strict=True)]
            assert max(off) > 1e-4, "they had been trained"
        assert len(seen["losses"]) == STEPS
        assert all(map(math.isfinite, seen["losses"]))
        assert max(seen["gradients"]) > 0
        assert seen["num_rewarded"] == STEPS * BATCH // num_processes


def test_a_trainer_of_a_model_that_sees_trains_on_what_it_generates(
    tmp_path, monkeypatch
):
    if find_spec("torchvision") is None:
        pytest.skip("run `python3 scripts/bootstrap.py --images` first")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    command = [sys.executable, "-m", "tests.e2e.trl_seeing"]
    subprocess.run(
        [*command, str(tmp_path), str(vision_model(SEEING))],
        env=os.environ | vision_env(),
        timeout=DEADLINE_S,
        check=True,
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["num_tokens_of_images"] == [6]
    assert seen["num_distinct"] > 6, "images of one text are told apart"
    assert seen["worst"] < 1e-3
    assert seen["versions"] == [1, 2], "each step's rollout has its own weights"
    assert len(seen["losses"]) == 2
    assert all(map(math.isfinite, seen["losses"]))
    assert max(seen["gradients"]) > 0
