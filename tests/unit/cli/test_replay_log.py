"""`aseer replay-log`: what it says of a log, and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aseer.cli.main import main
from aseer.policies import POLICIES
from aseer.runtime.calls import LoggedController, Settings
from tests.unit.builders import info_of, task_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "rollout.calls"
    with path.open("wb") as file:
        made = Settings(policy="context-aware", chunk_size=8)
        controller = LoggedController(made, file.write)
        controller.instance_up(info_of(0), 0.0)
        controller.add_groups([task_of(g) for g in "gh"], 1.0)
    return path


def test_the_same_decisions_end_with_0(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay-log", str(log)]) == 0
    assert "2 calls caused the same 4 commands" in capsys.readouterr().out


def test_another_decision_ends_with_1_and_is_named(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "context-aware", POLICIES["fcfs"])
    assert main(["replay-log", str(log)]) == 1
    assert "another decision at call 2, AddGroups" in capsys.readouterr().out


def test_what_cannot_be_read_ends_with_1_and_the_files_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay-log", str(tmp_path / "none")]) == 1
    (tmp_path / "other").write_bytes(b"something else")
    assert main(["replay-log", str(tmp_path / "other")]) == 1
    errors = capsys.readouterr().err
    assert "none cannot be read" in errors
    assert "other: " in errors
