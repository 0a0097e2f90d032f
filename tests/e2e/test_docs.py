"""The code that the README and the quick start show runs as it stands."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

import aseer
from aseer.models import smollm2
from tests.e2e.tiny import tiny_config, tiny_model
from tests.pages import run_first_program, run_other_blocks, run_readme

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted; their models would take minutes."""
    transformers = pytest.importorskip("transformers")
    fixed = {"model": tiny_model(), "num_instances": 2, "max_model_len": 96}
    config = tiny_config(**fixed)

    def small(**settings: Any) -> aseer.EngineConfig:
        return replace(config, **settings | fixed)

    monkeypatch.setattr(aseer, "EngineConfig", small)
    monkeypatch.setattr(smollm2, "prepare", lambda **_: tiny_model())
    return {
        "aseer": aseer,
        "asyncio": asyncio,
        "batch": [([5, 6, n], str(n)) for n in range(7, 10)],
        "prompts": [[5, 6, n % 100 + 7] for n in range(200)],
        "groups": [aseer.Group([5, 6, n]) for n in range(7, 10)],
        "rewards": {},
        "score": lambda text, answer="": hash(str(text)) % 1000,
        "policy": transformers.AutoModelForCausalLM.from_pretrained(
            tiny_model(), dtype="float32"
        ),
    }


async def test_the_readme_runs(names, capsys) -> None:
    await run_readme(names)
    assert len(names["rewards"]) == 3 * 8
    throughput, tail_s = map(float, capsys.readouterr().out.split())
    assert throughput > 0
    assert tail_s >= 0


async def test_the_quick_start_runs(names, capsys) -> None:
    await run_first_program(names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 * 4 + 1
    assert printed[-1].endswith("tokens/s")
    names["config"] = aseer.EngineConfig()
    await run_other_blocks(names)
