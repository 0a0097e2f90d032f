"""A cluster of hosts with a network between them that fails, and no shared memory."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from tests.integration.cluster_trainer import GROUPS, LONG, digest
from tests.integration.hosts import Hosts, hosts, lossy_hosts
from tests.integration.nodes import Nodes, TrainerProcess, nodes_in
from tests.integration.sims import config_of, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.hosts import Namespace

pytestmark = pytest.mark.timeout(180)

ADDRESS = "tcp://10.77.0.1:5557"
TIMEOUT_S = 4.0


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
        trainer = TrainerProcess(
            "tests.integration.cluster_trainer",
            there[1].prefix,
            num_instances=1,
            listen=ADDRESS,
            node_timeout_s=TIMEOUT_S,
            min_nodes=2,
        )
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


def _fail_in_turn(
    trainer: TrainerProcess, there: Hosts, join: Callable[[], object]
) -> None:
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


def test_nodes_of_an_engine_that_are_cut_off_from_each_other_go_on_with_others(
    nodes: Nodes,
) -> None:
    """Both still reach the controller. A simulated engine needs nobody that follows:
    it is killed, as a real one ends by its own time-out.
    """
    with hosts(4) as there:
        started = {number: start(nodes, there[number]) for number in (2, 3, 4)}
        trainer = TrainerProcess(
            "tests.integration.cluster_trainer",
            there[1].prefix,
            num_instances=0,
            nodes_per_instance=2,
            listen=ADDRESS,
            node_timeout_s=TIMEOUT_S,
            min_nodes=3,
            max_restarts=0,
            max_request_retries=0,
            # Slower than a loss is noticed.
            engine_args={"step_s": 0.012},
        )

        def running() -> list[int]:
            return [n for n in (2, 3, 4) if instances(there[n])]

        def cut_off(*numbers: int) -> None:
            there.part(*numbers)
            leader = int(whole["nodes"][0].removeprefix("node"))
            (pid,) = instances(there[leader])
            there[leader].run(f"kill -KILL {pid}")

        def without_the_spare() -> None:
            there[spare].kill()
            time.sleep(TIMEOUT_S + 4.0)
            assert trainer.is_running
            there.join(*pair)

        try:
            trainer.until_open()
            whole = trainer.roll()
            pair = running()
            (spare,) = {2, 3, 4} - set(pair)
            elsewhere = trainer.roll(lambda: cut_off(*pair))
            assert elsewhere["num_retries"] > 0
            assert spare in running()
            assert len(running()) == 2
            again = trainer.roll(without_the_spare)
            assert again["num_retries"] > 0
            assert running() == pair
            assert trainer.close() == 0
            assert [started[n]._process.wait(30) for n in pair] == [0, 0]
        finally:
            trainer.kill()
            nodes.end()
    with aseer.Engine(config_of(chunk_size=0)) as engine:
        expected = digest(list(engine.rollout_sync(groups_of(GROUPS, **LONG))))
    assert {each["digest"] for each in (whole, elsewhere, again)} == {expected}


def test_nodes_that_never_reached_each_other_run_engines_with_others(
    nodes: Nodes,
) -> None:
    with hosts(4) as there:
        there.part(2, 3)
        started = [start(nodes, there[number]) for number in (2, 3)]
        trainer = TrainerProcess(
            "tests.integration.cluster_trainer",
            there[1].prefix,
            num_instances=0,
            nodes_per_instance=2,
            listen=ADDRESS,
            min_nodes=2,
        )
        try:
            time.sleep(8.0)  # both have joined, and start nothing
            assert not instances(there[2]) + instances(there[3])
            started.append(start(nodes, there[4]))
            trainer.until_open()
            assert len(instances(there[4])) == 1
            assert trainer.roll()["num_retries"] == 0
            assert trainer.close() == 0
            assert [node._process.wait(30) for node in started] == [0, 0, 0]
        finally:
            trainer.kill()
            nodes.end()


def instances(host: Namespace) -> list[int]:
    """Processes of instances on a host, by their ids there."""
    found = subprocess.run(
        [*host.prefix, "pgrep", "-f", "aseer.instance.main"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_cuts_between_hosts_that_lose_packets_cost_nothing(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Of every packet's two ways 1% each, 2 ms late; six cuts of a third to 5 s."""
    always = {"loss": 0.01, "delay_ms": 2.0}
    with lossy_hosts(2, tmp_path / "wire.json", **always) as there:
        node = start(nodes, there[2])
        trainer = TrainerProcess(
            "tests.integration.cluster_trainer",
            there[1].prefix,
            num_instances=1,
            listen=ADDRESS,
            node_timeout_s=25.0,
            min_nodes=1,
        )
        try:
            trainer.until_open()
            digests = set()
            for cut_s in (0.3, 1.0, 2.0, 0.5, 3.0, 5.0):

                def cut(cut_s: float = cut_s) -> None:
                    there.cut(2)
                    time.sleep(cut_s)
                    there.heal(2)

                said = trainer.roll(cut)
                assert said["nodes"] == ["", "node2"]
                assert (said["num_responses"], said["num_retries"]) == (4 * GROUPS, 0)
                digests.add(said["digest"])
            assert trainer.close() == 0
            assert node._process.wait(30) == 0
        finally:
            trainer.kill()
            nodes.end()
    with aseer.Engine(config_of(chunk_size=0)) as engine:
        expected = digest(list(engine.rollout_sync(groups_of(GROUPS, **LONG))))
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
