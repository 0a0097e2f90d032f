"""The code that the README and the quick start show runs as it stands."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aseer
from aseer.models import smollm2
from tests.e2e.tiny import tiny_config, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_of(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


async def run(block: str, names: dict[str, Any]) -> None:
    """Run a block, which may wait, as if its page were one program."""
    code = compile(block, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    waits = eval(code, names)
    if inspect.isawaitable(waits):
        await waits


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted, beside the model."""
    transformers = pytest.importorskip("transformers")
    # The bar over a model's loading would leave a thread that watches it.
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    return {
        "aseer": aseer,
        "batch": [([5, 6, n], str(n)) for n in range(7, 10)],
        "prompts": [[5, 6, n % 100 + 7] for n in range(200)],
        "rewards": {},
        "score": lambda text, answer="": hash(str(text)) % 1000,
        "policy": transformers.AutoModelForCausalLM.from_pretrained(
            tiny_model(), dtype="float32"
        ),
    }


@pytest.fixture
def on_the_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages' models take minutes."""
    fixed = {"model": tiny_model(), "num_instances": 2, "max_model_len": 96}
    config = tiny_config(**fixed)

    def small(**settings: Any) -> aseer.EngineConfig:
        return replace(config, **settings | fixed)

    monkeypatch.setattr(aseer, "EngineConfig", small)
    monkeypatch.setattr(smollm2, "prepare", lambda **_: tiny_model())


async def test_the_readme_runs(names, on_the_tiny_model, capsys) -> None:
    (block,) = blocks_of("README.md")
    await run(block, names)
    assert len(names["rewards"]) == 3 * 8
    throughput, tail_s = map(float, capsys.readouterr().out.split())
    assert throughput > 0
    assert tail_s >= 0


async def test_the_quick_start_runs(names, on_the_tiny_model, capsys) -> None:
    first, fields, whole, refill, plain, update, mooncake = blocks_of(
        "docs/quickstart.md"
    )
    await run(first.partition("\n\nif __name__")[0], names)
    await names["main"]()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 * 4 + 1
    assert printed[-1].endswith("tokens/s")

    config = aseer.EngineConfig()
    names |= {
        "config": config,
        "groups": [aseer.Group(p) for p in names["prompts"][:3]],
    }
    async with aseer.Engine(config) as engine:
        names["engine"] = engine
        responses = [r async for r in engine.rollout(names["groups"][:1])]
        names["response"] = responses[0]
        await run(fields, names)
        await run(whole, names)
        assert len(names["rewards"]) == 8
        await run(refill, names)
        assert len(names["batch"]) == 64
        await run(update, names)
        assert engine.weight_version == 1
    await run(plain, names)
    await run(mooncake, names)
