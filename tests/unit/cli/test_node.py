"""`aseer node`: where the controller is, what the node offers, how the command ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.cli import node
from aseer.cli.main import build_parser
from aseer.errors import ConfigError
from aseer.node.agent import NoController, NodeRefused
from aseer.node.interpreter import Interpreter
from aseer.transport.base import ConnectionRefused
from tests.unit.node.test_fetching import JOIN
from tests.waiting import until

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from aseer.node.agent import Offer

HERE = "tcp://127.0.0.1:5557"
FAR = "tcp://10.1.2.3:5557"


def parsed(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["node", *arguments])


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KEY", "KEY_FILE", "CONTROLLER", "CONTROLLER_FILE"):
        monkeypatch.delenv(f"ASEER_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))


class Agents:
    """Stands for `run_agent`: does what the test wants, with what it was offered."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.do: Callable[[asyncio.Event], Any] = self._end
        self.figures: Any = None

    async def _end(self, leave: asyncio.Event) -> str:
        return "the engine was closed"

    async def run(self, offer: Offer, leave: asyncio.Event, figures: Any) -> str:
        self.offers.append(offer)
        self.figures = figures
        ended: str = await self.do(leave)
        return ended


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    found = Agents()
    python = Interpreter("python", {"vllm": "0.30"}, is_ours=True)
    monkeypatch.setattr(node, "run_agent", found.run)
    monkeypatch.setattr(node, "interpreter_at", lambda path: python)
    monkeypatch.setattr(node, "this_machine", lambda packages: JOIN.machine)
    monkeypatch.setattr(node, "_LOOK_INTERVAL_S", 0.001)
    return found


def test_what_is_offered_is_what_the_options_say(
    agents: Agents, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "a" / "logs"
    options = ["--controller", HERE, "--name", "far", "--gpus", "0, 3,", "--python"]
    options += ["python", "--num-instances", "2", "--log-dir", str(logs)]
    assert node.run(parsed(*options, "--death-timeout", "5")) == 0
    (offer,) = agents.offers
    assert (offer.controller, offer.name, offer.num_instances) == (HERE, "far", 2)
    assert offer.machine.gpus == ("0", "3")
    assert (offer.log_dir, offer.death_timeout_s) == (logs, 5.0)
    assert logs.is_dir()
    assert offer.look_again() is None, "--controller is where it stays"
    assert capsys.readouterr().err.endswith("aseer: the engine was closed\n")


def test_without_options_a_node_offers_all_it_has_by_the_hosts_name(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "host7")
    monkeypatch.setenv("ASEER_CONTROLLER", HERE)
    assert node.run(parsed()) == 0
    (offer,) = agents.offers
    assert (offer.controller, offer.name) == (HERE, "host7")
    assert (offer.machine, offer.num_instances) == (JOIN.machine, None)
    assert (offer.log_dir, offer.death_timeout_s) == (None, 600.0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NodeRefused("install the same on both"), 2),
        (ConnectionRefused("different keys"), 2),
        (NoController("nobody answers"), os.EX_TEMPFAIL),
    ],
)
def test_the_exit_status_says_whether_another_try_is_worth_it(
    agents: Agents, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    async def fail(leave: asyncio.Event) -> str:
        raise error

    agents.do = fail
    assert node.run(parsed("--controller", HERE)) == code
    assert f"aseer: error: {error}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_signals", "why"),
    [(1, "it was told to end"), (2, "it was told to end at once")],
)
def test_a_signal_lets_the_node_leave_and_a_second_one_ends_it_at_once(
    agents: Agents, capsys: pytest.CaptureFixture[str], num_signals: int, why: str
) -> None:
    async def take_signals(leave: asyncio.Event) -> str:
        for _ in range(num_signals):
            signal.raise_signal(signal.SIGTERM)
            await leave.wait()
        if num_signals > 1:
            await asyncio.Event().wait()
        return "it was told to end"

    agents.do = take_signals
    before = signal.getsignal(signal.SIGTERM)
    assert node.run(parsed("--controller", HERE)) == 0
    assert capsys.readouterr().err.endswith(f"aseer: {why}\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_node_leaves_in_order_when_its_lifetime_is_over(
    agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(leave: asyncio.Event) -> str:
        await leave.wait()
        return "it left"

    agents.do = serve
    caplog.set_level("INFO")
    assert node.run(parsed("--controller", HERE, "--lifetime", "0.01")) == 0
    assert "this node's lifetime of 0.01 s is over" in caplog.text


def test_a_hang_up_that_is_to_be_ignored_stays_so(agents: Agents) -> None:
    """As `nohup aseer node` asks for."""

    async def look(leave: asyncio.Event) -> str:
        return str(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)

    agents.do = look
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert node.run(parsed("--controller", HERE)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing says where the controller is; give --controller"),
        (("--controller", "head:5557"), "--controller='head:5557' is not allowed"),
        (("--controller", FAR), "there is no key"),
        (("--controller", HERE, "--log-dir", "/dev/null/logs"), "--log-dir cannot"),
        (("--controller", HERE, "--key-file", "/no/key"), "/no/key cannot be read"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    agents: Agents, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        node.run(parsed(*arguments))
    assert words in str(raised.value)
    assert agents.offers == []


def file_with(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def address_file(path: Path, address: Any) -> Path:
    return file_with(path, json.dumps({"address": address}))


@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_controllers_file_says_where_it_is_also_when_it_has_moved(
    agents: Agents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    path = address_file(tmp_path / "controller.json", HERE)
    if by == "variable":
        monkeypatch.setenv("ASEER_CONTROLLER_FILE", str(path))
    options = ["--controller-file", str(path)] if by == "option" else []
    assert node.run(parsed(*options)) == 0
    (offer,) = agents.offers
    assert offer.controller == HERE
    address_file(path, "tcp://127.0.0.1:6000")
    assert offer.look_again() == "tcp://127.0.0.1:6000"
    # What is half written, gone, or may not be connected to changes nothing.
    for text in ('{"addr', "[]", "null", json.dumps({"address": FAR})):
        assert file_with(path, text)
        assert offer.look_again() is None
    path.unlink()
    assert offer.look_again() is None


def test_an_address_in_the_environment_counts_more_than_a_file_there(
    agents: Agents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = address_file(tmp_path / "controller.json", "tcp://127.0.0.1:6000")
    monkeypatch.setenv("ASEER_CONTROLLER_FILE", str(path))
    monkeypatch.setenv("ASEER_CONTROLLER", HERE)
    assert node.run(parsed()) == 0
    assert agents.offers[0].controller == HERE
    assert agents.offers[0].look_again() is None


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"address": 7}'])
def test_a_file_that_names_no_controller_is_refused(
    agents: Agents, tmp_path: Path, text: str
) -> None:
    path = file_with(tmp_path / "controller.json", text)
    with pytest.raises(ConfigError, match=r"controller\.json"):
        node.run(parsed("--controller-file", str(path)))


async def test_a_file_is_waited_for(agents: Agents, tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    args = parsed("--controller-file", str(path))
    leave = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        finding = tasks.create_task(node._find(args, {}, leave))
        await asyncio.sleep(0.01)
        assert not finding.done()
        address_file(path, HERE)
        assert await finding == HERE
        path.unlink()
        finding = tasks.create_task(node._find(args, {}, leave))
        leave.set()
        assert await finding is None, "it is to leave before it has found one"


def test_a_file_that_never_comes_is_no_controller(
    agents: Agents, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "controller.json"
    options = ("--controller-file", str(path), "--death-timeout", "0.01")
    assert node.run(parsed(*options)) == os.EX_TEMPFAIL
    assert f"there is no file {path}" in capsys.readouterr().err
    assert agents.offers == []


def test_a_node_that_is_told_to_end_while_it_looks_ends_in_order(
    agents: Agents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    look = node._find

    async def and_a_signal(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        await until(lambda: args[2].is_set())
        return await look(*args)

    monkeypatch.setattr(node, "_find", and_a_signal)
    options = ("--controller-file", str(tmp_path / "none"))
    assert node.run(parsed(*options)) == 0
    assert capsys.readouterr().err.endswith("aseer: it was told to end\n")
    assert agents.offers == []


@pytest.mark.parametrize(("size", "warns"), [(64 << 20, True), (8 << 30, False)])
def test_a_containers_small_shared_memory_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    size: int,
    warns: bool,
) -> None:
    usage = SimpleNamespace(total=size)
    monkeypatch.setattr(node.shutil, "disk_usage", lambda folder: usage)
    node._warn_of_little_memory(tmp_path)
    assert (f"{tmp_path} has 67 MB" in caplog.text) is warns


def test_where_there_is_no_shared_memory_nothing_is_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    node._warn_of_little_memory(tmp_path / "none")
    assert caplog.text == ""


def test_figures_are_served_while_the_node_runs(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Server:
        url = "http://127.0.0.1:9464/metrics"

        def __init__(self, address: str, metrics: Any, read: Any) -> None:
            told.append(("at", address))
            self.read = read

        def close(self) -> None:
            told.append(("joined", self.read()["aseer_agent_joined"][""]))

    async def join(leave: asyncio.Event) -> str:
        agents.figures.joined = 1
        raise NoController("it has died")

    agents.do = join
    monkeypatch.setattr(node, "MetricsServer", Server)
    monkeypatch.setattr(node, "check_metrics_library", lambda who: None)
    options = ("--controller", HERE, "--metrics-address", "127.0.0.1:9464")
    assert node.run(parsed(*options)) == os.EX_TEMPFAIL
    assert told == [("at", "127.0.0.1:9464"), ("joined", 1)], "closed in any case"


def test_a_script_for_many_hosts_is_printed_and_nothing_is_started(
    agents: Agents, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = next(iter(node.SCRIPTS))
    assert node.run(parsed("--print", launcher, "--controller-file", "/shared/c")) == 0
    printed = capsys.readouterr().out
    assert "aseer node" in printed
    assert "/shared/c" in printed
    assert agents.offers == []
