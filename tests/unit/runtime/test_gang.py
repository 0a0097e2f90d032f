"""Nodes that run one instance together: started, ended and lost as a whole."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec import structs

from aseer.errors import EngineError, InstanceStartError
from aseer.instance.base import InstanceSpec
from aseer.instance.messages import Stop
from aseer.node.machine import Launch
from aseer.node.messages import (
    TO_NODE,
    Ended,
    EndProcess,
    Fetched,
    FetchFiles,
    ForgetPeer,
    Gives,
    KillProcess,
    Locate,
    Located,
    Reach,
    Reached,
    StartProcess,
    ToPeer,
)
from aseer.node.remote import RemoteNode
from aseer.runtime.gang import Gang, GangProcess
from aseer.runtime.remote_weights import once_there
from aseer.weights.files import Index
from tests.unit.node.test_fetching import JOIN
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

PEER = b"4.1"
NOTHING: Any = None


class Far:
    """A node, and what it was told."""

    def __init__(self, name: str) -> None:
        self.told: list[Any] = []
        join = structs.replace(
            JOIN, name=name, endpoint=f"ipc://{name}", weights_dir=f"/{name}"
        )
        self.node = RemoteNode(
            join, lambda data: self.told.append(TO_NODE.decode(data))
        )
        self.launch = Launch(
            instance_id=0,
            backend="vllm",
            engine_args={"model": "m", "kv_cache_memory_bytes": len(name)},
            env={"CUDA_VISIBLE_DEVICES": name},
            share=f"GPU {name}",
            cores=(len(name),),
        )

    def says(self, message: Any) -> None:
        self.node.take(message, NOTHING, NOTHING, NOTHING)

    def specs(self) -> list[tuple[StartProcess, InstanceSpec]]:
        return [
            (each, msgspec.json.decode(each.line, type=InstanceSpec))
            for each in self.told
            if isinstance(each, StartProcess)
        ]

    def kinds(self) -> list[type]:
        return [type(each) for each in self.told]


SPEC = InstanceSpec(
    endpoint="?",
    identity=PEER.decode(),
    instance_id=4,
    backend="vllm",
    report_interval_s=1.0,
    engine_args={"model": "m", "seed": 7, "kv_cache_memory_bytes": 1},
)


@pytest.fixture
def a() -> Far:
    return Far("a")


@pytest.fixture
def bb() -> Far:
    return Far("bb")


def gang_of(*nodes: Far) -> Gang:
    return Gang([(far.node, far.launch) for far in nodes])


async def started(gang: Gang, *nodes: Far) -> GangProcess:
    """Its process, once all nodes have said where they are."""
    async with asyncio.TaskGroup() as tasks:
        line = msgspec.json.encode(SPEC)
        starting = tasks.create_task(gang.start(PEER, "instance-4", line, {}))
        for i, far in enumerate(nodes):
            await until(lambda far=far: Locate in far.kinds(), 0)
            far.says(Located(f"10.0.0.{i}", "eth0", 5000 + i))
    return starting.result()


async def test_each_node_starts_its_part_of_one_engine(a: Far, bb: Far) -> None:
    gang = gang_of(a, bb)
    assert (gang.name, gang.endpoint) == ("a", "ipc://a")
    assert gang.launch.share == "GPU a and GPU bb"
    await started(gang, a, bb)
    ((leads, leader),) = a.specs()
    ((follows, follower),) = bb.specs()
    assert (leads.peer, leads.name) == (PEER, "instance-4")
    assert (follows.peer, follows.name) == (b"4.1/1", "instance-4-rank-1")
    assert gang.log_of("instance-4") == (
        "/logs/instance-4.log on a, /logs/instance-4-rank-1.log on bb"
    )
    assert (leader.follows, follower.follows) == (False, True)
    assert (leader.endpoint, follower.endpoint) == ("ipc://a", "ipc://bb")
    assert (leader.cores, follower.cores) == ((1,), (2,))
    shared = {
        "model": "m",
        "seed": 7,
        "nnodes": 2,
        "master_addr": "10.0.0.0",
        "master_port": 5000,
        "distributed_executor_backend": "mp",
    }
    assert leader.engine_args == {**shared, "node_rank": 0, "kv_cache_memory_bytes": 1}
    assert follower.engine_args == {
        **shared,
        "node_rank": 1,
        "kv_cache_memory_bytes": 2,
    }
    assert follows.env == {
        "CUDA_VISIBLE_DEVICES": "bb",
        "VLLM_HOST_IP": "10.0.0.1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


async def test_what_is_said_to_the_instance_is_said_to_the_node_that_leads(
    a: Far, bb: Far
) -> None:
    gang = gang_of(a, bb)
    await started(gang, a, bb)
    gang.send(PEER, Stop())
    assert isinstance(a.told[-1], ToPeer)
    assert ToPeer not in bb.kinds()
    gang.forget(PEER)
    assert a.told[-1] == ForgetPeer(PEER)
    assert bb.told[-1] == ForgetPeer(b"4.1/1")


async def test_an_end_is_told_once_every_part_has_ended(a: Far, bb: Far) -> None:
    process = await started(gang_of(a, bb), a, bb)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(process.wait())
        await asyncio.sleep(0)
        bb.says(Ended(b"4.1/1", 1, log_tail="of bb", cause="no memory"))
        await until(lambda: KillProcess(PEER) in a.told, 0)
        assert not waiting.done()
        a.says(Ended(PEER, -9, log_tail="of a"))
    assert waiting.result() == 1
    assert process.part == "its part on node bb "
    assert process.cause() == "on node bb: no memory"
    assert process.log_tail() == "of bb"


async def test_a_node_that_does_not_answer_is_lost_before_the_end_is_told(
    a: Far, bb: Far
) -> None:
    gang = gang_of(a, bb)
    process = await started(gang, a, bb)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(process.wait())
        await asyncio.sleep(0)
        a.says(Ended(PEER, 1, cause="the connection broke"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        assert gang.lost_because is None
        bb.node.lose("nothing was heard of it")
    assert waiting.result() == 1
    assert gang.lost_because == "its node bb is gone: nothing was heard of it"
    assert (process.part, process.cause()) == ("", "the connection broke")


async def test_a_lost_node_takes_the_other_parts_with_it(a: Far, bb: Far) -> None:
    process = await started(gang_of(a, bb), a, bb)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(process.wait())
        await asyncio.sleep(0)
        a.node.lose("the cable")
        await until(lambda: KillProcess(b"4.1/1") in bb.told, 0)
        bb.says(Ended(b"4.1/1", -9))


@pytest.mark.parametrize("is_cut", [True, False])
async def test_nodes_of_an_engine_that_ended_are_asked_whether_they_reach_each_other(
    a: Far, bb: Far, is_cut: bool
) -> None:
    gang = gang_of(a, bb)
    a.says(Gives("tcp://10.0.0.0:1"))
    bb.says(Gives("tcp://10.0.0.1:1"))
    process = await started(gang, a, bb)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(process.wait())
        await asyncio.sleep(0)
        a.says(Ended(PEER, 1, cause="a step took 60 s"))
        await until(lambda: KillProcess(b"4.1/1") in bb.told, 0)
        # Before that process has ended: requests are sent there meanwhile.
        await until(lambda: Reach("tcp://10.0.0.1:1") in a.told, 0)
        await until(lambda: Reach("tcp://10.0.0.0:1") in bb.told, 0)
        bb.says(Ended(b"4.1/1", -9))
        a.says(Reached("tcp://10.0.0.1:1", is_reached=True))
        await asyncio.sleep(0)
        assert not waiting.done()
        bb.says(Reached("tcp://10.0.0.0:1", is_reached=not is_cut))
    assert waiting.result() == 1
    cut = "its nodes bb and a do not reach each other"
    assert gang.lost_because == (cut if is_cut else None)
    a.says(Reached("tcp://10.0.0.1:1", is_reached=False))  # nobody has asked


async def test_a_node_that_is_lost_or_cannot_say_it_cuts_nobody_off(
    a: Far, bb: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = gang_of(a, bb)
    await gang.look()
    assert gang.apart is None, "nobody has said where it listens"
    a.says(Gives("tcp://10.0.0.0:1"))
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(gang.look())
        await until(lambda: Reach("tcp://10.0.0.0:1") in bb.told, 0)
        bb.node.lose("the cable")
    assert looking.result() is None
    await gang.look()
    cc = Far("cc")
    monkeypatch.setattr("aseer.node.remote.REACH_TIMEOUT_S", 0.01)
    monkeypatch.setattr("aseer.node.remote._WORD_S", 0.01)
    silent = gang_of(a, cc)
    await silent.look()
    assert gang.apart is silent.apart is None


async def test_who_leads_gets_time_to_end_and_the_others_are_then_killed(
    a: Far, bb: Far
) -> None:
    process = await started(gang_of(a, bb), a, bb)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(process.end(5.0))
        await until(lambda: EndProcess in a.kinds(), 0)
        assert a.told[-1] == EndProcess(PEER, 5.0)
        assert EndProcess not in bb.kinds()
        a.says(Ended(PEER, 0))
        await until(lambda: EndProcess in bb.kinds(), 0)
        assert bb.told[-1] == EndProcess(b"4.1/1", 0)
        bb.says(Ended(b"4.1/1", -9))


async def test_a_node_that_is_lost_or_knows_no_address_fails_the_start(
    a: Far, bb: Far
) -> None:
    gang = gang_of(a, bb)
    line = msgspec.json.encode(SPEC)
    async with asyncio.TaskGroup() as tasks:
        starting = tasks.create_task(_error_of(gang, line))
        await asyncio.sleep(0)
        a.says(Located(error="no way"))
    assert "node a does not know its address: no way" in starting.result()
    async with asyncio.TaskGroup() as tasks:
        starting = tasks.create_task(_error_of(gang, line))
        await asyncio.sleep(0)
        a.node.lose("the cable")
    assert starting.result() == "its node a is gone: the cable"
    assert StartProcess not in [*a.kinds(), *bb.kinds()]
    a.says(Located("10.0.0.1"))  # nobody has asked


async def _error_of(gang: Gang, line: bytes) -> str:
    with pytest.raises(InstanceStartError) as error:
        await gang.start(PEER, "instance-4", line, {})
    return str(error.value)


async def test_new_weights_are_on_all_nodes_before_the_instance_is_asked(
    a: Far, bb: Far, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"0123456789")
    index = tmp_path / "index.json"
    index.write_bytes(msgspec.json.encode(Index([str(data)], [])))
    asked: list[tuple[str, ...]] = []

    def ask(*paths: str) -> asyncio.Future[Any]:
        asked.append(paths)
        answered = asyncio.get_running_loop().create_future()
        answered.set_result(None)
        return answered

    def outcome() -> asyncio.Future[Any]:
        return once_there(gang_of(a, bb).supplies, str(index), ask)

    waiting = outcome()
    assert [far.kinds() for far in (a, bb)] == [[FetchFiles], [FetchFiles]]
    bb.says(Fetched("1"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert asked == []
    a.says(Fetched("1"))
    await waiting
    assert asked == [("/a/1/index.json", "/bb/1/index.json")]
    bb.node.weights.drop(str(index))
    waiting = outcome()
    bb.says(Fetched("2", "no room"))
    with pytest.raises(EngineError, match="no room"):
        await waiting
    assert len(asked) == 1
