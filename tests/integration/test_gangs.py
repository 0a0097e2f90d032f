"""Instances that span nodes live and die as a whole, and go on elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import aseer
from tests.integration.nodes import NodeProcess, Nodes, nodes_in
from tests.integration.proxy import proxy_to
from tests.integration.sims import config_of, content, groups_of
from tests.integration.test_cluster import LONG, reference, rolled_out
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(120)

SHAPES = {"w": (1000, 1000)}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_in(tmp_path) as nodes:
        yield nodes


def config(nodes: Nodes, **settings: Any) -> aseer.EngineConfig:
    """Of an engine whose instances span two nodes each."""
    defaults = {"nodes_per_instance": 2, "min_nodes": 2, "max_request_retries": 0}
    return nodes.config(**defaults | settings)


def start(nodes: Nodes, *names: str) -> dict[str, NodeProcess]:
    return {name: nodes.start(name, num_instances=1) for name in names}


def below(node: NodeProcess) -> list[psutil.Process]:
    """The processes of instances that a node has."""
    return psutil.Process(node.pid).children(recursive=True)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_two_nodes_run_what_one_machine_would_and_end_with_the_engine(nodes):
    groups = groups_of(8, **LONG)
    started = start(nodes, "one", "two")
    async with aseer.Engine(config(nodes)) as engine:
        (info,) = engine.instances
        processes = {name: below(node) for name, node in started.items()}
        assert [len(each) for each in processes.values()] == [1, 1]
        assert info.pid == processes[info.node][0].pid, "it is where its leader is"
        responses, report = await rolled_out(engine, groups)
    assert report.num_retries == 0
    assert [await node.wait() for node in started.values()] == [0, 0]
    assert all(has_ended(p) for each in processes.values() for p in each)
    assert "each of its engines spans 2 nodes" in started["one"].said
    assert content(responses) == await reference(groups)


@pytest.mark.parametrize("victim", ["leader", "follower"])
async def test_the_death_of_one_part_is_that_of_the_other_and_both_come_back(
    nodes, victim, caplog
):
    groups = groups_of(8, **LONG)
    started = start(nodes, "one", "two")
    settings = config(nodes, max_request_retries=3)
    async with aseer.Engine(settings) as engine:
        (info,) = engine.instances
        (far,) = set(started) - {info.node}
        before = {name: below(node)[0] for name, node in started.items()}
        name = info.node if victim == "leader" else far
        responses, report = await rolled_out(engine, groups, before[name].kill)
        assert report.num_retries > 0
        assert all(has_ended(process) for process in before.values())
        await until(lambda: engine.instances)
        (again,) = engine.instances
        assert again.pid != info.pid
        assert [len(below(node)) for node in started.values()] == [1, 1]
    if victim == "follower":
        assert f"its part on node {far} was killed by SIGKILL" in caplog.text
    assert content(responses) == await reference(groups)


@pytest.mark.parametrize("victim", ["leader", "follower"])
async def test_a_lost_node_ends_its_partners_part_which_goes_on_with_another_node(
    nodes, victim
):
    groups = groups_of(8, **LONG)
    started = start(nodes, "one", "two")
    # Slower than a loss is noticed: a simulated leader needs none that follows.
    args = {"weights": SHAPES, "step_s": 0.006}
    settings = config(nodes, node_timeout_s=2.0, engine_args=args, max_restarts=0)
    new = {"w": torch.rand(SHAPES["w"])}
    async with aseer.Engine(settings) as engine:
        await engine.update_weights(new)
        (info,) = engine.instances
        (far,) = set(started) - {info.node}
        lost, left = (info.node, far) if victim == "leader" else (far, info.node)
        late = start(nodes, "three")["three"]
        await until(lambda: "joined the controller" in late.said)
        before = below(started[left])
        responses, report = await rolled_out(engine, groups, started[lost].kill)
        assert report.num_retries > 0
        assert [has_ended(process) for process in before] == [True]
        (again,) = engine.instances
        assert again.node in (left, "three")
        assert [len(below(node)) for node in (started[left], late)] == [1, 1]
    local = config_of(engine_args={"weights": SHAPES})
    async with aseer.Engine(local) as engine:
        await engine.update_weights(new)
        expected, _ = await rolled_out(engine, groups)
    assert content(responses) == content(expected)


async def test_weights_go_to_all_nodes_and_those_of_old_ones_are_removed(nodes):
    started = start(nodes, "one", "two", "three")
    settings = config(nodes, min_nodes=3, engine_args={"weights": SHAPES})
    async with aseer.Engine(settings) as engine:
        folders = {
            node.name: node.join.weights_dir for node in engine._host.cluster.nodes
        }

        def held() -> dict[str, int]:
            return {
                name: len(os.listdir(folder)) if os.path.exists(folder) else 0
                for name, folder in folders.items()
            }

        for _ in range(3):
            await engine.update_weights({"w": torch.rand(SHAPES["w"])})
        (info,) = engine.instances
        (idle,) = [name for name, node in started.items() if not below(node)]
        await until(lambda: sorted(held().values()) == [0, 1, 1])
        assert held()[idle] == 0
        # The one that is left keeps them for the next gang, and no longer.
        (far,) = set(started) - {info.node, idle}
        started[far].signal(signal.SIGTERM)
        await until(lambda: below(started[idle]) and engine.instances)
        await until(lambda: held() == {info.node: 1, idle: 1, far: 0})
        await engine.update_weights({"w": torch.rand(SHAPES["w"])})
        await until(lambda: held() == {info.node: 1, idle: 1, far: 0})


@pytest.mark.slow
async def test_a_cut_between_a_node_and_the_controller_costs_only_time(nodes):
    groups = groups_of(8, **LONG)
    async with proxy_to(nodes.port) as proxy:
        nodes.start("near", num_instances=1)
        where = ("--controller", proxy.endpoint)
        far = nodes.start("far", where=where, num_instances=1)
        settings = config(nodes, node_timeout_s=4.0, engine_args={"step_s": 0.01})
        async with aseer.Engine(settings) as engine:
            loop = asyncio.get_running_loop()

            def cut_for(cut_s: float) -> None:
                proxy.cut()
                loop.call_later(cut_s, proxy.heal)

            short, report = await rolled_out(engine, groups, lambda: cut_for(0.5))
            assert report.num_retries == 0
            long, report = await rolled_out(engine, groups, lambda: cut_for(9.0))
            assert report.num_retries > 0
        assert await far.wait() == 0
    expected = await reference(groups)
    assert content(short) == content(long) == expected


async def test_why_a_part_did_not_start_is_told_with_its_node(nodes):
    started = start(nodes, "one", "two")
    settings = config(nodes, engine_args={"fail_at_start": "no such model: foo"})
    with pytest.raises(aseer.InstanceStartError) as error:
        async with aseer.Engine(settings):
            pass
    told = str(error.value)
    assert "of node one" in told
    assert "of node two" in told
    assert "no such model: foo" in told
    assert [await node.wait() for node in started.values()] == [2, 2]


async def test_too_few_nodes_wait_and_say_so(nodes, caplog):
    caplog.set_level("INFO", "aseer")
    start(nodes, "one")
    settings = config(nodes, start_timeout_s=8.0)
    with pytest.raises(aseer.EngineError, match=r"0 of min_nodes=2 nodes are up"):
        async with aseer.Engine(settings):
            pass
    assert "node one has room for more, and waits for another node" in caplog.text
