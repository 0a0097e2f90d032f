"""SkyRL's real trainer, in an environment of its own, with rollouts by aseer.

`make test-trainers` makes that environment; its interpreter is named by
ASEER_SKYRL_PYTHON. Once the policy shares its GPUs with the engine, as it does by
default (two FSDP ranks), and once the engine has its own; the GPUs are in name only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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

PLUGIN = Path(__file__).parent / "skyrl_plugin"
SCRIPT = ROOT / "examples" / "skyrl" / "grpo.sh"
PYTHON = os.environ.get("ASEER_SKYRL_PYTHON", "")
STEPS = 3
BATCH, SIBLINGS, PROMPTS = 4, 4, 8
# Of SkyRL's, by their meaning here: the trainer's logprob of a sampled token off the
# engine's, and whether it learned.
WORST = "policy/rollout_train_logprobs_abs_diff_max"
GRADIENT = "policy/grad_norm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(DEADLINE_S + 60),
    pytest.mark.skipif(not PYTHON, reason="ASEER_SKYRL_PYTHON is not set"),
]

ENGINE = "generator.inference_engine"
ON_A_CPU = [
    "trainer.flash_attn=false",
    "trainer.remove_microbatch_padding=false",
    "trainer.gradient_checkpointing=false",
    "trainer.use_expandable_segments=false",
    "trainer.enable_ray_gpu_monitor=false",
    "trainer.policy.fsdp_config.mixed_precision.param_dtype=fp32",
    "data.dataloader.num_workers=0",
    f"{ENGINE}.model_dtype=float32",
    f"{ENGINE}.enforce_eager=true",
    f"{ENGINE}.max_num_seqs=32",
    f"{ENGINE}.engine_init_kwargs.aseer.device=cpu",
    f"{ENGINE}.engine_init_kwargs.aseer.kv_pool=off",
    f"{ENGINE}.engine_init_kwargs.aseer.kv_cache_bytes=67108864",
    f"{ENGINE}.engine_init_kwargs.aseer.num_instances=1",
]
SMALL = [
    "environment.env_class=letters",
    f"trainer.train_batch_size={BATCH}",
    f"trainer.policy_mini_batch_size={BATCH}",
    "trainer.micro_train_batch_size_per_gpu=8",
    "trainer.micro_forward_batch_size_per_gpu=8",
    "trainer.max_prompt_length=64",
    "trainer.policy.optimizer_config.lr=1e-3",
    f"trainer.max_training_steps={STEPS}",
    "trainer.epochs=2",
    "trainer.eval_before_train=false",
    "trainer.eval_interval=2",
    "trainer.eval_batch_size=8",
    "trainer.ckpt_interval=-1",
    "trainer.resume_mode=none",
    f"generator.n_samples_per_prompt={SIBLINGS}",
    "generator.sampling_params.max_generate_length=32",
    f"{ENGINE}.engine_init_kwargs.aseer.chunk_size=16",
]


def placed(*, ranks: int, shared: bool) -> list[str]:
    return [
        f"trainer.placement.colocate_all={str(shared).lower()}",
        f"trainer.placement.policy_num_gpus_per_node={ranks}",
        f"{ENGINE}.num_engines={ranks if shared else 1}",
    ]


@pytest.fixture
def folder():
    """Short, since Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="skyrl-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def make_prompts(path: Path) -> Path:
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"{i}+{i + 1}="}],
            "env_class": "letters",
        }
        for i in range(PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(folder: Path, model: Path, *args: str) -> tuple[list[dict], str]:
    """Run the trainer; its metrics by step, and all that it said."""
    command = [
        str(SCRIPT),
        "trainer.logger=tensorboard",
        *(f"trainer.{name}_path={folder / name}" for name in ("export", "ckpt", "log")),
        *ON_A_CPU,
        *SMALL,
        *args,
    ]
    metrics = folder / "metrics"
    said = run(
        command,
        folder,
        MODEL=model,
        TRAIN=make_prompts(folder / "prompts.jsonl"),
        PYTHON=PYTHON,
        ENGINE_PYTHON=sys.executable,
        PYTHONPATH=f"{PLUGIN}:{RAY_PLUGIN}",
        RAY_OVERRIDE_RESOURCES=json.dumps({"CPU": 8, "GPU": 2}),
        SKYRL_DUMP_INFRA_LOG_TO_STDOUT="1",
        TENSORBOARD_DIR=metrics,
    )
    read = [PYTHON, str(PLUGIN / "metrics.py"), str(metrics)]
    done = subprocess.run(read, capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), said


def test_the_client_and_the_sender_keep_to_skyrls_contract(folder):
    model = make_model(folder / "model", tied=False)
    command = [PYTHON, str(PLUGIN / "contract.py"), str(model)]
    said = run(command, folder, PYTHONPATH=f"{PLUGIN}:{RAY_PLUGIN}")
    assert "the contract is kept" in said
    assert said.count("a rollout of 12 responses in 3 groups") == 2
    assert left_behind(folder, 5.0) == []


@pytest.mark.parametrize(
    ("ranks", "shared"), [(2, True), (1, False)], ids=["shared", "own"]
)
def test_a_trainer_of_skyrl_trains_on_what_its_own_weights_generate(
    folder, ranks, shared
):
    model = make_model(folder / "model", tied=False)
    settings = placed(ranks=ranks, shared=shared)
    lines, said = train(folder, model, *settings)
    steps = [line for line in lines if WORST in line]
    assert len(steps) == STEPS, said[-20_000:]
    assert max(worst := [step[WORST] for step in steps]) < 1e-4, worst
    assert all(step[GRADIENT] > 0 for step in steps)
    for version in range(1, STEPS + 2):
        assert f"weights are version {version}:" in said
    assert any(name.startswith("eval/") for line in lines for name in line)
    found = re.findall(r"a rollout of (\d+) responses in (\d+) groups", said)
    joined = sum(int(responses) - int(groups) for responses, groups in found)
    assert joined == STEPS * BATCH * (SIBLINGS - 1), "and none of evaluation"
    assert left_behind(folder, 20.0) == []
    keep(
        PYTHON,
        ["skyrl", "skyrl-gym", "ray", "torch", "transformers"],
        "skyrl",
        settings=[*ON_A_CPU, *SMALL],
        **{
            "shared GPUs, two ranks" if shared else "own GPU": {
                "placement": settings,
                "steps": lines,
            }
        },
    )
