"""A real engine whose two ranks are on two hosts: what it computes, and its deaths.

The hosts are namespaces of this machine, with a network between them and no shared
memory. The trainer is on a host of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.models.tiny import make_tiny
from aseer.node.leftovers import sweep
from tests.e2e.gang_trainer import groups
from tests.e2e.tiny import tiny_config, tiny_model
from tests.integration.hosts import hosts
from tests.integration.nodes import TrainerProcess, nodes_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.hosts import Hosts
    from tests.integration.nodes import NodeProcess

# Five engines start, one after the other, of five processes each but for the first.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ADDRESS = "tcp://10.77.0.1:5557"
# Sums over two ranks are rounded in another order than those of one.
ROUNDING = 1e-4

Responses = dict[str, Any]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other weights."""
    directory = tmp_path_factory.mktemp("other")
    make_tiny(directory, seed=3)
    return directory


@pytest.fixture(scope="module")
def expected(other: Path) -> dict[str, Responses]:
    """What an engine of one rank generates, by the weights."""
    with aseer.Engine(tiny_config(num_instances=1, chunk_size=0)) as engine:

        def generated() -> Responses:
            return {
                r.request_id: (r.token_ids, r.logprobs)
                for r in engine.rollout_sync(groups())
            }

        first = generated()
        engine.update_weights_sync(other)
        return {"first": first, "other": generated()}


class Cluster:
    """The trainer's host, and three others, of which an engine takes two."""

    def __init__(
        self, trainer: TrainerProcess, there: Hosts, nodes: dict[str, NodeProcess]
    ) -> None:
        self.trainer = trainer
        self.nodes = nodes
        self._numbers = {name: number for number, name in enumerate(nodes, 2)}
        self._hosts = there

    def command_lines(self, name: str) -> list[str]:
        """Of the processes of engines on a node's host."""
        found = subprocess.run(
            [*self._hosts[self._numbers[name]].prefix, "ps", "-eo", "pid=,args="],
            capture_output=True,
            text=True,
            check=True,
        )
        ours = ("aseer.instance.main", "VLLM::", "multiprocessing")
        lines = found.stdout.splitlines()
        alive = [line for line in lines if "<defunct>" not in line]
        return [line for line in alive if any(word in line for word in ours)]

    def kill(self, name: str) -> None:
        """As if the power of a node's host went."""
        self._hosts[self._numbers[name]].kill()

    def part(self, *names: str) -> None:
        """What these nodes send each other is gone, and nobody is told."""
        self._hosts.part(*(self._numbers[name] for name in names))

    def join(self, *names: str) -> None:
        """They reach each other again."""
        self._hosts.join(*(self._numbers[name] for name in names))

    def signal(self, name: str, pid: int) -> None:
        """Kill a process of a node's host, by its id there."""
        self._hosts[self._numbers[name]].run(f"kill -KILL {pid}")


@pytest.fixture(scope="module")
def cluster(
    expected: dict[str, Responses], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    del expected  # the reference has ended before these engines start
    cores = sorted(os.sched_getaffinity(0))
    with hosts(4) as there, nodes_in(tmp_path_factory.mktemp("nodes")) as nodes:
        trainer = TrainerProcess(
            "tests.e2e.gang_trainer",
            there[1].prefix,
            model=str(tiny_model()),
            nodes_per_instance=2,
            min_nodes=3,
            listen=ADDRESS,
            chunk_size=64,
            node_timeout_s=6.0,
            start_timeout_s=900.0,
            max_restarts=1,
            max_request_retries=0,  # a lost node counts against no request
        )
        try:
            started = {}
            for number, name in enumerate(("two", "three", "four"), 2):
                core = str(cores[number % len(cores)])
                started[name] = nodes.start(
                    name,
                    where=("--controller", ADDRESS),
                    prefix=(*there[number].prefix, "taskset", "-c", core),
                    num_instances=1,
                )
            trainer.until_open()
            yield Cluster(trainer, there, started)
        finally:
            trainer.kill()
            nodes.end()
            sweep()  # as the next that starts on a host whose power went


def matches(found: Any, expected: Responses) -> None:
    for request_id, (tokens, logprobs, error) in found["responses"].items():
        assert error is None
        expected_tokens, expected_logprobs = expected[request_id]
        assert tokens == expected_tokens, request_id
        assert logprobs == pytest.approx(expected_logprobs, abs=ROUNDING)
    assert found["responses"].keys() == expected.keys() - {"early/0"}


def test_two_ranks_on_two_hosts_generate_what_one_does(cluster, expected):
    found = cluster.trainer.roll()
    assert len(found["instances"]) == 1
    busy = [name for name in cluster.nodes if cluster.command_lines(name)]
    assert len(busy) == 2
    assert found["num_retries"] == 0
    matches(found, expected["first"])


def test_new_weights_reach_both_ranks(cluster, expected, other):
    assert cluster.trainer.tell(str(other)) == "updated"
    matches(cluster.trainer.roll(), expected["other"])


def test_nodes_cut_off_from_each_other_end_their_engine_which_goes_on_with_another(
    cluster, expected
):
    """A step that waits for the other rank ends by vLLM's limit of 60 s."""
    (idle,) = [name for name in cluster.nodes if not cluster.command_lines(name)]
    pair = set(cluster.nodes) - {idle}
    began_s = time.monotonic()
    found = cluster.trainer.roll(lambda: cluster.part(*pair))
    sys.stderr.write(f"a cut of two nodes: {time.monotonic() - began_s:.0f} s\n")
    assert found["num_retries"] > 0
    matches(found, expected["other"])
    busy = [name for name in cluster.nodes if cluster.command_lines(name)]
    assert len(busy) == 2
    assert idle in busy
    assert all(cluster.nodes[name].is_running for name in pair), "none was let go"
    cluster.join(*pair)


def test_a_lost_host_ends_the_engine_which_goes_on_with_another(cluster, expected):
    (idle,) = [name for name in cluster.nodes if not cluster.command_lines(name)]
    ((leader, _),) = cluster.trainer.roll()["instances"]
    (far,) = set(cluster.nodes) - {leader, idle}
    before = cluster.command_lines(leader)
    found = cluster.trainer.roll(lambda: cluster.kill(far))
    assert found["num_retries"] > 0
    matches(found, expected["other"])
    ((again, _),) = found["instances"]
    assert again in (leader, idle)
    assert not set(before) & set(cluster.command_lines(leader))
    assert cluster.command_lines(idle)


def test_a_leader_that_dies_leaves_no_follower_behind(cluster, expected):
    ((leader, pid),) = cluster.trainer.roll()["instances"]
    alive = [name for name in cluster.nodes if cluster.nodes[name].is_running]
    (far,) = [name for name in alive if name != leader]
    before = set(cluster.command_lines(far))
    cluster.signal(leader, pid)
    until(lambda: not before & set(cluster.command_lines(far)))
    found = cluster.trainer.roll()
    assert cluster.command_lines(far), "it was started again on the same nodes"
    matches(found, expected["other"])
    assert cluster.trainer.close() == 0
    until(lambda: not any(cluster.command_lines(name) for name in alive))


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.5)
