"""What verl's processes do, with stand-ins for verl and Ray: who sends, who waits."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aseer.errors import ConfigError, WeightUpdateError
from tests.unit.integrations.actors import Actor, Call
from tests.unit.integrations.test_verl_settings import model_of, rollout_of


class Server(Actor):
    """As verl's workers see it."""

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__("wake_up", "sleep", refuses=refuses)


class RolloutReplica:
    def __init__(self, replica_rank: int, config: Any, model_config: Any) -> None:
        self.replica_rank, self.config, self.model_config = (
            replica_rank,
            config,
            model_config,
        )
        self.max_concurrency = 1016

    async def init_hybrid(self, worker_group: Any) -> None:
        await self.launch_servers()  # type: ignore[attr-defined]


class Worker:
    """A trainer's process, on a node with a GPU."""

    def __init__(self, node: str, gpu: str) -> None:
        self.__ray_call__ = Call(lambda _: (node, gpu))


@pytest.fixture
def world(monkeypatch):
    pytest.importorskip("torch")
    """The module as verl's processes have it, and what stands for the rest."""
    state = SimpleNamespace(rank=0, server=Server(), actors={}, registered={})

    class Remote:
        def __init__(self, cls: type) -> None:
            self.cls = cls

        def options(self, **options: Any) -> Any:
            def remote(settings: Any) -> Server:
                state.actors.setdefault(options["name"], (options, settings))
                return state.server

            return SimpleNamespace(remote=remote)

    names: dict[str, dict[str, Any]] = {
        "ray": {"remote": Remote, "get_actor": lambda name: state.server},
        "ray.util": {},
        "ray.util.scheduling_strategies": {
            "NodeAffinitySchedulingStrategy": lambda node, soft: node
        },
        "verl": {},
        "verl.utils": {},
        "verl.utils.device": {"get_device_name": lambda: "cuda"},
        "verl.workers": {},
        "verl.workers.rollout": {},
        "verl.workers.rollout.base": {"_ROLLOUT_REGISTRY": {}, "BaseRollout": object},
        "verl.workers.rollout.replica": {
            "RolloutReplica": RolloutReplica,
            "RolloutReplicaRegistry": SimpleNamespace(
                register=state.registered.__setitem__
            ),
        },
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "aseer.integrations.verl", raising=False)
    module = importlib.import_module("aseer.integrations.verl")
    dist = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: state.rank)
    monkeypatch.setattr(module, "dist", dist)
    state.module = module
    state.fqdn = names["verl.workers.rollout.base"]["_ROLLOUT_REGISTRY"]
    yield state
    sys.modules.pop("aseer.integrations.verl", None)


def pairs(taken: list[str]) -> Any:
    for name in ("a", "b", "c"):
        taken.append(name)
        yield name, object()


async def async_pairs(taken: list[str]) -> Any:
    for pair in pairs(taken):
        yield pair


def test_importing_it_registers_the_name(world):
    assert world.fqdn == {("aseer", "async"): "aseer.integrations.verl.AseerRollout"}
    assert world.registered["aseer"]() is world.module.AseerReplica


@pytest.mark.parametrize("source", [pairs, async_pairs])
async def test_one_rank_sends_and_the_others_gather_with_it(world, source):
    for rank in (0, 1):
        world.rank, taken = rank, []
        await world.module.AseerRollout().update_weights(source(taken), global_steps=3)
        assert taken == ["a", "b", "c"]
    assert world.server.target.sent == ["a", "b", "c"]
    assert world.server.told == [("finish_update", world.server.target, 3)]


@pytest.mark.parametrize("source", [pairs, async_pairs])
async def test_a_rank_that_cannot_send_goes_on_gathering(world, source):
    """The others wait in a collective otherwise."""
    world.server = Server(refuses=True)
    taken: list[str] = []
    with pytest.raises(WeightUpdateError, match="no such tensor"):
        await world.module.AseerRollout().update_weights(source(taken))
    assert taken == ["a", "b", "c"]
    assert world.server.told == [("abandon_update", world.server.target)]


async def test_adapters_and_differences_are_refused(world):
    rollout = world.module.AseerRollout()
    with pytest.raises(ConfigError, match=r"not adapters.*merge=True"):
        await rollout.update_weights(iter([]), peft_config={"r": 8})
    with pytest.raises(ConfigError, match="not 'delta_flush'"):
        await rollout.update_weights(iter([]), wire_format="delta_flush")


async def test_memory_is_asked_for_by_one_rank(world):
    for world.rank in (0, 1):
        rollout = world.module.AseerRollout()
        await rollout.resume(["weights"])
        await rollout.resume(["kv_cache"])
        await rollout.release()
    assert world.server.told == [
        ("wake_up", ["weights"]),
        ("wake_up", ["kv_cache"]),
        ("sleep",),
    ]


async def test_all_replicas_share_one_server_with_all_gpus(world):
    workers = [Worker("node", str(rank)) for rank in range(4)]
    group = SimpleNamespace(workers=workers)
    for number in range(2):
        replica = world.module.AseerReplica(number, rollout_of(), model_of())
        await replica.init_hybrid(group)
        assert replica.servers == [world.server]
        assert replica._server_address == f"aseer:{number}"
    (options, settings) = world.actors.pop("aseer_server")
    assert world.actors == {}
    assert options["get_if_exists"]
    assert options["max_concurrency"] > 8 * 1024, "more than a step's requests"
    assert options["scheduling_strategy"] == "node"
    assert settings.engine["gpus"] == ["0", "1", "2", "3"]
    assert settings.engine["num_instances"] == 2


async def test_on_two_hosts_the_server_is_the_senders(world):
    workers = [Worker(node, gpu) for node in ("node", "other") for gpu in "01"]
    replica = world.module.AseerReplica(0, rollout_of(), model_of())
    await replica.init_hybrid(SimpleNamespace(workers=workers))
    (options, settings) = world.actors["aseer_server"]
    assert options["scheduling_strategy"] == "node"
    hosts = [(host.node_id, host.gpus) for host in settings.hosts]
    assert hosts == [("node", ("0", "1")), ("other", ("0", "1"))]


async def test_other_uses_of_replicas_are_refused(world):
    replica = world.module.AseerReplica(0, rollout_of(), model_of())
    with pytest.raises(ConfigError, match="separate_async"):
        await replica.init_standalone()
    with pytest.raises(ConfigError, match="reward and teacher"):
        await replica.init_colocated(None)
