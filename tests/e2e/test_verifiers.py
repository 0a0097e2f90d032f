"""`aseer serve` with a real engine: verifiers' real client, and the server's end.

`make test-trainers` makes verifiers' environment; its interpreter is named by
ASEER_VERIFIERS_PYTHON.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from aseer.models.tiny import make_tiny
from tests.e2e.trainers import ROOT, keep, left_behind

torch = pytest.importorskip("torch")
PYTHON = os.environ.get("ASEER_VERIFIERS_PYTHON", "")
CLIENT = Path(__file__).parent / "verifiers_client.py"
TIMEOUT_S = 900
LOOPS = 8
SETTINGS = {
    "kv_pool": "off",
    "kv_cache_bytes": 1 << 26,
    "engine_args": {"enforce_eager": True},
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(not PYTHON, reason="ASEER_VERIFIERS_PYTHON is not set"),
]


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def model(folder):
    return make_tiny(folder / "model", num_layers=2, max_positions=1024)


@contextmanager
def served(folder: Path, model: Path, key: str):
    """A server's process and its URL."""
    options = ["--port", "0", "--instances", "1", "--device", "cpu"]
    options += ["--dtype", "float32", "--chunk-size", "16", "--served-model-name", "m"]
    options += ["--join-s", "1"]  # the client renders prompts one after another
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "aseer", "serve", str(model)),
            *(*options, "--settings", json.dumps(SETTINGS)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"ASEER_API_KEY": key, "TMPDIR": str(folder)},
        cwd=ROOT,
        text=True,
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"serving m at (http://\S+)", line):
                yield process, found[1]
                break
        else:
            pytest.fail(f"the server did not start: {''.join(said)}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def info_of(url: str, key: str) -> dict:
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/server_info", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def ask(url: str, model: Path, key: str) -> list[list[dict]]:
    done = subprocess.run(
        [PYTHON, str(CLIENT), url, "m", str(model)],
        env=os.environ | {"ASEER_API_KEY": key, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-10_000:]
    return json.loads(done.stdout.splitlines()[-1])


def worst_difference(model: Path, turns: list[dict]) -> float:
    """Of a turn's logprobs to those that the model computes in one go."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # its thread would stay
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    worst = 0.0
    for turn in turns:
        ids = torch.tensor([turn["prompt"] + turn["ids"]])
        with torch.no_grad():
            logprobs = reference(ids).logits[0].log_softmax(-1)
        begin = len(turn["prompt"]) - 1
        for offset, (token, said) in enumerate(
            zip(turn["ids"], turn["logprobs"], strict=True)
        ):
            computed = float(logprobs[begin + offset, token])
            worst = max(worst, abs(computed - said))
    return worst


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_verifiers_own_client_is_served_and_the_server_ends_cleanly(
    folder, model, number
):
    key = secrets.token_hex(16)
    with served(folder, model, key) as (process, url):
        loops = ask(url, model, key)
        counted = info_of(url, key)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert left_behind(folder, 5.0) == []
    assert [len(turns) for turns in loops] == [2] * LOOPS
    turns = [turn for loop in loops for turn in loop]
    assert all(turn["finish"] in ("stop", "length") for turn in turns)
    assert all(len(turn["prompt"]) > 1 and turn["ids"] for turn in turns)
    assert len({tuple(loop[0]["prompt"]) for loop in loops}) == 1
    assert len({tuple(loop[0]["ids"]) for loop in loops}) > 1, "they are sampled"
    worst = worst_difference(model, turns)
    assert worst < 1e-4
    # The first turns are a group; the second ones have no siblings.
    assert counted["requests"] == 2 * LOOPS
    assert counted["groups"] == 1 + LOOPS
    keep(
        PYTHON,
        ["verifiers", "renderers", "openai"],
        "verifiers",
        **{
            signal.Signals(number).name: {
                "agent loops": LOOPS,
                "tokens": sum(len(turn["ids"]) for turn in turns),
                "requests": counted["requests"],
                "groups": counted["groups"],
                "largest difference of a logprob": worst,
            }
        },
    )
