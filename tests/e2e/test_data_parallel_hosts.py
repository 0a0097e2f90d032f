"""Real engines that share out a model's experts, each on a host of its own.

The hosts are namespaces of this machine, as in `test_gangs.py`; what the engines
compute there, and that they begin and end together, as in `test_data_parallel.py`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.node.leftovers import sweep
from tests.e2e.families import family_model
from tests.e2e.gang_trainer import groups
from tests.e2e.test_data_parallel import FAMILY, ROUNDING
from tests.e2e.test_gangs import ADDRESS, Cluster, until
from tests.e2e.tiny import tiny_config
from tests.integration.hosts import hosts
from tests.integration.nodes import TrainerProcess, nodes_in

if TYPE_CHECKING:
    from collections.abc import Iterator

# Nine starts of vLLM on two cores: a reference, and four times an engine on each of two
# hosts.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

Responses = dict[str, Any]


@pytest.fixture(scope="module")
def expected() -> dict[int, Responses]:
    """What one engine with all experts generates, by the weights' seed."""
    config = tiny_config(model=family_model(FAMILY), num_instances=1, chunk_size=0)
    found = {}
    with aseer.Engine(config) as engine:
        for seed in (0, 1):
            engine.update_weights_sync(family_model(FAMILY, seed))
            found[seed] = {
                r.request_id: (r.token_ids, r.logprobs)
                for r in engine.rollout_sync(groups())
            }
    return found


@pytest.fixture(scope="module")
def cluster(
    expected: dict[int, Responses], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    del expected  # the reference has ended before these engines start
    cores = sorted(os.sched_getaffinity(0))
    with hosts(4) as there, nodes_in(tmp_path_factory.mktemp("nodes")) as nodes:
        trainer = TrainerProcess(
            "tests.e2e.experts_trainer",
            there[1].prefix,
            model=str(family_model(FAMILY)),
            num_instances=0,
            data_parallel_size=2,
            min_nodes=2,
            listen=ADDRESS,
            max_num_seqs=4,
            chunk_size=64,
            node_timeout_s=6.0,
            start_timeout_s=900.0,
            max_restarts=1,
            engine_args={
                "enable_expert_parallel": True,
                "worker_extension_cls": "tests.e2e.expert_parallel.Extension",
            },
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


def test_two_engines_on_two_hosts_generate_what_one_does(cluster, expected):
    found = cluster.trainer.roll()
    names = {name for name, _ in found["instances"]}
    assert len(names) == len(found["instances"]) == 2
    for name in names:
        assert any("EngineCore_DP" in line for line in cluster.command_lines(name))
    matches(found, expected[0])


def test_new_weights_reach_the_experts_of_both_hosts(cluster, expected):
    assert cluster.trainer.tell(str(family_model(FAMILY, 1))) == "updated"
    matches(cluster.trainer.roll(), expected[1])


def test_the_death_of_one_is_that_of_the_other_on_the_other_host(cluster, expected):
    before = dict(cluster.trainer.roll()["instances"])
    victim = min(before)
    found = cluster.trainer.roll(lambda: cluster.signal(victim, before[victim]))
    assert found["num_retries"] > 0
    matches(found, expected[1])
    again = cluster.trainer.roll()
    after = dict(again["instances"])
    assert after.keys() == before.keys()
    assert not set(after.items()) & set(before.items())
    matches(again, expected[1])


def test_a_lost_host_ends_both_engines_and_a_third_host_takes_its_place(
    cluster, expected
):
    names = {name for name, _ in cluster.trainer.roll()["instances"]}
    lost, kept = sorted(names)
    (idle,) = set(cluster.nodes) - names
    before = cluster.command_lines(kept)
    found = cluster.trainer.roll(lambda: cluster.kill(lost))
    assert found["num_retries"] > 0
    matches(found, expected[1])
    after = cluster.trainer.roll()
    assert {name for name, _ in after["instances"]} == {kept, idle}
    assert not set(before) & set(cluster.command_lines(kept))
    matches(after, expected[1])
    assert cluster.trainer.close() == 0
    until(lambda: not any(cluster.command_lines(name) for name in (kept, idle)))
