"""The first hour: in order, up to the first failure, and written down."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.cli import first_hour
from aseer.cli.findings import Finding, Status
from aseer.cli.first_hour import Outcome, Step, run_steps, write_report

if TYPE_CHECKING:
    from pathlib import Path


def step(name: str, status: Status) -> Step:
    return Step(name, lambda: Finding(status=status, detail=f"{name} was seen"))


def test_the_first_failure_ends_it_and_the_rest_is_not_run() -> None:
    def forbidden() -> Finding:
        raise AssertionError("must not run")

    told: list[Outcome] = []
    steps = [step("a", "ok"), step("b", "skip"), step("c", "fail")]
    outcomes = run_steps([*steps, Step("d", forbidden)], told.append)
    assert told == outcomes
    assert [(o.name, o.finding.status) for o in outcomes] == [
        ("a", "ok"),
        ("b", "skip"),
        ("c", "fail"),
        ("d", "skip"),
    ]
    assert outcomes[-1].finding.detail == "after c failed"


@pytest.mark.parametrize(("status", "is_ok"), [("ok", True), ("fail", False)])
def test_what_was_found_is_written_for_programs_and_readers(
    tmp_path: Path, status: Status, is_ok: bool
) -> None:
    outcomes = run_steps([step("a|b", status)], lambda outcome: None)
    data, page = write_report(outcomes, tmp_path / "new")
    written = json.loads(data.read_text())
    assert written["ok"] is is_ok
    assert written["steps"][0]["name"] == "a|b"
    assert f"| {status} | 0.0 | a\\|b was seen |" in page.read_text()


def response(tokens: list[int], logprobs: list[float]) -> Any:
    return SimpleNamespace(token_ids=tokens, logprobs=logprobs)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"r": response([1, 2], [-1.0, -2.0])}, None),
        ({"r": response([1, 2], [-1.0, -2.000001])}, None),
        ({"r": response([1, 3], [-1.0, -2.0])}, "the tokens of r"),
        ({"r": response([1, 2], [-1.0, -2.1])}, "the logprobs of r, by 1.0e-01"),
        ({}, "1 and 0 responses"),
    ],
)
def test_equal_means_equal_tokens_and_logprobs(
    other: dict[str, Any], text: str | None
) -> None:
    one = {"r": response([1, 2], [-1.0, -2.0])}
    assert first_hour._difference(one, other) == text
