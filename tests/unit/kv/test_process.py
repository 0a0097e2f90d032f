"""What a pool server's process is started with; the process is a fake."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.kv import process
from aseer.kv.process import ServerProcess
from aseer.node.interpreter import this_interpreter
from tests.unit.kv.test_pool_plan import plan_of


class _Started(Exception):
    """The process was about to start."""


@pytest.mark.parametrize("interpreter", [None, this_interpreter()])
async def test_a_server_sees_no_device_whatever_the_trainer_sees(
    monkeypatch: pytest.MonkeyPatch, interpreter: Any
) -> None:
    """With the trainer's devices it would take some of their memory, and could not open
    that of engines on others.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1,2,3")
    started: list[dict[str, str]] = []

    async def start(command: Any, env: dict[str, str], *_: Any, **__: Any) -> Any:
        started.append(env)
        raise _Started

    monkeypatch.setattr(process, "Child", SimpleNamespace(start=start))
    leftovers: Any = SimpleNamespace(add=lambda path: None)
    server = ServerProcess(plan_of(1), 0, Path("x.log"), leftovers, interpreter)
    with pytest.raises(_Started):
        await server.try_to_start()
    (env,) = started
    assert env["CUDA_VISIBLE_DEVICES"] == env["HIP_VISIBLE_DEVICES"] == ""
