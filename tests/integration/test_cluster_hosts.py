"""A cluster of hosts with a network between them that fails, and no shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from tests.integration.cluster_trainer import GROUPS, LONG, digest
from tests.integration.hosts import Hosts, hosts
from tests.integration.nodes import KEY, Nodes, nodes_in
from tests.integration.sims import config_of, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.hosts import Namespace

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "tcp://10.77.0.1:5557"
TIMEOUT_S = 4.0


class Trainer:
    """`cluster_trainer` on a host."""

    def __init__(self, host: Namespace, **settings: Any) -> None:
        ours = {"num_instances": 1, "listen": ADDRESS, "node_timeout_s": TIMEOUT_S}
        self._process = subprocess.Popen(
            [
                *host.prefix,
                *(sys.executable, "-m", "tests.integration.cluster_trainer"),
                json.dumps(ours | settings),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "ASEER_KEY": KEY},
        )

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def until_open(self) -> None:
        assert self._hear() == "open"

    def roll(self, in_the_middle: Callable[[], object] = lambda: None) -> Any:
        """One rollout; something happens while it runs."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        assert self._hear() == "first"
        in_the_middle()
        return json.loads(self._hear())

    def close(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_in(tmp_path) as nodes:
        yield nodes


def start(nodes: Nodes, host: Namespace) -> Any:
    where = ("--controller", ADDRESS)
    return nodes.start(host.name, where=where, prefix=host.prefix, num_instances=1)


def test_cuts_a_lost_host_and_a_late_one_cost_no_response(nodes: Nodes) -> None:
    with hosts(4) as there:
        first, second = start(nodes, there[2]), start(nodes, there[3])
        trainer = Trainer(there[1], min_nodes=2)
        try:
            trainer.until_open()
            _fail_in_turn(trainer, there, lambda: start(nodes, there[4]))
            assert trainer.close() == 0
            assert first._process.wait(30) == 0
            assert second.said
            for number in (1, 2, 4):
                _assert_is_empty(there[number])
        finally:
            trainer.kill()
            nodes.end()


def _fail_in_turn(trainer: Trainer, there: Hosts, join: Callable[[], object]) -> None:
    def cut_for(number: int, cut_s: float) -> None:
        there.cut(number)
        time.sleep(cut_s)
        there.heal(number)

    whole = trainer.roll()
    assert whole["nodes"] == ["", "node2", "node3"]
    assert (whole["num_responses"], whole["num_retries"]) == (4 * GROUPS, 0)
    short = trainer.roll(lambda: cut_for(2, 1.5))
    assert short["num_retries"] == 0
    long = trainer.roll(lambda: there.cut(2))
    assert long["num_retries"] > 0
    assert long["nodes"] == ["", "node3"]
    there.heal(2)
    late = trainer.roll(join)
    deadline = time.monotonic() + 60
    while late["nodes"] != ["", "node2", "node3", "node4"]:
        assert time.monotonic() < deadline
        late = trainer.roll()
    killed = trainer.roll(there[3].kill)
    assert killed["num_retries"] > 0
    assert killed["nodes"] == ["", "node2", "node4"]
    with aseer.Engine(config_of(chunk_size=0)) as engine:
        expected = digest(list(engine.rollout_sync(groups_of(GROUPS, **LONG))))
    digests = {each["digest"] for each in (whole, short, long, late, killed)}
    assert digests == {expected}


def _assert_is_empty(host: Namespace) -> None:
    """Nothing of ours runs there any more, or lies in its shared memory."""
    listed = subprocess.run(
        [*host.prefix, "sh", "-c", "ls /dev/shm; ps -eo args="],
        capture_output=True,
        text=True,
        check=True,
    )
    left = [line for line in listed.stdout.splitlines() if "aseer" in line]
    assert left == []
