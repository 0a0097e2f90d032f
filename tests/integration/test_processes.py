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

try:
    processes.scatter(fail)
except Exception as error:
    failure = f"{type(error).__name__}: {error}"
again = processes.scatter(lambda: ["a", "b"])
print(json.dumps([everyones, share, failure, again]))
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
    assert main == [[[0] * 3, [1] * 3], 2, "ValueError: no room", "a"]
    told = "the rollout failed in the main process: ValueError: no room"
    assert other == [[], "yours", f"RolloutError: {told}", "b"]


def test_a_process_alone_needs_no_process_group() -> None:
    processes = Processes()
    assert processes.gather("mine") == ["mine"]
    assert processes.scatter(lambda: ["share"]) == "share"
