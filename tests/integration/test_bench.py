"""Benchmarks run in seconds with --smoke, and end with a line of JSON."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = [pytest.mark.bench, pytest.mark.timeout(240)]

COMPARES = pytest.mark.skipif(
    importlib.util.find_spec("arctic_inference") is None,
    reason="compares with arctic-inference, which is not installed",
)
NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("overhead", {"ratio_undivided", "ratio_chunks_256"}),
        (
            "scheduler",
            {"us_per_decision", "controller_us_per_decision", "reporting_cores"},
        ),
        pytest.param("chain", {"chain_of_one", "star_of_one"}, marks=pytest.mark.slow),
        pytest.param("streams", {"two_of_one"}, marks=pytest.mark.slow),
        ("busy_trainer", {"ratios", "computed"}),
        ("journal", {"us_per_report", "bytes_per_token", "read_mb_per_s"}),
        ("simulate", {"workloads"}),
        ("order", {"workloads"}),
        ("exposed", {"rows"}),
        pytest.param(
            "rollout_vllm",
            {"arms"},
            marks=[NEEDS_VLLM, pytest.mark.slow, pytest.mark.timeout(500)],
        ),
        pytest.param(
            "kv",
            {"resume_s", "rollout"},
            marks=[NEEDS_VLLM, pytest.mark.slow, pytest.mark.timeout(500)],
        ),
        pytest.param(
            "weights",
            {"state_dict_s"},
            marks=[NEEDS_VLLM, pytest.mark.slow, pytest.mark.timeout(500)],
        ),
        pytest.param(
            "priors",
            {"error_factor"},
            marks=[NEEDS_VLLM, pytest.mark.slow, pytest.mark.timeout(500)],
        ),
        pytest.param(
            "grpo",
            {"vllm", "aseer", "aseer minus vllm"},
            marks=[NEEDS_VLLM, pytest.mark.slow, pytest.mark.timeout(500)],
        ),
        pytest.param(
            "cst", {"append_ratio", "lookup_ratio", "memory_ratio"}, marks=COMPARES
        ),
        pytest.param("acceptance", {"points"}, marks=COMPARES),
    ],
)
def test_a_smoke_run_ends_with_its_figures(name, keys):
    done = subprocess.run(
        [sys.executable, str(BENCH / f"bench_{name}.py"), "--smoke"],
        capture_output=True,
        text=True,
        timeout=450,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert keys | {"bench", "settings", "device", "commit"} <= result.keys()
