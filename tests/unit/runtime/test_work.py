"""A rollout that is opened once and left once, whatever order they come in."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import AseerError, EngineClosedError, RolloutClosedError
from aseer.groups import Group, GroupResolver
from aseer.runtime.group_source import GroupSource
from aseer.runtime.steps import drive_blocking
from aseer.runtime.work import Work
from aseer.sampling import SamplingParams
from tests.unit.builders import info_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.types import Task


class Thread:
    """An engine's thread that does what is posted, and opens when the test says so."""

    is_here = True

    def __init__(self) -> None:
        self.submitted: list[Future[Any]] = []
        self.cancelled: list[Future[Any]] = []

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.submitted.append(future)
        return future

    def post(self, function: Callable[[], object]) -> bool:
        function()
        return True

    def cancel(self, future: Future[Any]) -> None:
        self.cancelled.append(future)


class Session:
    weight_version = 0
    report = None

    def __init__(self) -> None:
        self.log: list[str] = []
        self.progress = SimpleNamespace()

    def offer(self, tasks: list[Task]) -> bool:
        self.log.append("offer " + " ".join(task.group_id for task in tasks))
        return True

    def close_intake_soon(self) -> None:
        self.log.append("close")

    def cancel(self, group_id: str) -> None:
        self.log.append(f"cancel {group_id}")

    def guarded(self, decide: Callable[[], object]) -> None:
        decide()

    def leave(self) -> None:
        self.log.append("leave")


@pytest.fixture
def thread() -> Thread:
    return Thread()


@pytest.fixture
def work(thread: Thread) -> Work:
    groups = [Group([1, 2], n=2, group_id=name) for name in ("a", "b")]
    resolver = GroupResolver(info_of(), None, SamplingParams(max_tokens=5))  # type: ignore[arg-type]
    return Work(
        thread=thread,  # type: ignore[arg-type]
        host=SimpleNamespace(),  # type: ignore[arg-type]
        source=GroupSource(resolver, groups, 10),
        policy="context-aware",
        chunk_size=0,
    )


def begin(work: Work) -> Session:
    session = Session()
    work.begin(session)  # type: ignore[arg-type]
    return session


def test_it_is_opened_once_however_often_it_is_asked_for(work, thread) -> None:
    assert work.open(None) is work.open(None)
    assert len(thread.submitted) == 1
    thread.submitted[0].set_result(Session())
    assert work.open(None) is thread.submitted[0]


def test_an_opening_that_failed_may_be_tried_again(work, thread) -> None:
    first = work.open(None)
    first.set_exception(EngineClosedError("not now"))
    assert work.open(None) is not first
    assert len(thread.submitted) == 2


def test_groups_go_before_what_was_cancelled_meanwhile(work) -> None:
    work.cancel("b")
    session = begin(work)
    work.cancel("a")
    assert session.log == ["offer a b", "close", "cancel b", "cancel a"]
    work.begin(Session())  # of another reader of the same rollout
    assert work.session is session


def test_what_is_left_before_its_opening_opens_no_more(work, thread) -> None:
    work.leave()
    work.leave()
    assert thread.submitted == []
    with pytest.raises(RolloutClosedError):
        work.open(None)
    assert begin(work).log == []
    assert work.session is None
    assert drive_blocking(work.close()) is None


@pytest.mark.parametrize("opens", [True, False])
def test_what_is_left_while_it_opens_is_left_once_it_is_open(
    work, thread, opens
) -> None:
    opening, session = work.open(None), Session()
    work.leave()
    assert thread.cancelled == [opening]
    if opens:
        opening.set_result(session)
    else:
        opening.set_exception(EngineClosedError("closed"))
    assert session.log == (["leave"] if opens else [])
    assert work.mailbox.is_closed
    with pytest.raises(RolloutClosedError):
        work.ended()


def test_who_leaves_in_another_thread_during_the_opening_is_heard(work, thread) -> None:
    session, left = Session(), threading.Event()

    def leave() -> None:
        work.leave()
        left.set()

    leaving = threading.Thread(target=leave)
    submit = thread.submit

    def submit_slowly(call: Callable[[], Any]) -> Future[Any]:
        leaving.start()
        left.wait(0.05)  # which it may not do in between
        return submit(call)

    thread.submit = submit_slowly
    opening = work.open(None)
    leaving.join()
    opening.set_result(session)
    assert session.log == ["leave"]


def test_closing_waits_for_the_opening_and_for_the_engines(work, thread) -> None:
    work.open(None)
    session = begin(work)
    closing = work.close()
    assert next(closing) is thread.submitted[0]
    drained = closing.send(session)
    assert drained is thread.submitted[1]
    assert session.log[-1] == "leave"
    with pytest.raises(StopIteration):
        closing.send(None)


@pytest.mark.parametrize("step", [0, 1])
def test_closing_when_the_engine_has_ended_is_no_error(work, thread, step) -> None:
    work.open(None)
    session = begin(work)
    closing = work.close()
    next(closing)
    if step:
        closing.send(session)
    with pytest.raises(StopIteration):
        closing.throw(EngineClosedError("closed"))


def test_what_was_read_to_its_end_is_not_left(work) -> None:
    session = begin(work)
    work.mailbox.close()
    with pytest.raises(StopIteration):
        work.ended()
    work.leave()
    assert "leave" not in session.log
    with pytest.raises(AseerError, match="not finished"):
        _ = work.report


def test_why_it_ended_is_told_at_the_end(work) -> None:
    begin(work)
    work.mailbox.close(EngineClosedError("closed"))
    with pytest.raises(EngineClosedError):
        work.ended()
