"""A rollout's decisions are made again from its log, whatever happened in it."""

from __future__ import annotations

import os
import signal

import pytest

import aseer
from aseer import scheduler
from aseer.cli.main import main
from tests.integration.sims import config_of, groups_of


async def rolled_out(log_dir) -> list:
    """Logs of a rollout in which an instance dies, and of one that was left."""
    config = config_of(log_dir=log_dir, logs_calls=True)
    groups = groups_of(8, ignore_eos=True, max_tokens=400)
    async with aseer.Engine(config) as engine:
        async for response in engine.rollout([*groups, *groups_of(9, n=1)[8:]]):
            if response.group_id == "g8":
                os.kill(engine.instances[0].pid, signal.SIGKILL)
        async for _ in engine.rollout(groups):
            break
        assert len([r async for r in engine.rollout(groups_of(1))]) == 4
    return sorted(log_dir.glob("*.calls"), key=lambda p: p.stat().st_mtime_ns)


async def test_a_rollouts_log_replays_and_a_changed_decision_is_caught(
    tmp_path, capsys, monkeypatch
):
    logs = await rolled_out(tmp_path)
    assert len(logs) == 3
    for log in logs:
        assert main(["replay-log", str(log)]) == 0
        assert "caused the same" in capsys.readouterr().out
    # Chunks of half the size, whatever the order in which the engines reported.
    cut = scheduler.chunk_tokens
    monkeypatch.setattr(
        scheduler, "chunk_tokens", lambda *given: max(1, cut(*given) // 2)
    )
    assert main(["replay-log", str(logs[0])]) == 1
    assert "another decision at call" in capsys.readouterr().out


def test_a_log_needs_a_directory():
    with pytest.raises(aseer.ConfigError, match=r"log_dir=None.*logs_calls is True"):
        config_of(logs_calls=True)
