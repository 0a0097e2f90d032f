"""Instances that compute together live and die as one, on one host and on several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import pytest

import aseer
from tests.integration.nodes import NodeProcess, Nodes, nodes_in
from tests.integration.sims import config_of, content, groups_of
from tests.integration.test_cluster import LONG, reference, rolled_out
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_in(tmp_path) as nodes:
        yield nodes


def config(nodes: Nodes, **settings: Any) -> aseer.EngineConfig:
    """Of an engine whose instances are one pair, on nodes."""
    defaults = {"data_parallel_size": 2, "min_nodes": 2, "num_instances": 0}
    return nodes.config(**defaults | settings)


def start(nodes: Nodes, *names: str) -> dict[str, NodeProcess]:
    return {name: nodes.start(name, num_instances=1) for name in names}


def below(node: NodeProcess) -> list[psutil.Process]:
    """The processes of instances that a node has."""
    return psutil.Process(node.pid).children(recursive=True)


async def test_on_one_host_a_death_takes_its_pair_and_costs_no_response() -> None:
    groups = groups_of(12, **LONG)
    settings = config_of(num_instances=4, data_parallel_size=2, max_restarts=1)
    async with aseer.Engine(settings) as engine:
        pids = {info.instance_id: info.pid for info in engine.instances}
        victim = psutil.Process(pids[1])
        responses, report = await rolled_out(engine, groups, victim.kill)
        assert report.num_retries > 0
        await until(lambda: len(engine.instances) == 4)
        again = {info.instance_id: info.pid for info in engine.instances}
    changed = {i for i in pids if pids[i] != again[i]}
    assert changed == {0, 1}
    assert content(responses) == await reference(groups)


async def test_one_pair_over_two_nodes_ends_with_the_engine(nodes) -> None:
    groups = groups_of(8, **LONG)
    started = start(nodes, "one", "two")
    async with aseer.Engine(config(nodes)) as engine:
        assert {info.node for info in engine.instances} == {"one", "two"}
        responses, _ = await rolled_out(engine, groups)
    both = {i for response in responses for i in response.metrics.instances}
    assert len(both) == 2
    assert [await node.wait() for node in started.values()] == [0, 0]
    assert content(responses) == await reference(groups)


async def test_the_death_of_one_is_that_of_the_other_on_another_node(nodes) -> None:
    groups = groups_of(8, **LONG)
    started = start(nodes, "one", "two")
    async with aseer.Engine(config(nodes, max_restarts=1)) as engine:
        before = {name: below(node)[0] for name, node in started.items()}
        responses, report = await rolled_out(engine, groups, before["two"].kill)
        assert report.num_retries > 0
        await until(lambda: len(engine.instances) == 2)
        after = {info.node: info.pid for info in engine.instances}
        assert all(after[name] != process.pid for name, process in before.items())
    assert content(responses) == await reference(groups)


async def test_a_lost_node_ends_the_pair_which_forms_anew_with_another(nodes) -> None:
    groups = groups_of(8, **LONG)
    started = start(nodes, "one", "two")
    settings = config(nodes, node_timeout_s=2.0, max_restarts=0)
    async with aseer.Engine(settings) as engine:
        before = below(started["one"])
        start(nodes, "three")
        responses, report = await rolled_out(engine, groups, started["two"].kill)
        assert report.num_retries > 0
        names = {"one", "three"}
        await until(lambda: {info.node for info in engine.instances} == names)
        assert before != below(started["one"])
    assert content(responses) == await reference(groups)


async def test_a_node_alone_waits_for_another(nodes, caplog) -> None:
    caplog.set_level("INFO", "aseer")
    start(nodes, "one")
    settings = config(nodes, min_nodes=1, start_timeout_s=8.0)
    with pytest.raises(aseer.EngineError, match="0 of min_nodes=1 nodes are up"):
        async with aseer.Engine(settings):
            pass
    assert "data_parallel_size=2 instances run together" in caplog.text
