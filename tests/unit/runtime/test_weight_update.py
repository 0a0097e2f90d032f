"""An update gives the engine back, however its caller's wait ends."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import ConfigError, EngineClosedError, WeightUpdateError
from aseer.runtime.steps import drive, drive_blocking
from aseer.runtime.weight_update import update_steps
from aseer.runtime.weights import Plan, SwitchTimes
from aseer.weights.checks import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.report import WeightUpdateReport

PLAN = Plan(5, Path("/nowhere"), ModelSpec({}, dtype="F32"), SimpleNamespace())  # type: ignore[arg-type]
INDEX = SimpleNamespace(tensors=[1, 2], num_bytes=80)


class Thread:
    """An engine's thread whose calls end when the test says so."""

    def __init__(self, *results: object) -> None:
        self.results = list(results)
        self.calls: list[Future[Any]] = []
        self.cancelled: list[Future[Any]] = []
        self.posted: list[Callable[[], object]] = []
        self.ended = SimpleNamespace(is_set=lambda: False)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.calls.append(future)
        if self.results:
            settle(future, self.results.pop(0))
        return future

    def post(self, function: Callable[[], object]) -> bool:
        function()
        return True

    def cancel(self, future: Future[Any]) -> None:
        self.cancelled.append(future)

    def closed_error(self) -> EngineClosedError:
        return EngineClosedError("the engine is closed")


class Host:
    """Keeps which plans were given up."""

    def __init__(self) -> None:
        self.abandoned: list[Plan] = []
        self.weights = SimpleNamespace(abandon=self.abandoned.append)
        self.updates = Updates()


class Updates:
    transfer_backend = None

    async def begin(self, *args: object) -> None: ...

    async def switch(self, plan: Plan) -> None: ...


def settle(future: Future[Any], result: object) -> None:
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


def steps(thread: Thread, host: Host, pause: Any = None) -> Any:
    return update_steps(thread, host, "a source", None, pause, None, "host")  # type: ignore[arg-type]


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the sender does; nothing, unless told otherwise."""
    sender = SimpleNamespace(send=lambda: INDEX)

    async def send_async(*args: object) -> object:
        result = sender.send()
        return await result if asyncio.iscoroutine(result) else result

    monkeypatch.setattr("aseer.runtime.weight_update.send", lambda *args: sender.send())
    monkeypatch.setattr("aseer.runtime.weight_update.send_async", send_async)
    return sender


def check(report: WeightUpdateReport) -> None:
    assert (report.version, report.num_tensors, report.num_bytes) == (5, 2, 80)
    assert (report.prepare_s, report.switch_s) == (1.0, 2.0)
    assert report.send_s >= 0


async def test_it_begins_sends_and_switches_in_either_form(sending) -> None:
    for form in ("asyncio", "plain"):
        thread, host = Thread(PLAN, SwitchTimes(1.0, 2.0)), Host()
        body = steps(thread, host)
        check(await drive(body) if form == "asyncio" else drive_blocking(body))
        assert (host.abandoned, thread.cancelled) == ([], [])


def test_a_pause_that_there_is_not_is_refused_before_anything(sending) -> None:
    thread = Thread()
    with pytest.raises(ConfigError, match="pause"):
        drive_blocking(steps(thread, Host(), pause="later"))
    assert thread.calls == []


def test_an_update_that_is_refused_has_nothing_to_give_up(sending) -> None:
    thread, host = Thread(WeightUpdateError("not a later version")), Host()
    with pytest.raises(WeightUpdateError, match="later"):
        drive_blocking(steps(thread, host))
    assert host.abandoned == []
    assert len(thread.calls) == 1


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), OSError("full")])
def test_a_sender_that_fails_gives_the_update_up(sending, error) -> None:
    def fail() -> None:
        raise error

    sending.send = fail
    thread, host = Thread(PLAN), Host()
    with pytest.raises(type(error)):
        drive_blocking(steps(thread, host))
    assert host.abandoned == [PLAN]
    assert len(thread.calls) == 1


@pytest.mark.parametrize("error", [OSError("no such folder"), WeightUpdateError("x")])
def test_a_sender_whose_engine_has_ended_says_that(sending, error) -> None:
    thread, host = Thread(PLAN), Host()

    def fail() -> None:
        thread.ended.is_set = lambda: True
        raise error

    sending.send = fail
    with pytest.raises(EngineClosedError) as caught:
        drive_blocking(steps(thread, host))
    assert caught.value.__cause__ is error


async def test_a_wait_for_the_beginning_that_is_given_up_gives_the_update_up(
    sending,
) -> None:
    for comes_late in (True, False):
        thread, host = Thread(), Host()
        updating = asyncio.get_running_loop().create_task(drive(steps(thread, host)))
        await asyncio.sleep(0)
        (beginning,) = thread.calls
        updating.cancel()
        if not comes_late:
            beginning.set_result(PLAN)
        await asyncio.wait([updating])
        assert updating.cancelled()
        assert thread.cancelled == [beginning]
        if comes_late:
            assert host.abandoned == []
            beginning.set_result(PLAN)
        assert host.abandoned == [PLAN]


async def test_a_beginning_that_failed_when_nobody_waited_is_nothing_to_give_up(
    sending,
) -> None:
    thread, host = Thread(), Host()
    updating = asyncio.get_running_loop().create_task(drive(steps(thread, host)))
    await asyncio.sleep(0)
    updating.cancel()
    await asyncio.wait([updating])
    thread.calls[0].set_exception(EngineClosedError("closed"))
    assert host.abandoned == []


async def test_a_sender_that_is_cancelled_gives_the_update_up(sending) -> None:
    thread, host = Thread(PLAN), Host()
    is_sending = asyncio.Event()

    async def forever() -> None:
        is_sending.set()
        await asyncio.get_running_loop().create_future()

    sending.send = forever
    updating = asyncio.get_running_loop().create_task(drive(steps(thread, host)))
    await is_sending.wait()
    updating.cancel()
    await asyncio.wait([updating])
    assert updating.cancelled()
    assert host.abandoned == [PLAN]


async def test_an_update_that_switches_goes_on_when_nobody_waits(sending) -> None:
    thread, host = Thread(PLAN), Host()
    updating = asyncio.get_running_loop().create_task(drive(steps(thread, host)))
    while len(thread.calls) < 2:  # noqa: ASYNC110 - steps of the loop, not time
        await asyncio.sleep(0)
    updating.cancel()
    await asyncio.wait([updating])
    assert updating.cancelled()
    assert (host.abandoned, thread.cancelled) == ([], [])
    thread.calls[1].set_result(SwitchTimes(1.0, 2.0))
