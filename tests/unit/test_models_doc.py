"""docs/models.md calls tested what there is a test for, and nothing else."""

from __future__ import annotations

import ast
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import test_families
from tests.e2e.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text()


def names(params: list[Any]) -> set[str]:
    """Families of a list of parameters."""
    return {p if isinstance(p, str) else p.values[0] for p in params}


def keys_of(path: str, name: str) -> set[str]:
    """Keys of a module's dictionary; the module, which needs vLLM, is only read."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key}
    raise KeyError(name)


KV_FAMILIES = keys_of("tests/integration/test_vllm_kv.py", "FAMILIES")
MIXED, EXPERTS = names(test_families.MIXED), names(test_families.EXPERTS)
# By the table's column: the families that its test runs.
TESTED = {
    "as transformers": test_families.TRIED | EXPERTS,
    "one token a resume": MIXED,
    "KV short": {name for name in KV_FAMILIES if name in FAMILIES},
    "moves, drafts": EXPERTS,
}


def table() -> list[dict[str, str]]:
    """The rows of the table of families."""
    lines = TEXT[TEXT.index("| family |") :].splitlines()
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines)
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.parametrize("column", TESTED)
def test_a_family_is_called_tested_where_a_test_runs_it(column: str) -> None:
    called = {row["family"] for row in table() if row[column] == "tested"}
    assert called == TESTED[column]


def test_every_family_of_the_table_has_a_model() -> None:
    assert {row["family"] for row in table()} <= FAMILIES.keys()


def test_the_tests_that_are_named_are_there() -> None:
    named = [w.strip("`,.:;") for w in TEXT.split() if w.startswith("`test_")]
    assert named
    assert [n for n in named if not hasattr(test_families, n)] == []
