"""`aseer doctor --gpu`, whole, on engines on this CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from aseer.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("lmcache")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_whole_list_runs_on_a_cpu(tmp_path: Path) -> None:
    code = main(["doctor", "--gpu", str(tmp_path / "out")])
    text = (tmp_path / "out" / "first-hour.json").read_text()
    data = json.loads(text)
    found: dict[str, Any] = {each["name"]: each for each in data["steps"]}
    failed = {
        n: each["detail"] for n, each in found.items() if each["status"] == "fail"
    }
    assert (failed, code) == ({}, 0)
    skipped = [name for name, each in found.items() if each["status"] == "skip"]
    assert skipped == ["weights-direct", "sleep"], "what needs a GPU, and nothing else"
    page = (tmp_path / "out" / "first-hour.md").read_text()
    for written in (text, page):
        assert str(tmp_path) not in written, "what is sent names no place"

    default, in_step = found["two-engines"]["figures"]
    for each in (default, in_step):
        moves, killed = each["compared"][1:]
        assert moves["num_migrations"] > 10
        assert killed["num_retries"] > 0
    assert found["pool"]["figures"][0]["num_found"] > 10
    assert [each["ranks"] for each in found["weights"]["figures"]] == [1, 2]
    assert all(each["num_accepted"] > 10 for each in found["drafts"]["figures"])
    assert found["ngram"]["figures"][0]["num_drafts"] > 0
    arms = {(each["arm"], each["batch"]) for each in found["drafts-speed"]["figures"]}
    assert arms == {(f"v1-{m}", b) for m in ("off", "dgds") for b in (1, 4)}
    assert found["replay"]["figures"]["over_base"]["verl-today"] == 1.0
