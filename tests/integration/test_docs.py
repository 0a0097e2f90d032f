"""The code that the README and the pages show, on simulated engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.models import smollm2
from aseer.models.tiny import vocabulary, write_tokenizer
from tests.integration.sims import config_of
from tests.pages import (
    ROOT,
    blocks_of,
    compiled,
    run,
    run_first_program,
    run_other_blocks,
    run_readme,
)

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
WEIGHTS = {"a": [4, 3]}
# The reference shows signatures, not programs.
PAGES = sorted(
    {"README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))} - {"docs/api.md"}
)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the pages take for granted; every model is a simulated one."""
    write_tokenizer(tmp_path, vocabulary(256), 1024)

    config = config_of(engine_args={"weights": WEIGHTS}, tokenizer=tmp_path)
    kept = {"model": "sim", "engine_args": config.engine_args}

    def simulated(**settings: Any) -> aseer.EngineConfig:
        return replace(config, **settings | kept)

    monkeypatch.setattr(aseer, "EngineConfig", simulated)
    monkeypatch.setattr(smollm2, "prepare", lambda **_: tmp_path)
    return {
        "aseer": aseer,
        "asyncio": asyncio,
        "batch": [([5, 6, n], str(n)) for n in range(7, 10)],
        "prompts": [[5, 6, n % 100 + 7] for n in range(200)],
        "groups": [aseer.Group([5, 6, n]) for n in range(7, 10)],
        "rewards": {},
        "score": lambda text, answer="": hash(str(text)) % 1000,
        "policy": {"a": torch.zeros(4, 3)},
    }


async def test_the_readme_runs(names, capsys) -> None:
    await run_readme(names)
    assert len(names["rewards"]) == 3 * 8
    throughput, tail_s = map(float, capsys.readouterr().out.split())
    assert throughput > 0
    assert tail_s >= 0


async def test_the_quick_starts_first_program_runs(names, capsys) -> None:
    await run_first_program(names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 * 4 + 1
    assert printed[-1].endswith("tokens/s")


async def test_the_quick_start_runs_as_many_groups_as_it_says(
    names, monkeypatch
) -> None:
    names["config"] = aseer.EngineConfig()
    made, scored, most = 0, 0, 0
    group, score = aseer.Group, names["score"]

    def counted(*args: Any, **settings: Any) -> aseer.Group:
        nonlocal made, most
        made += 1
        most = max(most, made - scored // 8)
        return group(*args, **settings)

    def counting(*args: Any) -> int:
        nonlocal scored
        scored += 1
        return score(*args)

    whole = [group([5, 6, 7], n=8)]
    names |= {"score": counting, "groups": whole}
    monkeypatch.setattr(aseer, "Group", counted)
    scored = -8  # the block for whole groups scores one that is not counted as made
    await run_other_blocks(names)
    assert most == 16


async def test_a_step_that_is_come_to_again_is_replayed(
    names, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [b for b in blocks_of("docs/training.md") if "journal=" in b]
    names |= {"model": "sim", "step": 17}
    for _ in range(2):
        await run(block, names)
    assert names["rollout"].report.num_replayed == 24
    assert (tmp_path / "runs/journals/step-17.journal").exists()


async def test_a_trainers_processes_get_their_own_groups(names) -> None:
    (block,) = [b for b in blocks_of("docs/training.md") if "def roll_out" in b]
    await run(block.partition("\n\nif __name__")[0], names)
    everyones = [
        [aseer.Group([5, 6, 7 + rank], n=2, group_id=f"{rank}")] for rank in range(3)
    ]
    with aseer.Engine(aseer.EngineConfig()) as engine:
        answers = names["roll_out"](engine, everyones)
    assert [[r.group_id for r in answer] for answer in answers] == [
        ["0"] * 2,
        ["1"] * 2,
        ["2"] * 2,
    ]


@pytest.mark.parametrize("page", PAGES)
def test_what_pages_show_is_python(page) -> None:
    for block in blocks_of(page):
        compiled(block)
