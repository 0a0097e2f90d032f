"""verl's real trainer, in an environment of its own, with rollouts by aseer.

`make test-trainers` makes that environment; its interpreter is named by
ASEER_VERL_PYTHON. The trainer is run by the example's script: two FSDP ranks, on CPUs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.trainers import (
    DEADLINE_S,
    RAY_PLUGIN,
    ROOT,
    keep,
    left_behind,
    make_model,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

PLUGIN = Path(__file__).parent / "verl_plugin"
SCRIPT = ROOT / "examples" / "verl" / "grpo.sh"
PYTHON = os.environ.get("ASEER_VERL_PYTHON", "")
STEPS = 3
RANKS = 2
BATCH, SIBLINGS = 4, 4
# Of verl's, by their meaning here: the trainer's probability of a sampled token off the
# engine's, and whether it learned.
WORST, GRADIENT = "training/rollout_probs_diff_max", "actor/grad_norm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(DEADLINE_S + 60),
    pytest.mark.skipif(not PYTHON, reason="ASEER_VERL_PYTHON is not set"),
]

ON_A_CPU = [
    "++ray_kwargs.ray_init.num_cpus=8",
    f"++ray_kwargs.ray_init.num_gpus={RANKS}",
    "++ray_kwargs.ray_init.include_dashboard=False",
    f"trainer.n_gpus_per_node={RANKS}",
    "trainer.device=cpu",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.use_remove_padding=False",
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "actor_rollout_ref.actor.use_dynamic_bsz=False",
    "actor_rollout_ref.actor.fsdp_config.param_offload=False",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=False",
    "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype=fp32",
    "actor_rollout_ref.rollout.dtype=float32",
    "actor_rollout_ref.rollout.enforce_eager=True",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False",
    "+actor_rollout_ref.rollout.engine_kwargs.aseer.kv_pool=off",
    "+actor_rollout_ref.rollout.engine_kwargs.aseer.kv_cache_bytes=67108864",
    "+actor_rollout_ref.rollout.engine_kwargs.aseer.num_instances=1",
]
SMALL = [
    f"data.train_batch_size={BATCH}",
    "data.val_batch_size=8",
    "data.max_prompt_length=64",
    "data.max_response_length=32",
    "data.dataloader_num_workers=0",
    "data.shuffle=False",
    f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    f"actor_rollout_ref.rollout.n={SIBLINGS}",
    "actor_rollout_ref.rollout.max_num_seqs=32",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "+actor_rollout_ref.rollout.engine_kwargs.aseer.chunk_size=16",
    # On a busy machine a sibling may be late by more than the default, 0.25 s.
    "+actor_rollout_ref.rollout.engine_kwargs.aseer.join_s=5",
    "reward.num_workers=1",
    f"reward.custom_reward_function.path={PLUGIN / 'reward.py'}",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "transfer_queue.backend.SimpleStorage.total_storage_size=1000",
    f"trainer.total_training_steps={STEPS}",
    "trainer.val_before_train=False",
    "trainer.test_freq=2",
    "trainer.save_freq=-1",
    "trainer.resume_mode=disable",
]


@pytest.fixture
def folder():
    """Short, since Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="verl-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def make_prompts(path: Path) -> Path:
    pandas = pytest.importorskip("pandas")
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"{i}+{i + 1}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": f"{2 * i + 1}"},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(16)
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path


def train(
    folder: Path, model: Path, *args: str, below: Sequence[str] = ()
) -> tuple[list[dict], str]:
    """Run the trainer; its metrics by step, and all that it said.

    Args:
        below: a command that runs another.
    """
    metrics = folder / "metrics.jsonl"
    command = [str(SCRIPT), *ON_A_CPU, *SMALL, f"hydra.run.dir={folder / 'hydra'}"]
    said = run_verl(
        [*below, *command, *args],
        folder,
        MODEL=model,
        TRAIN=make_prompts(folder / "train.parquet"),
        GPUS=RANKS,
        PYTHON=PYTHON,
        ENGINE_PYTHON=sys.executable,
        VERL_FILE_LOGGER_PATH=metrics,
    )
    return [json.loads(line) for line in metrics.read_text().splitlines()], said


def run_verl(command: list[str], folder: Path, **environ: object) -> str:
    """Run what uses verl on a CPU, to its end; what it said."""
    return run(
        command,
        folder,
        PYTHONPATH=f"{PLUGIN}:{RAY_PLUGIN}",
        VERL_USE_EXTERNAL_MODULES="verl_cpu",
        VERL_PLATFORM="cpu",
        VERL_ENGINE_DEVICE="cuda",  # which of verl's FSDP engines
        **environ,
    )


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_the_server_and_verls_own_classes_keep_to_the_contract_on_ray(
    folder, num_hosts
):
    command = [PYTHON, str(PLUGIN / "contract.py"), sys.executable, str(num_hosts)]
    assert "the contract is kept" in run_verl(command, folder)
    assert left_behind(folder, 20.0) == [], "Ray had killed the engine's actor"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_trainer_of_verl_trains_on_what_its_own_weights_generate(folder, tied):
    model = make_model(folder / "model", tied=tied)
    lines, said = train(folder, model)
    steps = [line["data"] for line in lines if WORST in line["data"]]
    assert len(steps) == STEPS, said[-20_000:]
    for data in steps:
        assert data[WORST] < 1e-4, "what generates is what is trained"
        assert data[GRADIENT] > 0
    for step in range(STEPS + 1):
        assert f"weights of step {step} are version {step + 1}:" in said
    assert any("val" in name for line in lines for name in line["data"])
    found = re.findall(r"a rollout of (\d+) responses in (\d+) groups", said)
    joined = sum(int(responses) - int(groups) for responses, groups in found)
    assert joined == STEPS * BATCH * (SIBLINGS - 1), "and none of validation"
    assert left_behind(folder, 20.0) == []
    keep_as("tied" if tied else "untied", steps)


def keep_as(name: str, steps: list[dict]) -> None:
    packages = ["verl", "ray", "torch", "transformers"]
    settings = [*ON_A_CPU, *SMALL]
    keep(PYTHON, packages, "verl", settings=settings, **{name: steps})


ON_TWO_HOSTS = [
    # Of a cluster that is there already.
    "++ray_kwargs.ray_init.num_cpus=null",
    "++ray_kwargs.ray_init.num_gpus=null",
    "++ray_kwargs.ray_init.include_dashboard=null",
    "trainer.nnodes=2",
    "trainer.n_gpus_per_node=1",
]


def test_a_trainer_on_two_hosts_has_an_engine_on_each(folder):
    model = make_model(folder / "model", tied=True)
    below = [PYTHON, str(PLUGIN / "on_two_hosts.py")]
    lines, said = train(folder, model, *ON_TWO_HOSTS, below=below)
    steps = [line["data"] for line in lines if WORST in line["data"]]
    assert len(steps) == STEPS, said[-20_000:]
    for data in steps:
        assert data[WORST] < 1e-4, "what generates is what is trained"
        assert data[GRADIENT] > 0
    assert "2 instances are up" in said
    assert "on 2 instances" in said, "both have generated"
    assert left_behind(folder, 20.0) == []
    keep_as("two_hosts", steps)
