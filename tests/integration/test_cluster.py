"""Nodes join, leave, die and are cut off in the middle of work: nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import re
import signal
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import aseer
from aseer.dgds.client import DraftClient
from aseer.dgds.replica import Replica, RequestKey
from aseer.kv.agent import PoolAgent
from aseer.node.agent import NodeRefused, Offer, run_agent
from aseer.node.fetching import block_of
from aseer.node.interpreter import this_interpreter
from aseer.node.machine import this_machine
from aseer.node.messages import FROM_NEIGHBOUR, GetBlock, Goodbye
from aseer.node.metrics import AGENT_METRICS, values_in
from aseer.node.remote import RemoteNode
from aseer.transport.base import ConnectionLost, ConnectionRefused
from aseer.transport.keys import derive_keys
from aseer.transport.tcp import connect_tcp
from tests.integration.nodes import KEY, NodeProcess, Nodes, nodes_in
from tests.integration.own_shm import OwnShm
from tests.integration.proxy import proxy_to
from tests.integration.sims import config_of, content, groups_of
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(120)

LONG = {"n": 2, "ignore_eos": True, "max_tokens": 600}
PAGE = Path(aseer.__file__).parents[1] / "docs" / "cluster.md"
SHAPES = {"w": (1000, 1000), "v": (3,)}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_in(tmp_path) as nodes:
        yield nodes


def weights() -> dict[str, Any]:
    return {name: torch.rand(shape) for name, shape in SHAPES.items()}


async def reference(groups: list[aseer.Group]) -> dict[str, object]:
    async with aseer.Engine(config_of(chunk_size=0)) as engine:
        return content([r async for r in engine.rollout(groups)])


async def rolled_out(
    engine: aseer.Engine,
    groups: list[aseer.Group],
    in_the_middle: Callable[[], object] = lambda: None,
) -> tuple[list[aseer.Response], aseer.RolloutReport]:
    """A rollout; something happens with the first response, while others run."""
    early = groups_of(100, n=1, max_tokens=2)[99:]
    rollout = engine.rollout([*groups, *early])
    responses = []
    async for response in rollout:
        if response.group_id == "g99":
            in_the_middle()
        else:
            responses.append(response)
    assert rollout.report is not None
    return responses, rollout.report


def nodes_of(responses: list[aseer.Response], names: dict[int, str]) -> set[str]:
    return {names[i] for r in responses for i in r.metrics.instances}


def names_in(engine: aseer.Engine) -> dict[int, str]:
    return {info.instance_id: info.node for info in engine.instances}


async def test_nodes_run_what_one_machine_would_and_end_with_the_engine(nodes):
    groups = groups_of(8, **LONG)
    started = [nodes.start("one"), nodes.start("two", num_instances=1)]
    config = nodes.config(min_nodes=2, num_instances=1)
    async with aseer.Engine(config) as engine:
        names = names_in(engine)
        assert sorted(names.values()) == ["", "one", "one", "two"]
        assert engine.address == nodes.address
        responses, report = await rolled_out(engine, groups)
    assert nodes_of(responses, names) == {"", "one", "two"}
    assert report.num_retries == 0
    assert [await node.wait() for node in started] == [0, 0]
    assert all("the engine was closed" in node.said for node in started)
    assert content(responses) == await reference(groups)


async def test_a_node_starts_its_instances_beside_those_of_the_trainers_host(nodes):
    node = nodes.start("one", num_instances=1)
    settings = {"num_instances": 1, "start_timeout_s": 600.0}
    config = nodes.config(engine_args={"start_s": 600.0}, **settings)
    async with asyncio.TaskGroup() as tasks:
        opening = tasks.create_task(aseer.Engine(config).__aenter__())
        await until(lambda: "starting instance-1" in node.said)
        assert not opening.done()
        opening.cancel()


async def test_a_node_that_is_killed_costs_no_response(nodes):
    groups = groups_of(8, **LONG)
    victim, _ = nodes.start("one"), nodes.start("two")
    config = nodes.config(min_nodes=2, node_timeout_s=2.0, max_request_retries=0)
    async with aseer.Engine(config) as engine:
        below = psutil.Process(victim.pid).children(recursive=True)
        assert len(below) == 2
        responses, report = await rolled_out(engine, groups, victim.kill)
        assert report.num_retries > 0
        assert set(names_in(engine).values()) == {"two"}
        await until(lambda: not any(process.is_running() for process in below))
    assert content(responses) == await reference(groups)


async def test_a_node_that_joins_in_the_middle_gets_the_weights_and_then_work(
    nodes, monkeypatch
):
    sent = []

    def counted(wanted, path, *how):
        sent.append((path, wanted.offset))
        return block_of(wanted, path, *how)

    monkeypatch.setattr("aseer.runtime.cluster.block_of", counted)
    groups = groups_of(8, n=2, ignore_eos=True, max_tokens=1200)
    for name in ("one", "zero"):
        nodes.start(name, num_instances=1)
    engine_args = {"weights": SHAPES, "step_s": 0.005}
    config = nodes.config(min_nodes=2, engine_args=engine_args)
    async with aseer.Engine(config) as engine:
        before, _ = await rolled_out(engine, groups[:2])
        for new in (weights(), current := weights()):
            await engine.update_weights(new)
        late: list[NodeProcess] = []
        responses, _ = await rolled_out(
            engine, groups, lambda: late.append(nodes.start("two"))
        )
        names = names_in(engine)
        again, _ = await rolled_out(engine, groups)
    assert nodes_of(responses, names) == {"zero", "one", "two"}
    assert {r.weight_version for r in responses} == {2}
    # Two nodes have both updates' four blocks, and the third has the last one's. One
    # that a busy machine kept waiting may have taken what another had from here, too.
    assert len(set(sent)) == 8
    assert len(sent) <= 12
    assert content(again) == content(responses)
    assert content(before) != content(responses[: len(before)])
    local = config_of(engine_args={"weights": SHAPES})
    async with aseer.Engine(local) as engine:
        await engine.update_weights(current)
        there, _ = await rolled_out(engine, groups)
    assert content(there) == content(responses)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_node_that_is_gone_while_weights_come_refuses_nothing(
    nodes, monkeypatch, how
):
    """It counts as an instance that died: the others have the new weights."""
    started = {name: nodes.start(name, num_instances=1) for name in ("one", "two")}
    engine_args = {"weights": SHAPES}
    config = nodes.config(
        min_nodes=2, num_instances=1, engine_args=engine_args, node_timeout_s=2.0
    )
    async with aseer.Engine(config) as engine:
        victim, blocks = started["two"], []

        def block(wanted, path, *how_it_is):
            if not blocks:  # the first node fetches from here, and the next from it
                victim.signal(signal.SIGSTOP)
                asyncio.run_coroutine_threadsafe(_gone(), loop)
            blocks.append(path)
            return block_of(wanted, path, *how_it_is)

        async def _gone() -> None:
            await asyncio.sleep(0.3)
            victim.signal(how)
            victim.signal(signal.SIGCONT)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr("aseer.runtime.cluster.block_of", block)
        report = await engine.update_weights(weights())
        assert (report.version, engine.weight_version) == (1, 1)
        assert sorted(info.node for info in engine.instances) == ["", "one"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a /dev/shm of its own needs root")
async def test_a_node_that_has_no_room_for_weights_at_first_waits_for_it(
    nodes, tmp_path, caplog
):
    host = OwnShm(tmp_path / "host", 16 << 20)
    try:
        nodes.start("one", num_instances=1)
        config = nodes.config(engine_args={"weights": SHAPES}, max_restarts=0)
        async with aseer.Engine(config) as engine:
            await engine.update_weights(weights())
            host.fill()
            late = nodes.start("two", num_instances=1, prefix=host.prefix)
            await until(lambda: "No space left on device" in caplog.text)
            await asyncio.sleep(1.5)  # and again
            assert len(engine.instances) == 1
            host.empty()
            await until(lambda: len(engine.instances) == 2)
            assert {r.weight_version async for r in engine.rollout(groups_of(4))} == {1}
        assert await late.wait() == 0
    finally:
        host.close()


async def test_what_has_changed_makes_the_same_weights_on_each_node(nodes):
    """The second node has it from the first; a third, which joins later, has all."""
    rng = np.random.default_rng(1)
    numbers = (0.02 * rng.standard_normal(2_000_000, np.float32)).view(np.uint32)
    numbers = (numbers >> 16).astype(np.uint16)  # bfloat16: two make a simulated weight

    def step() -> dict[str, Any]:
        numbers[rng.random(len(numbers)) < 0.03] ^= 1
        return {"w": torch.from_numpy(numbers.view(np.float32).copy())}

    def on_each_node() -> list[bytes]:
        cluster: Any = engine._host.cluster
        folders = [Path(node.join.weights_dir) for node in cluster.nodes]
        return [path.read_bytes() for each in folders for path in each.glob("*/0")]

    started = [nodes.start("one", num_instances=1), nodes.start("two", num_instances=1)]
    args = {"weights": {"w": (1_000_000,)}}
    config = nodes.config(min_nodes=2, weights="delta", engine_args=args)
    async with aseer.Engine(config) as engine:
        await engine.update_weights(step())
        await engine.update_weights(step())
        await until(lambda: len(on_each_node()) == 2)
        assert on_each_node() == [numbers.tobytes()] * 2
        late = nodes.start("three", num_instances=1)
        await until(lambda: len(engine.instances) == 3)
        await engine.update_weights(step())
        await until(lambda: len(on_each_node()) == 3)
        assert on_each_node() == [numbers.tobytes()] * 3
        has_come = [
            re.findall(r"for which (\d+) came", n.said) for n in (*started, late)
        ]
    whole = numbers.nbytes
    assert [[int(num) < 0.03 * whole for num in each] for each in has_come] == [
        [False, True, True],
        [False, True, True],
        [False, True],
    ]


async def test_a_nodes_own_port_serves_those_with_the_key_and_no_nonsense(nodes):
    node = nodes.start("one", num_instances=1)
    config = nodes.config(engine_args={"weights": SHAPES})
    async with aseer.Engine(config) as engine:
        await engine.update_weights(weights())
        (there,) = engine._host.cluster.nodes
        address = there.weights._giver.address
        asked = GetBlock("1", 0, 0, 10)
        keys = derive_keys(KEY.encode())
        others = derive_keys(b"a key of somebody else")
        async with connect_tcp(address, b"a1", FROM_NEIGHBOUR, others) as dealer:
            with pytest.raises((ConnectionLost, ConnectionRefused, TimeoutError)):
                await asyncio.wait_for(dealer.receive(), 5.0)
        async with connect_tcp(address, b"a2", FROM_NEIGHBOUR, keys) as dealer:
            for nonsense in (Goodbye("?"), GetBlock("1" * 1000, 0, 0, 10)):
                await dealer.send(nonsense)
            await dealer.send(asked)
            block = await dealer.receive()
            assert (block.folder, block.error, len(block.data)) == ("1", "", 1 << 20)
        assert node.is_running
        responses, _ = await rolled_out(engine, groups_of(1))
        assert len(responses) == 4


async def test_a_node_that_is_told_to_end_leaves_in_order(nodes):
    groups = groups_of(8, **LONG)
    leaver, _ = nodes.start("one"), nodes.start("two")
    async with aseer.Engine(nodes.config(min_nodes=2)) as engine:
        responses, _ = await rolled_out(
            engine, groups, lambda: leaver.signal(signal.SIGTERM)
        )
        assert await leaver.wait() == 0
        assert set(names_in(engine).values()) == {"two"}
        restarts = lambda: engine._host.figures().restarts  # noqa: E731
        await until(lambda: set(restarts()) == set(names_in(engine)))
    assert "told to end" in leaver.said
    assert content(responses) == await reference(groups)


async def test_of_nodes_that_are_gone_but_the_last_nothing_is_kept(nodes):
    config = nodes.config(num_instances=1, min_nodes=0)
    async with aseer.Engine(config) as engine:
        for name in ("one", "two"):
            node = nodes.start(name, num_instances=1)
            await until(lambda: len(engine.instances) == 2)
            assert [r async for r in engine.rollout(groups_of(2))]
            node.signal(signal.SIGTERM)
            assert await node.wait() == 0
            await until(lambda: len(engine.instances) == 1)
        gc.collect()
        kept = {n.name for n in gc.get_objects() if type(n) is RemoteNode}
        assert kept <= {"two"}, "the last may be at hand until another joins"


async def test_a_node_whose_lifetime_is_over_leaves_in_order(nodes):
    groups = groups_of(8, **LONG)
    nodes.start("two")
    async with aseer.Engine(nodes.config()) as engine:
        leaver = nodes.start("one", "--lifetime", "4")
        await until(lambda: "one" in names_in(engine).values())
        found = []
        while leaver.is_running:
            responses, _ = await rolled_out(engine, groups)
            found.append(content(responses))
            assert all(r.error is None for r in responses)
        assert await leaver.wait() == 0
        assert set(names_in(engine).values()) == {"two"}
    assert "lifetime of 4 s is over" in leaver.said
    expected = await reference(groups)
    assert all(each == expected for each in found)


async def test_a_node_whose_lifetime_is_over_before_it_found_a_controller(nodes):
    node = nodes.start("one", "--lifetime", "0.5")
    assert await node.wait() == 0
    file = ("--controller-file", str(nodes.folder / "none"))
    node = nodes.start("two", "--lifetime", "0.5", where=file)
    assert await node.wait() == 0
    assert "lifetime of 0.5 s is over" in node.said


async def test_what_a_node_tells_prometheus_is_what_it_did(nodes):
    pytest.importorskip("prometheus_client")
    node = nodes.start("one", "--metrics-address", "127.0.0.1:0")
    config = nodes.config(engine_args={"weights": SHAPES})
    async with aseer.Engine(config) as engine:
        await engine.update_weights(weights())
        url = node.said.partition("figures of this node are at ")[2].split()[0]
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        await until(lambda: len(engine.instances) == 1)
        await until(lambda: len(engine.instances) == 2)

        def scrape() -> dict[str, dict[str, float]]:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return values_in(answer.read().decode())

        found = await asyncio.to_thread(scrape)
    assert found.pop("aseer_info") == {aseer.__version__: 1}
    assert found.pop("aseer_agent_shared_memory_free_bytes")[""] > 0
    size = 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert found.pop("aseer_agent_fetched_bytes_total")[""] >= size
    assert found.pop("aseer_agent_given_bytes_total")[""] == 0
    assert {name: each[""] for name, each in found.items()} == {
        "aseer_agent_joined": 1,
        "aseer_agent_sessions_total": 1,
        "aseer_agent_instances": 2,
        "aseer_agent_starts_total": 3,
        "aseer_agent_deaths_total": 1,
    }


def test_the_page_lists_every_figure_of_a_node():
    rows = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| `aseer_")
    ]
    listed = {row.split("`")[1] for row in rows}
    assert listed == {
        name + ("_total" if kind == "counter" else "")
        for name, kind, *_ in AGENT_METRICS
    }


async def test_a_short_cut_costs_nothing_and_a_long_one_only_time(nodes):
    groups = groups_of(8, **LONG)
    async with proxy_to(nodes.port) as proxy:
        nodes.start("near")
        far = nodes.start("far", where=("--controller", proxy.endpoint))
        config = nodes.config(min_nodes=2, node_timeout_s=4.0)
        async with aseer.Engine(config) as engine:
            loop = asyncio.get_running_loop()

            def cut_for(cut_s: float) -> None:
                proxy.cut()
                loop.call_later(cut_s, proxy.heal)

            short, report = await rolled_out(engine, groups, lambda: cut_for(0.5))
            assert report.num_retries == 0
            long, report = await rolled_out(engine, groups, lambda: cut_for(9.0))
            assert report.num_retries > 0
            await until(lambda: "near" in names_in(engine).values())
            await until(lambda: "far" in names_in(engine).values())
            after, report = await rolled_out(engine, groups)
            assert nodes_of(after, names_in(engine)) == {"near", "far"}
        assert await far.wait() == 0
    assert content(short) == content(long) == content(after)
    assert content(after) == await reference(groups)


async def test_when_the_last_node_is_gone_requests_wait_for_another(nodes):
    groups = groups_of(4, **LONG)
    first = nodes.start("one")
    async with aseer.Engine(nodes.config(node_timeout_s=2.0)) as engine:

        def exchange() -> None:
            first.kill()
            nodes.start("two")

        responses, _ = await rolled_out(engine, groups, exchange)
        assert set(names_in(engine).values()) == {"two"}
    assert content(responses) == await reference(groups)


async def test_if_no_other_comes_the_requests_end_as_errors(nodes):
    first = nodes.start("one", num_instances=1)
    config = nodes.config(node_timeout_s=1.0, start_timeout_s=15.0)
    async with aseer.Engine(config) as engine:
        exhaustion = engine._host._pool._supervisor._exhaustion
        exhaustion._timeout_s = 1.0
        with pytest.raises(aseer.InstanceLostError, match="no node has joined"):
            await rolled_out(engine, groups_of(4, **LONG), first.kill)
        with pytest.raises(aseer.EngineError, match="no node has joined"):
            await rolled_out(engine, groups_of(1))
        exhaustion._timeout_s = config.start_timeout_s
        nodes.start("two", num_instances=1)
        await until(lambda: engine.instances)
        responses, _ = await rolled_out(engine, groups_of(1))
        assert len(responses) == 4


async def test_a_killed_instance_of_a_node_is_started_again_there(nodes):
    groups = groups_of(8, **LONG)
    nodes.start("one")
    async with aseer.Engine(nodes.config()) as engine:
        victim = engine.instances[0].pid
        responses, report = await rolled_out(
            engine, groups, lambda: os.kill(victim, signal.SIGKILL)
        )
        assert report.num_retries > 0
        await until(lambda: len(engine.instances) == 2)
        assert victim not in [info.pid for info in engine.instances]
        assert {info.node for info in engine.instances} == {"one"}
    assert content(responses) == await reference(groups)


async def test_why_a_nodes_instance_did_not_start_is_told_at_both_ends(nodes):
    node = nodes.start("one")
    config = nodes.config(engine_args={"fail_at_start": "no such model: foo"})
    with pytest.raises(aseer.InstanceStartError) as error:
        async with aseer.Engine(config):
            pass
    told = str(error.value)
    assert "of node one" in told
    assert "RuntimeError: no such model: foo" in told
    assert "Traceback" in told, "the log's last lines"
    assert await node.wait() == 2
    assert "no such model: foo" in node.said


async def test_why_a_nodes_instance_died_is_told_with_the_place_of_its_log(nodes):
    nodes.start("one", num_instances=1)
    config = nodes.config(max_restarts=0, engine_args={"die_after_tokens": 300})
    async with aseer.Engine(config) as engine:
        engine._host._pool._supervisor._exhaustion._timeout_s = 1.0
        with pytest.raises(aseer.InstanceLostError, match="no node has joined"):
            await rolled_out(engine, groups_of(4, **LONG))


async def test_a_node_with_another_key_ends_with_words_that_help(nodes):
    stranger = nodes.start("stranger", key="a key of somebody else")
    nodes.start("one")
    async with aseer.Engine(nodes.config()) as engine:
        assert await stranger.wait() == 2
        assert set(names_in(engine).values()) == {"one"}
    assert "different keys" in stranger.said
    assert "`aseer key`" in stranger.said


def offer_to(nodes, name):
    """Of a node in this process."""
    python = this_interpreter()
    return Offer(
        controller=nodes.address,
        keys=derive_keys(KEY.encode()),
        name=name,
        machine=this_machine(python.packages),
        interpreter=python,
        num_instances=1,
        log_dir=None,
        death_timeout_s=30.0,
        make_pool=PoolAgent,
    )


async def test_a_node_leaves_though_an_instance_cannot_be_killed(
    nodes, monkeypatch, caplog
):
    leave = asyncio.Event()
    async with aseer.Engine(nodes.config(num_instances=1, min_nodes=0)) as engine:
        node = asyncio.ensure_future(run_agent(offer_to(nodes, "one"), leave))  # noqa: TID251
        await until(lambda: len(engine.instances) == 2)
        (victim,) = [info.pid for info in engine.instances if info.node == "one"]
        for name in ("kill_group", "signal_group"):
            monkeypatch.setattr(f"aseer.node.children.{name}", lambda pid: None)
        monkeypatch.setattr("aseer.node.children.LONGEST_DEATH_S", 0.3)
        os.kill(victim, signal.SIGSTOP)
        leave.set()
        async with asyncio.timeout(20):
            assert await node == "it was told to end"
    assert f"process {victim} was killed and lives on (state T" in caplog.text
    os.killpg(victim, signal.SIGKILL)
    await until(lambda: not os.path.exists(f"/proc/{victim}"))


async def test_a_node_of_another_release_is_refused_with_both_versions(
    nodes, monkeypatch
):
    nodes.start("one", num_instances=1)
    async with aseer.Engine(nodes.config()):
        monkeypatch.setattr("aseer.node.agent.__version__", "0.0.1")
        offer = offer_to(nodes, "older")
        with pytest.raises(NodeRefused) as refused:
            await run_agent(offer, asyncio.Event())
    told = str(refused.value)
    assert "node older runs aseer 0.0.1" in told
    assert f"the controller runs {aseer.__version__}" in told
    assert "install the same on both" in told


async def test_a_node_that_cannot_do_the_work_is_told_what_it_lacks(nodes, monkeypatch):
    node = nodes.start("one", num_instances=3)
    config = replace(nodes.config(start_timeout_s=6.0), device="cuda", engine_args={})
    monkeypatch.setattr("aseer.runtime.engine.read_traits", lambda *_, **__: None)
    with pytest.raises(aseer.EngineError) as error:
        async with aseer.Engine(config):
            pass
    assert await node.wait() == 2
    assert "the controller refuses this node" in node.said
    assert "3 instances of 1 GPUs need 3" in node.said
    assert "one was refused" in str(error.value)


async def test_a_node_without_a_controller_gives_up_with_a_status_to_try_again(nodes):
    node = nodes.start("one", "--death-timeout", "1")
    assert await node.wait() == 75
    assert f"there is no controller at {nodes.address}" in node.said


async def test_a_controller_without_enough_nodes_says_what_to_run(nodes):
    config = nodes.config(start_timeout_s=1.0)
    with pytest.raises(aseer.EngineError) as error:
        async with aseer.Engine(config):
            pass
    assert "0 of min_nodes=1 nodes are up" in str(error.value)
    assert f"aseer node --controller {nodes.address}" in str(error.value)


async def test_nodes_outlive_a_trainer_that_is_killed_and_serve_the_next(nodes):
    groups = groups_of(4, **LONG)
    node = nodes.start("one")
    trainer = nodes.start_trainer(node_timeout_s=2.0)
    assert trainer.stdout is not None
    loop = asyncio.get_running_loop()
    said = await loop.run_in_executor(None, trainer.stdout.readline)
    run_dir = Path(said.decode().strip())
    assert run_dir.name.startswith("aseer-")
    below = psutil.Process(node.pid).children(recursive=True)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    await until(lambda: not any(process.is_running() for process in below))
    await until(lambda: not run_dir.exists())
    async with aseer.Engine(nodes.config()) as engine:
        responses, _ = await rolled_out(engine, groups)
    assert await node.wait() == 0
    assert content(responses) == await reference(groups)


async def test_the_controllers_file_tells_nodes_where_it_is(nodes, tmp_path):
    path = tmp_path / "controller.json"
    node = nodes.start("one", where=("--controller-file", str(path)))
    async with aseer.Engine(nodes.config(controller_file=path)) as engine:
        assert len(engine.instances) == 2
    assert await node.wait() == 0
    assert not path.exists()


async def test_a_file_that_a_killed_controller_left_keeps_no_node_from_the_next(
    nodes, tmp_path
):
    path = tmp_path / "controller.json"
    path.write_text('{"address": "tcp://127.0.0.1:9"}')  # where nothing listens
    node = nodes.start("one", where=("--controller-file", str(path)))
    await until(lambda: "looking for a controller" in node.said)
    async with aseer.Engine(nodes.config(controller_file=path)) as engine:
        assert len(engine.instances) == 2
    assert await node.wait() == 0


async def test_engines_of_a_node_learn_what_siblings_elsewhere_wrote(nodes):
    """As vLLM's workers there would, by their draft clients."""
    nodes.start("one", num_instances=1)
    config = nodes.config(speculation="dgds")
    async with aseer.Engine(config) as engine:
        (node,) = engine._host.cluster.nodes
        replica, key = Replica(ttl_s=600.0), RequestKey("g", "elsewhere")
        client = DraftClient(replica, node.drafts, b"a drafter", 0.02)
        try:
            prompt, nothing = np.array([1, 2], np.int32), np.empty(0, np.int32)
            replica.begin(RequestKey("g", "here"), prompt, nothing, 0.0)
            server = engine._host._draft_server
            for start, tokens in ((0, [7, 8]), (2, [9])):
                new = np.array(tokens, np.int32).tobytes()
                server.update_cst("g", "elsewhere", start, new)
            await until(lambda: _text(replica, key) == [7, 8, 9])
        finally:
            await asyncio.to_thread(client.close)


def _text(replica: Replica, key: RequestKey) -> list[int]:
    try:
        return replica.text(key).tolist()
    except KeyError:
        return []
