"""Nodes on a Ray cluster, with stand-ins of Ray: what is asked of it, and when."""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import Any

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError, EngineError
from aseer.integrations.settings import HostShare
from aseer.node.agent import NodeRefused
from aseer.runtime.launcher import launcher_of
from aseer.runtime.listening import listening
from aseer.transport.keys import new_keys
from tests.unit.integrations.rays import MODULE, Ray, importable
from tests.waiting import until

ADDRESS = "tcp://10.0.0.1:5557"
KEYS = new_keys()
PLACED = "aseer.integrations.ray_placed"


@pytest.fixture
def ray(monkeypatch):
    ray = Ray()
    with importable(ray, monkeypatch) as ray.module:
        yield ray


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"model": "m", "nodes": "ray"} | settings)


async def placed_by(ray: Ray, launcher: Any, tasks: asyncio.TaskGroup) -> asyncio.Task:
    """A launcher at work, once there is an actor for every node."""
    running = tasks.create_task(launcher.run(ADDRESS, KEYS))
    await until(lambda: len(ray.actors) == launcher.num_nodes)
    await until(lambda: "Ray has placed them" in launcher.state)
    return running


GPUS_8_4_0 = [{"GPU": 8.0, "CPU": 96.0}, {"GPU": 4.0, "CPU": 48.0}, {"CPU": 16.0}]


@pytest.mark.parametrize(
    ("settings", "bundles"),
    [
        ({}, [{"GPU": 8}, {"GPU": 4}]),
        ({"device": "cuda"}, [{"GPU": 8}, {"GPU": 4}]),
        ({"gpus_per_instance": 3}, [{"GPU": 6}, {"GPU": 3}]),
        ({"gpus_per_instance": 8}, [{"GPU": 8}]),
        ({"num_instances": 2}, [{"GPU": 2}, {"GPU": 2}]),
        ({"num_instances": 3, "gpus_per_instance": 2}, [{"GPU": 6}]),
        ({"min_nodes": 1}, [{"GPU": 8}]),
        ({"device": "cpu"}, [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}]),
        ({"device": "cpu", "min_nodes": 2}, [{"CPU": 1}, {"CPU": 1}]),
    ],
    ids=str,
)
def test_a_host_reserves_the_gpus_that_its_engines_take(ray, settings, bundles):
    found = ray.module.bundles_for(config(**settings), GPUS_8_4_0)
    assert found == bundles


def test_where_no_host_has_gpus_engines_run_on_cpus(ray):
    hosts = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 0.0}]
    assert ray.module.bundles_for(config(), hosts) == [{"CPU": 1}, {"CPU": 1}]


@pytest.mark.parametrize(
    ("settings", "hosts", "words"),
    [
        ({"min_nodes": 3}, GPUS_8_4_0, r"3 hosts with a GPU each .* 2 of the 3 .*8, 4"),
        (
            {"num_instances": 9},
            GPUS_8_4_0,
            "1 hosts with 9 GPUs each are wanted, and 0",
        ),
        ({"device": "cuda"}, [{"CPU": 4.0}], "with a GPU each are wanted, and 0"),
        ({}, [], "with a CPU each are wanted, and 0 of the 0"),
    ],
    ids=str,
)
def test_too_few_hosts_are_refused_with_what_there_is(ray, settings, hosts, words):
    with pytest.raises(ConfigError, match=words):
        ray.module.bundles_for(config(**settings), hosts)


def test_dead_hosts_are_not_counted(ray):
    ray.dead.append({"GPU": 8.0})
    launcher = launcher_of(config())
    assert launcher is not None
    assert launcher.num_nodes == 2


async def test_an_actor_is_kept_in_each_bundle_and_told_where_to_join(ray):
    settings = {"num_instances": 1, "gpus_per_instance": 2, "python": "/v/python"}
    launcher = launcher_of(config(**settings))
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        running.cancel()
    (group,) = ray.groups
    assert group.bundles == [{"GPU": 2}, {"GPU": 2}]
    assert group.strategy == "STRICT_SPREAD", "one a host"
    for index, actor in enumerate(ray.actors):
        assert actor.kind is ray.module.NodeActor
        assert actor.options == {
            "num_cpus": 0,
            "num_gpus": 2,
            "max_restarts": -1,
            "max_task_retries": -1,  # it serves again once it is there again
            "scheduling_strategy": (group, index),
        }
        assert actor.settings == ray.module.AgentSettings(
            controller=ADDRESS,
            keys=KEYS,
            num_instances=1,
            python="/v/python",
            log_dir=None,
        )


async def test_while_there_is_no_room_it_is_said_what_is_free(ray):
    ray.has_room = False
    launcher = launcher_of(config())
    assert launcher is not None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(launcher.run(ADDRESS, KEYS))
        await until(lambda: "no room" in launcher.state)
        assert "of 4 GPUs 1 are free" in launcher.state
        assert ray.actors == []
        ray.groups[0].has_room = True
        await until(lambda: len(ray.actors) == 2)
        running.cancel()


async def test_a_host_that_goes_before_it_is_reserved_is_not_waited_for(ray):
    ray.has_room = False
    launcher = launcher_of(config())
    assert launcher is not None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(launcher.run(ADDRESS, KEYS))
        await until(lambda: "no room" in launcher.state)
        ray.has_room = True
        ray.dead.append(ray.hosts.pop())
        await until(lambda: len(ray.actors) == 1)
        assert launcher.num_nodes == 1
        assert [group.is_removed for group in ray.groups] == [True, False]
        running.cancel()


async def test_as_many_hosts_as_were_asked_for_are_waited_for(ray):
    ray.has_room = False
    launcher = launcher_of(config(min_nodes=2))
    assert launcher is not None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(launcher.run(ADDRESS, KEYS))
        await until(lambda: "no room" in launcher.state)
        ray.dead.append(ray.hosts.pop())
        launcher.state = ""
        await until(lambda: "no room" in launcher.state)
        assert [group.is_removed for group in ray.groups] == [False]
        ray.groups[0].has_room = True
        await until(lambda: len(ray.actors) == 2)
        running.cancel()


async def test_an_agent_that_fails_is_told_of_and_one_that_ends_is_not(ray):
    launcher = launcher_of(config())
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        first, second = ray.actors
        first.ends.set_result("the engine was closed")
        await asyncio.sleep(0)
        assert launcher.failure is None
        error = RuntimeError("a trace of many lines")
        error.cause = NodeRefused("another release")  # as Ray has it
        second.ends.set_exception(error)
        await until(lambda: launcher.failure is not None)
        running.cancel()
    assert isinstance(launcher.failure, EngineError)
    assert str(launcher.failure).endswith("failed: NodeRefused: another release")


@pytest.fixture
def looks_often(ray, monkeypatch):
    monkeypatch.setattr(ray.module, "_HOSTS_INTERVAL_S", 0.0)


@pytest.mark.usefixtures("looks_often")
async def test_a_host_that_joins_later_is_taken_and_given_back(ray):
    launcher = launcher_of(config(gpus_per_instance=2))
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        ray.hosts += [{"CPU": 8}, {"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 5}]
        await until(lambda: len(ray.actors) == 3)
        late, (_, late_group) = ray.actors[-1], ray.groups
        assert late_group.bundles == [{"GPU": 4}]
        assert late_group.host == "host-4", "on none but that, whoever has room"
        assert late.options["num_gpus"] == 4
        assert late.options["scheduling_strategy"] == (late_group, 0)
        assert late.settings == ray.actors[0].settings
        late.ends.set_exception(RuntimeError("it has another release"))
        await asyncio.sleep(0.1)
        assert launcher.failure is None, "it is no reason to end an opening"
        ray.hosts.pop()
        await until(lambda: late_group.is_removed)
        assert late.was_killed
        ray.hosts.append({"CPU": 8, "GPU": 2})
        await asyncio.sleep(0.1)
        assert len(ray.actors) == 3, "ids of hosts are never used again"
        ray.hosts.append({"CPU": 8, "GPU": 2})
        await until(lambda: len(ray.actors) == 4)
        running.cancel()
    await launcher.close()
    assert all(actor.was_killed for actor in ray.actors)
    assert all(group.is_removed for group in ray.groups)
    assert launcher._take_hosts(None) == [], "of a thread that comes late"


@pytest.mark.usefixtures("looks_often")
async def test_a_host_that_comes_in_place_of_one_that_died_is_left_to_ray(ray):
    launcher = launcher_of(config())
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        ray.groups[0].is_whole = False
        ray.hosts.append({"CPU": 8, "GPU": 2})
        await asyncio.sleep(0.1)
        assert len(ray.actors) == 2
        ray.groups[0].is_whole = True
        await until(lambda: len(ray.actors) == 3)
        running.cancel()


@pytest.mark.usefixtures("looks_often")
async def test_who_wants_so_many_hosts_has_no_more(ray):
    launcher = launcher_of(config(min_nodes=2))
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        ray.hosts.append({"CPU": 8, "GPU": 2})
        await asyncio.sleep(0.1)
        assert len(ray.actors) == 2
        running.cancel()


@pytest.mark.usefixtures("looks_often")
async def test_ray_that_does_not_answer_ends_nothing(ray, monkeypatch, caplog):
    launcher = launcher_of(config())
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)

        def refuse() -> None:
            raise OSError("the cluster is gone")

        with monkeypatch.context() as patch:
            patch.setattr(ray.module, "hosts_there", refuse)
            await until(lambda: "the cluster is gone" in caplog.text)
        ray.hosts.append({"CPU": 8, "GPU": 2})
        await until(lambda: len(ray.actors) == 3)
        running.cancel()


async def test_what_ray_will_not_do_is_told_as_the_engines_error(ray, monkeypatch):
    def refuse(bundles: Any, strategy: str) -> None:
        raise OSError("the cluster is gone")

    monkeypatch.setattr(ray.module, "placement_group", refuse)
    launcher = launcher_of(config())
    assert launcher is not None
    with pytest.raises(EngineError, match="cannot start the nodes: OSError: the clus"):
        await launcher.run(ADDRESS, KEYS)
    await launcher.close()


async def test_the_end_kills_for_good_and_gives_the_gpus_back(ray):
    launcher = launcher_of(config())
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        running.cancel()
    await launcher.close()
    assert all(actor.was_killed for actor in ray.actors)
    assert ray.groups[0].is_removed


async def test_an_end_before_there_is_room_starts_nothing_later(ray):
    ray.has_room = False
    launcher = launcher_of(config())
    assert launcher is not None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(launcher.run(ADDRESS, KEYS))
        await until(lambda: ray.groups and ray.groups[0].was_asked.is_set())
        running.cancel()
    await launcher.close()
    assert ray.groups[0].is_removed
    launcher._start(None)  # of a thread that comes late
    launcher._reserve()
    assert (ray.actors, len(ray.groups)) == ([], 1)


async def test_an_end_after_rays_own_asks_it_nothing(ray, caplog):
    launcher = launcher_of(config())
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        running.cancel()
    ray.is_connected = False
    await launcher.close()
    assert not ray.groups[0].is_removed
    assert caplog.messages == []


async def test_an_agent_offers_the_gpus_that_ray_gave_it(ray, monkeypatch, tmp_path):
    offers = []

    async def run_agent(offer: Any, leave: Any) -> str:
        offers.append(offer)
        return "the engine was closed"

    monkeypatch.setattr(ray.module, "run_agent", run_agent)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    settings = ray.module.AgentSettings(
        controller=ADDRESS,
        keys=KEYS,
        num_instances=1,
        python=None,
        log_dir=tmp_path / "logs",
    )
    for ray.gpus_of_the_actor in (["2", "3"], []):
        why = await ray.module.NodeActor().serve(settings)
        assert why == "the engine was closed"
    assert [offer.machine.gpus for offer in offers] == [("2", "3"), ()]
    offer = offers[0]
    assert (offer.controller, offer.keys, offer.num_instances) == (ADDRESS, KEYS, 1)
    assert offer.needs_janitor
    assert (tmp_path / "logs").is_dir()


def test_a_process_without_ray_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ConfigError, match=r'needs Ray.*pip install "aseer\[ray\]"'):
        listening(config(), None)


def test_a_process_that_is_not_connected_is_told_what_to_do(ray):
    ray.is_connected = False
    with pytest.raises(ConfigError, match=r"not connected to Ray; call ray\.init"):
        listening(config(), None)


@pytest.mark.parametrize(
    ("settings", "address"),
    [({}, "tcp://127.0.0.1:*"), ({"listen": "tcp://127.0.0.1:5557"}, None)],
    ids=["any-port", "users"],
)
def test_without_an_address_and_a_key_there_are_some(
    ray, monkeypatch, tmp_path, settings, address
):
    monkeypatch.setattr("aseer.transport.keys.Path.home", lambda: tmp_path)
    for name in ("ASEER_KEY", "ASEER_KEY_FILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    found = listening(config(**settings), None)
    _, listened, _, keys = found.args
    assert listened == (address or settings["listen"])
    assert keys is not None
    assert keys != listening(config(**settings), None).args[3], "an engine's own"


def test_a_key_that_is_there_is_used(ray, monkeypatch):
    monkeypatch.setenv("ASEER_KEY", "a key of sixteen bytes or more")
    assert listening(config(), None).args[3] == listening(config(), None).args[3]


def test_an_address_of_ipv6_is_one_that_is_connected_to(ray):
    launcher = ray.module.RayNodes(config(), [{"CPU": 1}], "fd00::1")
    assert launcher.host == "[fd00::1]"


@pytest.fixture
def placed(ray, monkeypatch):
    monkeypatch.delitem(sys.modules, PLACED, raising=False)
    yield importlib.import_module(PLACED)
    sys.modules.pop(PLACED, None)


async def test_on_a_trainers_hosts_nothing_is_reserved_and_its_gpus_are_told(
    ray, placed
):
    placed.place_on(
        [HostShare("a", ("0", "1"), num_instances=2), HostShare("b", ("3",), 1)]
    )
    launcher = launcher_of(config(min_nodes=2))
    assert launcher is not None
    assert launcher.num_nodes == 2
    async with asyncio.TaskGroup() as tasks:
        running = await placed_by(ray, launcher, tasks)
        assert ray.groups == []
        for actor, node in zip(ray.actors, "ab", strict=True):
            assert actor.options["scheduling_strategy"] == (node, False)
            assert actor.options["num_gpus"] == actor.options["num_cpus"] == 0
        told = [actor.settings for actor in ray.actors]
        assert [(each.gpus, each.num_instances) for each in told] == [
            (("0", "1"), 2),
            (("3",), 1),
        ]
        running.cancel()
    await launcher.close()
    assert all(actor.was_killed for actor in ray.actors)
