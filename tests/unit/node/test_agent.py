"""A node's agent does what it is told, says how it ended, and leaves no process behind.

The session with the controller is a list of what the controller says, and processes are
futures, which end when a test says so.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from aseer.errors import InstanceStartError
from aseer.kv.agent import PoolAgent
from aseer.node.agent import NoController, NodeRefused, Offer, run_agent
from aseer.node.interpreter import Interpreter
from aseer.node.messages import (
    FROM_NODE,
    AskDrafts,
    Drafts,
    Ended,
    EndProcess,
    ForgetPeer,
    FromPeer,
    Goodbye,
    Join,
    KillProcess,
    Leave,
    NoteMemory,
    StartProcess,
    ToPeer,
    Welcome,
    encode,
)
from aseer.node.metrics import AgentFigures
from aseer.transport.base import ConnectionRefused
from aseer.transport.link import LinkFull, SessionOver
from aseer.transport.memory import MemoryRouter
from aseer.transport.session import SessionLost
from aseer.version import __version__
from tests.unit.node.test_fetching import JOIN
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

SIGKILL, SIGTERM = -9, -15
FEW = msgspec.msgpack.Decoder(dict[str, int])


class Controller:
    """The other end of the agent's sessions."""

    def __init__(self) -> None:
        self.sessions: list[FakeSession] = []
        self.heard: list[Any] = []

    @property
    def session(self) -> FakeSession:
        return self.sessions[-1]

    def say(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            self.session.coming.put_nowait(encode(message))

    def break_off(self, error: Exception) -> None:
        self.session.coming.put_nowait(error)

    async def hear(self, kind: type) -> Any:
        """The next message of a kind that was not heard before."""
        await until(lambda: any(isinstance(m, kind) for m in self.heard))
        found = next(m for m in self.heard if isinstance(m, kind))
        self.heard.remove(found)
        return found


class FakeSession:
    """See `aseer.transport.session.Session`."""

    controller: Controller

    def __init__(self, connect: Any, *, timeout_s: float, keys_are_right: bool) -> None:
        self.timeout_s = timeout_s
        self.keys_are_right = keys_are_right
        self.coming: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.closed_because: str | None = None
        self.is_full = False
        self.controller.sessions.append(self)

    def put(self, message: bytes) -> None:
        if self.is_full:
            raise LinkFull("too much waits")
        self.controller.heard.append(FROM_NODE.decode(message))

    async def run(self, on_message: Any) -> None:
        while True:
            message = await self.coming.get()
            if isinstance(message, Exception):
                raise message
            on_message(message)

    async def close(self, reason: str, timeout_s: float) -> None:
        self.closed_because = reason


class FakeProcess:
    """See `InstanceProcess`: it obeys, unless it is stubborn and is not killed."""

    def __init__(self, started: tuple[Any, ...]) -> None:
        self.name, self.line, self.env = started[:3]
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.graces: list[float] = []
        self.num_notes = 0
        self.is_stubborn = False

    async def wait(self) -> int:
        return await asyncio.shield(self.status)

    async def end(self, grace_s: float) -> None:
        self.graces.append(grace_s)
        if self.is_stubborn:
            await asyncio.wait([self.status])
        elif not self.status.done():
            self.status.set_result(SIGTERM)

    def kill(self) -> None:
        self.status.set_result(SIGKILL)

    async def note_shared_memory(self) -> None:
        self.num_notes += 1

    def log_tail(self) -> str:
        return "its last line"

    def cause(self) -> str | None:
        return "out of memory"


class Host:
    """Where the agent runs: what it started, and the sockets of its instances."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_folders = 0
        self.processes: dict[str, FakeProcess] = {}
        self.routers: list[MemoryRouter[msgspec.Raw]] = []
        self.start_error: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.figures = AgentFigures()

    def new_folder(self) -> Path:
        self.num_folders += 1
        path = self.folder / f"run-{self.num_folders}"
        path.mkdir()
        return path

    @asynccontextmanager
    async def bind(self, endpoint: str, decoder: Any) -> AsyncIterator[Any]:
        self.routers.append(MemoryRouter(decoder))
        yield self.routers[-1]

    @contextmanager
    def instance(self, peer: bytes, *, asks_drafts: bool = False) -> Iterator[Any]:
        """A dealer of the latest session's instances, or of their drafters."""
        router = self.routers[-1 if asks_drafts else -2]
        with router.connect(peer, FEW) as dealer:
            yield dealer

    async def start(self, *started: Any) -> FakeProcess:
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        process = self.processes[started[0]] = FakeProcess(started)
        return process


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    FakeSession.controller = found = Controller()
    monkeypatch.setattr("aseer.node.agent.Session", FakeSession)
    monkeypatch.setattr("aseer.node.agent._LEAVE_S", 7.0)
    monkeypatch.setattr("aseer.node.agent._LAST_WORDS_S", 3.0)
    return found


@pytest.fixture
async def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    found = Host(tmp_path)
    monkeypatch.setattr("aseer.node.agent.sweep", lambda: None)
    monkeypatch.setattr("aseer.node.agent.make_socket_dir", found.new_folder)
    monkeypatch.setattr(
        "aseer.node.agent.weights_dir_for", lambda run: run.with_suffix(".weights")
    )
    monkeypatch.setattr("aseer.node.agent.bind_router", found.bind)
    monkeypatch.setattr("aseer.node.local.InstanceProcess.start", found.start)
    return found


@asynccontextmanager
async def agent_of(
    host: Host, leave: asyncio.Event | None = None, *, outcome: type = str
) -> AsyncIterator[asyncio.Task[Any]]:
    """An agent that runs. What it returns, or raises, is what its task returns.

    Args:
        outcome: the kind of it, unless the task is cancelled.
    """
    offer = Offer(
        controller="tcp://head:5557",
        keys=None,
        name="far",
        machine=JOIN.machine,
        interpreter=Interpreter("python", {"vllm": "0.30"}, is_ours=True),
        num_instances=2,
        log_dir=None,
        death_timeout_s=600.0,
        make_pool=PoolAgent,
    )
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        running = run_agent(offer, leave or asyncio.Event(), host.figures)
        task = tasks.create_task(_settled(running))
        await until(lambda: FakeSession.controller.sessions)
        yield task
        await asyncio.wait([task])
        if not task.cancelled():
            assert isinstance(task.result(), outcome), task.result()


async def _settled(running: Any) -> Any:
    """What an agent returned or raised, so that a test may look at either."""
    try:
        return await running
    except Exception as error:
        return error


def start_of(name: str) -> StartProcess:
    return StartProcess(name.encode(), name, b"the line", {"A": "b"})


async def test_it_joins_with_what_it_has_and_keeps_the_lease_that_it_is_given(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host) as running:
        join = await controller.hear(Join)
        assert (join.version, join.name, join.num_instances) == (__version__, "far", 2)
        assert (join.machine, join.packages) == (JOIN.machine, {"vllm": "0.30"})
        assert controller.session.timeout_s == 600.0, "a controller is looked for"
        assert (host.figures.joined, host.figures.sessions) == (0, 0)
        controller.say(Welcome(12.0))
        await until(lambda: controller.session.timeout_s == 12.0)
        assert (host.figures.joined, host.figures.sessions) == (1, 1)
        controller.break_off(SessionOver(encode(Goodbye("the engine was closed"))))
        assert await running == "the engine was closed"
    assert host.figures.joined == 0
    assert controller.session.closed_because is None, "it was the controller's word"
    assert not list(host.folder.iterdir())


async def test_a_process_runs_as_ordered_and_its_messages_pass_both_ways_unread(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host) as running:
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        process = host.processes["i0"]
        assert process.line == b"the line"
        assert process.env["A"] == "b"
        with host.instance(b"i0") as dealer:
            controller.say(ToPeer(b"i0", msgspec.Raw(encode({"order": 1}))))
            assert await dealer.receive() == {"order": 1}
            await dealer.send(msgspec.Raw(encode({"answer": 2})))
            said = await controller.hear(FromPeer)
            assert (said.peer, bytes(said.message)) == (b"i0", encode({"answer": 2}))
        controller.say(ForgetPeer(b"i0"), NoteMemory(b"i0"), NoteMemory(b"nobody"))
        await until(lambda: process.num_notes == 1)
        controller.break_off(SessionOver(encode(Goodbye("that was all"))))
        assert await running == "that was all"
    assert process.graces == [0.0], "nothing outlives the session"


async def test_drafters_ask_the_one_draft_server_through_the_agent(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host):
        controller.say(Welcome(12.0))
        await until(lambda: host.figures.joined)
        with host.instance(b"d0", asks_drafts=True) as drafter:
            await drafter.send(msgspec.Raw(encode({"since": 5})))
            asked = await controller.hear(AskDrafts)
            assert (asked.client, bytes(asked.message)) == (b"d0", encode({"since": 5}))
            controller.say(Drafts(b"d0", msgspec.Raw(encode({"tokens": 9}))))
            assert await drafter.receive() == {"tokens": 9}
        controller.break_off(SessionOver(encode(Goodbye("over"))))


@pytest.mark.parametrize("is_told", [True, False])
async def test_how_a_process_ended_is_said_and_counts_as_a_death_if_nobody_told_it(
    host: Host, controller: Controller, is_told: bool
) -> None:
    async with agent_of(host):
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        assert (host.figures.starts, host.figures.instances) == (1, 1)
        if is_told:
            controller.say(EndProcess(b"i0", 4.0))
            expected = (SIGTERM, [4.0])
        else:
            host.processes["i0"].status.set_result(13)
            expected = (13, [0.0])
        ended = await controller.hear(Ended)
        assert (ended.status, host.processes["i0"].graces) == expected
        assert (ended.log_tail, ended.cause) == ("its last line", "out of memory")
        assert (host.figures.instances, host.figures.deaths) == (0, not is_told)
        # Orders that were on their way then are nothing to it.
        controller.say(KillProcess(b"i0"), EndProcess(b"i0", 1.0))
        await until(controller.session.coming.empty)
        controller.break_off(SessionOver(encode(Goodbye("over"))))
    assert len(controller.sessions) == 1


async def test_a_second_order_to_end_kills(host: Host, controller: Controller) -> None:
    async with agent_of(host):
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        host.processes["i0"].is_stubborn = True
        controller.say(EndProcess(b"i0", 60.0), EndProcess(b"i0", 60.0))
        assert (await controller.hear(Ended)).status == SIGKILL
        controller.break_off(SessionOver(encode(Goodbye("over"))))


@pytest.mark.parametrize("order", [KillProcess(b"i0"), EndProcess(b"i0", 5.0)])
async def test_an_order_to_end_counts_for_a_process_that_is_still_being_started(
    host: Host, controller: Controller, order: msgspec.Struct
) -> None:
    host.may_start.clear()
    async with agent_of(host):
        controller.say(Welcome(12.0), start_of("i0"), order)
        await until(lambda: controller.session.coming.empty())
        host.may_start.set()
        assert (await controller.hear(Ended)).status == SIGTERM
        assert host.processes["i0"].graces == [getattr(order, "grace_s", 0.0)]
        controller.break_off(SessionOver(encode(Goodbye("over"))))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (InstanceStartError("no room for a process"), "no room for a process"),
        (KeyError("a fault of ours"), "KeyError: 'a fault of ours'"),
    ],
)
async def test_a_process_that_cannot_start_costs_no_other(
    host: Host, controller: Controller, error: Exception, cause: str
) -> None:
    async with agent_of(host):
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        host.start_error = error
        controller.say(start_of("i1"))
        ended = await controller.hear(Ended)
        assert (ended.peer, ended.status, ended.cause) == (b"i1", 1, cause)
        assert not host.processes["i0"].status.done()
        # The name is free again: the controller may try once more.
        host.start_error = None
        controller.say(start_of("i1"))
        await until(lambda: "i1" in host.processes)
        controller.break_off(SessionOver(encode(Goodbye("over"))))


async def test_a_node_that_is_refused_says_why(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host, outcome=NodeRefused) as running:
        await controller.hear(Join)
        refusal = encode(Goodbye("install the same on both", is_refusal=True))
        controller.break_off(SessionOver(refusal))
        assert str(await running) == "install the same on both"


async def test_a_key_that_is_refused_is_told_as_such(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host, outcome=ConnectionRefused) as running:
        await controller.hear(Join)
        controller.break_off(ConnectionRefused("different keys"))
        assert str(await running) == "different keys"


async def test_nobody_who_was_looked_for_in_vain_is_waited_for_again(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host, outcome=NoController) as running:
        await controller.hear(Join)
        controller.break_off(SessionLost("nothing was heard for 600 s"))
        assert "tcp://head:5557" in str(await running)
    assert len(controller.sessions) == 1


@pytest.mark.parametrize(
    "loss",
    [
        SessionLost("nothing was heard for 12 s"),
        SessionOver(b""),
        # What is no message of a controller's ends the session as well.
        None,
    ],
    ids=["silence", "given up", "nonsense"],
)
async def test_after_a_session_that_was_lost_it_joins_anew_with_nothing_left_of_it(
    host: Host, controller: Controller, loss: Exception | None
) -> None:
    async with agent_of(host) as running:
        await controller.hear(Join)
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        first = controller.session
        if loss is None:
            first.coming.put_nowait(b"\xff nonsense")
        else:
            controller.break_off(loss)
        await controller.hear(Join)
        assert controller.session is not first
        assert controller.session.keys_are_right, "the first session has shown it"
        assert host.processes["i0"].status.result() == SIGTERM
        assert [path.name for path in host.folder.iterdir()] == ["run-2"]
        # Whoever was lost hears nothing more; who only spoke nonsense is told.
        told = "the node has ended" if loss is None else None
        assert first.closed_because == told
        controller.say(Welcome(12.0))
        controller.break_off(SessionOver(encode(Goodbye("over"))))
        assert await running == "over"
    assert host.figures.sessions == 2


async def test_a_controller_that_takes_nothing_any_more_is_given_up(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host) as running:
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        first = controller.session
        first.is_full = True
        host.processes["i0"].status.set_result(0)
        await until(lambda: controller.session is not first)
        controller.break_off(SessionOver(encode(Goodbye("over"))))
        assert await running == "over"


@pytest.mark.parametrize("is_answered", [True, False])
async def test_a_node_that_is_to_leave_lets_the_controller_move_its_work_first(
    host: Host, controller: Controller, is_answered: bool
) -> None:
    leave = asyncio.Event()
    async with agent_of(host, leave) as running:
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        leave.set()
        assert (await controller.hear(Leave)).why == "it was told to end"
        assert controller.session.timeout_s == 7.0, "the controller is waited for"
        assert not host.processes["i0"].status.done()
        if is_answered:
            controller.break_off(SessionOver(encode(Goodbye("it was told to end"))))
        else:
            controller.break_off(SessionLost("nothing was heard for 7 s"))
        assert await running == "it was told to end"
    assert host.processes["i0"].status.done()


async def test_a_node_that_never_joined_leaves_at_once(
    host: Host, controller: Controller
) -> None:
    leave = asyncio.Event()
    async with agent_of(host, leave) as running:
        await controller.hear(Join)
        leave.set()
        await controller.hear(Leave)
        assert controller.session.timeout_s == 3.0
        controller.break_off(SessionLost("nobody answers"))
        assert await running == "it was told to end"


async def test_an_agent_that_is_ended_at_once_says_so_and_ends_its_processes(
    host: Host, controller: Controller
) -> None:
    async with agent_of(host) as running:
        controller.say(Welcome(12.0), start_of("i0"))
        await until(lambda: "i0" in host.processes)
        running.cancel()
    assert controller.session.closed_because == "the node has ended"
    assert host.processes["i0"].status.result() == SIGTERM
    assert not list(host.folder.iterdir())
