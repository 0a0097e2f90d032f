"""docs/models.md calls tested what there is a test for, and nothing else."""

from __future__ import annotations

import ast
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from aseer.cli import family
from tests.e2e import test_families
from tests.e2e.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text()


def names(params: list[Any]) -> set[str]:
    """Families of a list of parameters."""
    return {p if isinstance(p, str) else p.values[0] for p in params}


def assigned(path: str, name: str) -> Any:
    """A constant, or a dictionary's keys, of a module that is only read: it may need
    what is not installed.
    """
    for node in ast.parse((ROOT / path).read_text()).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            (target,) = node.targets
        if target is not None and ast.unparse(target) == name:
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            if isinstance(node.value, ast.Dict):
                return [ast.literal_eval(key) for key in node.value.keys if key]
            assert node.value is not None
            return ast.literal_eval(node.value)
    raise KeyError(name)


KV_FAMILIES = assigned("tests/integration/test_vllm_kv.py", "FAMILIES")
RANKS = assigned("tests/e2e/test_ranks.py", "FAMILIES")
MIXED, EXPERTS = names(test_families.MIXED), names(test_families.EXPERTS)
IMAGES = "tests/e2e/test_images.py"
SEEING = set(assigned(IMAGES, "MODELS"))
# By the table's column: the families that its test runs.
TESTED = {
    "as transformers": test_families.TRIED | EXPERTS,
    "one token a resume": MIXED,
    "KV short": MIXED & set(KV_FAMILIES),
    "moves, drafts": set(test_families.MOVED) | EXPERTS,
}
SEEN = {
    "divided, moved, new weights": SEEING,
    "KV pool, drafts": {assigned(IMAGES, "POOLED")},
    "TRL's `GRPOTrainer`": {assigned("tests/e2e/test_trl.py", "SEEING")},
}


def table(head: str) -> list[dict[str, str]]:
    """The rows of the table whose first column that is."""
    lines = TEXT[TEXT.index(f"| {head} |") :].splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines)
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def called_tested(head: str, column: str) -> set[str]:
    """What the table says so of."""
    return {r[head].strip("`") for r in table(head) if r[column] == "tested"}


@pytest.mark.parametrize("column", TESTED)
def test_a_family_is_called_tested_where_a_test_runs_it(column: str) -> None:
    assert called_tested("family", column) == TESTED[column]


@pytest.mark.parametrize("column", SEEN)
def test_a_model_that_sees_is_called_tested_where_a_test_runs_it(column: str) -> None:
    assert called_tested("model", column) == SEEN[column]


def test_every_family_of_the_table_has_a_model() -> None:
    assert {row["family"].strip("`") for row in table("family")} <= FAMILIES.keys()


def test_the_doctor_knows_what_families_tests_run() -> None:
    assert family.TESTED == {"llama"} | MIXED | EXPERTS | SEEING | set(RANKS)


def test_the_tests_that_are_named_are_there() -> None:
    named = {
        w.strip("`,.:;()") for w in TEXT.split() if w.lstrip("(").startswith("`test_")
    }
    files = [path.read_text() for path in (ROOT / "tests" / "e2e").glob("test_*.py")]
    assert named
    assert [n for n in named if not any(f"def {n}(" in file for file in files)] == []
