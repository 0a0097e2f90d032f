"""Instances that are started again are started as the first ones were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aseer.node.local import LocalNode

if TYPE_CHECKING:
    import pytest


async def test_a_restart_gets_what_the_first_start_got_wherever_this_process_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []

    async def start(name: str, line: bytes, env: dict[str, str], *rest: Any) -> None:
        given.append(env)

    monkeypatch.setattr("aseer.node.local.InstanceProcess.start", start)
    monkeypatch.setattr("sys.path", ["", "/lib"])
    monkeypatch.setenv("OF_MINE", "before")
    nothing: Any = SimpleNamespace(run_dir=Path("/run"))
    node = LocalNode(nothing, "ipc:///run/ctrl", nothing, tmp_path)
    for _ in range(2):
        await node.start(b"0.1", "instance-0", b"{}", {"OF_LAUNCH": "x"})
        monkeypatch.setenv("OF_MINE", "after")
        monkeypatch.chdir(tmp_path)
    assert given[0] == given[1]
    assert given[0]["OF_MINE"] == "before"
    assert given[0]["OF_LAUNCH"] == "x"
    assert given[0]["PYTHONPATH"] != f"{tmp_path}:/lib"
