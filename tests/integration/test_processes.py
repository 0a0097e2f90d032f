"""What a trainer's processes tell each other, over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from aseer.integrations.processes import Processes

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torch")

NUM_PROCESSES = 2
DEADLINE_S = 60
PEER = """
import json, os
import torch.distributed as dist
from aseer.integrations.processes import Processes

dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"],
                        rank=int(os.environ["NUMBER"]), world_size=2)
processes = Processes()
everyones = processes.gather([dist.get_rank()] * 3)
share = processes.scatter(lambda: [len(everyones), "yours"])

def fail():
    raise ValueError("no room")

def leave():
    raise KeyboardInterrupt

def unsendable(number=dist.get_rank()):
    return lambda: None

def failure_of(call, argument):
    try:
        call(argument)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

failures = [
    failure_of(processes.scatter, fail),
    failure_of(processes.scatter, leave),
    failure_of(processes.scatter, lambda: ["mine", unsendable()]),
    failure_of(processes.scatter, lambda: ["mine"]),
    failure_of(processes.gather, unsendable() if dist.get_rank() else "mine"),
]
again = processes.scatter(lambda: ["a", "b"])
print(json.dumps([everyones, share, failures, again]))
dist.destroy_process_group()
"""


def run_peers(directory: Path) -> list[Any]:
    """What each process printed."""
    env = {**os.environ, "STORE": str(directory / "store")}
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", PEER],
            env={**env, "NUMBER": f"{number}"},
            stdout=subprocess.PIPE,
        )
        for number in range(NUM_PROCESSES)
    ]
    try:
        return [json.loads(peer.communicate(timeout=DEADLINE_S)[0]) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
            peer.communicate()


def test_the_main_process_gets_all_and_everyone_a_share_or_the_failure(
    tmp_path: Path,
) -> None:
    main, other = run_peers(tmp_path)
    assert main[:2] == [[[0] * 3, [1] * 3], 2]
    assert other[:2] == [[], "yours"]
    told = "RolloutError: the rollout failed in the main process: "
    for mine, theirs in zip(main[2][:4], other[2][:4], strict=True):
        assert theirs == f"{told}{mine}"
    kinds = [failure.partition(":")[0] for failure in main[2]]
    assert kinds[:2] == ["ValueError", "KeyboardInterrupt"]
    assert "pickle" in main[2][2]
    assert main[2][3] == "ValueError: 1 shares for 2 processes"
    assert "pickle" in other[2][4]
    assert main[2][4] == f"RolloutError: process 1 has nothing to send: {other[2][4]}"
    assert [main[3], other[3]] == ["a", "b"], "and go on together"


def test_a_process_alone_needs_no_process_group() -> None:
    processes = Processes()
    assert processes.gather("mine") == ["mine"]
    assert processes.scatter(lambda: ["share"]) == "share"
