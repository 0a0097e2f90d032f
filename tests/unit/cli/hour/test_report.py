"""What is written for programs and readers, and what is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from aseer.cli.findings import Status, fail, ok
from aseer.cli.hour.report import DATA, PAGE, places_of, without_places, write_report
from aseer.cli.hour.steps import Outcome


@dataclass
class Figures:
    tokens_per_s: float
    log: str


@pytest.mark.parametrize(("status", "is_ok"), [("ok", True), ("fail", False)])
def test_what_was_found_is_written_for_programs_and_readers(
    tmp_path: Path, status: Status, is_ok: bool
) -> None:
    finding = ok("a|b was seen") if status == "ok" else fail("a|b\nwas seen", "do that")
    figures = [Figures(3.5, "/home/u/x/log"), Figures(4.5, "")]
    outcome = Outcome("first", finding.after(1.26), figures)
    page = write_report([outcome], tmp_path / "new", {"/home/u": "~"})
    assert page == tmp_path / "new" / PAGE
    written = json.loads((tmp_path / "new" / DATA).read_text())
    assert written["ok"] is is_ok
    assert written["steps"][0]["name"] == "first"
    one, two = written["steps"][0]["figures"]
    assert one == {"tokens_per_s": 3.5, "log": "~/x/log"}
    assert two == {"tokens_per_s": 4.5, "log": ""}
    text = page.read_text()
    advice = "" if is_ok else ". do that"
    assert f"| first | {status} | 1.3 | a\\|b was seen{advice} |" in text
    assert '"tokens_per_s": 3.5' in text
    assert ("A step failed" in text) is not is_ok


def test_a_report_of_fewer_steps_replaces_none_of_another_folder(
    tmp_path: Path,
) -> None:
    one, two = Outcome("a", ok("")), Outcome("b", ok(""))
    write_report([one], tmp_path, {})
    write_report([one, two], tmp_path, {})
    written = json.loads((tmp_path / DATA).read_text())
    assert [each["name"] for each in written["steps"]] == ["a", "b"]


PLACES = {"/home/u": "~", "/home/u/env": "<environment>", "node7": "<host>"}


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("3.12 in /home/u/env", "3.12 in <environment>"),
        ("(/home/u/log, line 3)", "(~/log, line 3)"),
        ("/home/user2 and /data/home/u", "/home/user2 and /data/home/u"),
        ("node7: lost", "<host>: lost"),
        ("node70 and mynode7", "node70 and mynode7"),
    ],
)
def test_places_of_the_machine_are_not_told(text: str, written: str) -> None:
    assert without_places({"a": [text, (1, None)]}, PLACES) == {
        "a": [written, [1, None]]
    }


def test_places_are_those_of_this_machine_and_the_named_ones(tmp_path: Path) -> None:
    places = places_of(scratch=tmp_path)
    assert places[str(tmp_path)] == "<scratch>"
    assert places[str(Path.home())] == "~"
    assert "/" not in places
