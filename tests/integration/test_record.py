"""`aseer record` on simulated engines: what it writes is what was rolled out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from aseer.cli.main import main
from aseer.data import trace

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def record(tmp_path: Path):
    """Runs the command on three prompts, and reads what it wrote."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt_token_ids": [5, 6, 7 + i]}) for i in range(3)]
    prompts.write_text("\n".join(lines))

    def run(name: str, *options: str) -> trace.Trace:
        path = tmp_path / name
        argv = ["record", "--model", "sim", "--device", "sim", "--prompts", prompts]
        argv += ["--n", "4", "--max-tokens", "64", "--chunk-size", "16"]
        assert main([*map(str, argv), "--out", str(path), *options]) == 0
        return trace.load(path)

    return run


def test_a_rollout_is_written_in_order_with_its_settings(record, capsys, tmp_path):
    found = record("deep/trace.json.gz")
    assert (tmp_path / "deep/trace.json.gz.logs/instance-0.log").exists()
    assert [g.prompt.tolist() for g in found.groups] == [
        [5, 6, 7 + i] for i in range(3)
    ]
    assert [len(g.responses) for g in found.groups] == [4, 4, 4]
    assert 1 < max(len(r) for g in found.groups for r in g.responses) <= 64
    assert {
        "model": "sim",
        "n": 4,
        "num_prompts": 3,
        "max_tokens": 64,
        "seed": 0,
    }.items() <= (found.settings.items())
    assert found.settings["temperature"] == 0.7
    out = capsys.readouterr().out
    assert f"sha256 {found.sha256}" in out
    assert "3 groups, 12 responses" in out


def test_the_same_command_records_the_same_trace(record):
    first = record("a.json", "--policy", "fcfs")
    assert first.sha256 == record("b.json.gz").sha256
    assert first.sha256 != record("c.json", "--seed", "1").sha256


def test_fewer_prompts_may_be_taken(record):
    assert len(record("a.json", "--num-prompts", "2").groups) == 2
