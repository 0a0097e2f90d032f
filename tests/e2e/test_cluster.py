"""I2 over hosts: what moves between them, or outlives one, is what plain vLLM samples.

The trainer's host has one engine and a node on another host has the other. The hosts
are namespaces of this machine, with a network between them and no shared memory. Every
engine has a core of its own, as the reference has: how many threads share a sum decides
its last bits.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from aseer.node.leftovers import sweep
from tests.e2e import tiny
from tests.e2e.cluster_trainer import NAMES
from tests.e2e.pair.test_exactness import CASES, PROMPTS, plain_vllm
from tests.e2e.tiny import IS_BITWISE, tiny_model
from tests.integration.hosts import hosts
from tests.integration.nodes import TrainerProcess, nodes_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.hosts import Namespace

# Three engines start, whose processes take minutes to import vLLM on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ADDRESS = "tcp://10.77.0.1:5557"
# Logprobs of what a chunk that ended anywhere left, whose KV is computed in one step.
ROUNDING = 1e-5


class Cluster:
    """The trainer's host and another, each with an engine."""

    def __init__(self, trainer: TrainerProcess, far: Namespace) -> None:
        self.trainer = trainer
        self.far = far


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one undivided run of vLLM generates, by request."""
    with plain_vllm(tmp_path_factory.mktemp("reference")) as generate:
        results = generate([(p, dict(CASES[n])) for n in NAMES for p in PROMPTS])
    groups = [f"{name}-{i}" for name in NAMES for i in range(len(PROMPTS))]
    by_group = zip(groups, results, strict=True)
    return {f"{group}/{k}": result for group, result in by_group for k in range(2)}


@pytest.fixture(scope="module")
def cluster(
    expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    del expected  # the reference has ended before these engines start
    first, *_, last = *sorted(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    with hosts(2) as there, nodes_in(tmp_path_factory.mktemp("nodes")) as nodes:
        trainer = TrainerProcess(
            "tests.e2e.cluster_trainer",
            (*there[1].prefix, "taskset", "-c", str(first)),
            model=str(tiny_model()),
            num_instances=1,
            chunk_size=32,
            listen=ADDRESS,
            min_nodes=1,
            node_timeout_s=4.0,
            start_timeout_s=900.0,
            max_request_retries=0,  # a lost node counts against no request
        )
        try:
            nodes.start(
                "far",
                where=("--controller", ADDRESS),
                prefix=(*there[2].prefix, "taskset", "-c", str(last)),
                num_instances=1,
            )
            trainer.until_open()
            yield Cluster(trainer, there[2])
        finally:
            trainer.kill()
            nodes.end()
            sweep()  # as the next that starts on a host whose power went


def matches(found: Any, expected: dict[str, Any], rounding: float) -> None:
    assert found["error"] is None
    for name in ("token_ids", "text", "finish_reason"):
        assert found[name] == expected[name]
    if rounding or not IS_BITWISE:
        near = pytest.approx(expected["logprobs"], abs=rounding or tiny.ROUNDING)
        assert found["logprobs"] == near
    else:
        assert found["logprobs"] == expected["logprobs"], "bit for bit"


def test_divided_and_migrating_between_hosts_equals_plain_vllm(cluster, expected):
    found = cluster.trainer.roll()
    assert found["nodes"] == ["", "far"]
    assert found["num_migrations"] > 20
    assert (found["num_retries"], found["num_preemptions"]) == (0, 0)
    assert found["responses"].keys() == expected.keys()
    for request_id, response in found["responses"].items():
        matches(response, expected[request_id], 0.0)


def test_requests_that_outlive_a_host_equal_plain_vllm(cluster, expected):
    found = cluster.trainer.roll(cluster.far.kill)
    assert found["nodes"] == ["", "far"]
    assert found["num_retries"] > 0
    assert found["responses"].keys() == expected.keys()
    for request_id, response in found["responses"].items():
        matches(response, expected[request_id], ROUNDING)
    assert cluster.trainer.close() == 0
