"""Groups on their way in: none is lost, none is taken for nothing, errors come last."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import ConfigError, RolloutError
from aseer.groups import Group, GroupResolver
from aseer.runtime.group_source import GroupSource, OpenSource
from aseer.sampling import SamplingParams
from aseer.types import GroupId, InstanceId, InstanceInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aseer.types import Task

INFO = InstanceInfo(
    instance_id=InstanceId(0),
    num_kv_blocks=100,
    block_size=16,
    max_num_seqs=8,
    max_model_len=64,
    vocab_size=1000,
)


class Session:
    """Takes groups until it does not."""

    weight_version = 7

    def __init__(self, takes: int = 10**9) -> None:
        self.takes = takes
        self.taken: list[str] = []
        self.sizes: list[int] = []
        self.is_closed = False

    def offer(self, tasks: list[Task]) -> bool:
        assert not self.is_closed, "an offer after the intake was closed"
        if len(self.taken) + len(tasks) > self.takes:
            return False
        self.taken += [task.group_id for task in tasks]
        self.sizes.append(len(tasks))
        return True

    def close_intake_soon(self) -> None:
        self.is_closed = True


class Tokenizer:
    def encode_text(self, text: str) -> list[int]:
        if text == "stop":
            raise StopIteration
        if text == "interrupt":
            raise KeyboardInterrupt
        return [1]

    def encode_chat(self, *args: object, **kwargs: object) -> list[int]:
        return [1]


def group(name: str, n: int = 2, prompt: Any = (1, 2)) -> Group:
    return Group(prompt, n=n, group_id=name)


def source_of(groups: Any, max_pending: int = 100) -> GroupSource:
    resolver = GroupResolver(INFO, Tokenizer(), SamplingParams(max_tokens=5))  # type: ignore[arg-type]
    return GroupSource(resolver, groups, max_pending)


def begun(groups: Any, max_pending: int = 100) -> tuple[GroupSource, Session]:
    source, session = source_of(groups, max_pending), Session()
    source.begin(session)
    return source, session


def refused(source: GroupSource) -> list[str]:
    responses = iter(source.next_refused, None)
    return [r.request_id for r in responses if r is not None]


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_list_is_handed_over_whole_and_the_intake_closed() -> None:
    source, session = begun([group("a"), group("b")])
    assert (session.taken, session.sizes) == (["a", "b"], [2])
    assert session.is_closed
    assert not source.pull()
    assert source.size_of("a") == 2


def test_a_bad_group_of_a_list_is_refused_before_anything_begins() -> None:
    with pytest.raises(ConfigError, match="b"):
        source_of([group("a"), group("b", prompt=[99999])])


def test_an_empty_list_is_over_at_once() -> None:
    _, session = begun([])
    assert (session.taken, session.is_closed) == ([], True)


def test_groups_are_taken_while_there_is_room_and_again_as_responses_are_read() -> None:
    source, session = begun((group(str(i)) for i in range(5)), max_pending=3)
    assert session.taken == []
    assert not source.pull()
    assert session.taken == ["0", "1"]  # 4 requests: the last one began with room
    source.yielded()
    assert not source.pull()
    source.yielded()
    assert not source.pull()
    assert session.taken == ["0", "1", "2"]
    for _ in range(10):
        source.yielded()
    assert not source.pull()
    assert session.taken == ["0", "1", "2", "3", "4"]
    assert session.is_closed


def test_a_few_groups_are_taken_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr("aseer.runtime.group_source._PULL_AT_ONCE", 2)
    source, session = begun(group(str(i)) for i in range(5))
    assert [source.pull(), source.pull(), source.pull()] == [True, True, False]
    assert session.sizes == [2, 2, 1]


def test_an_error_of_the_iterator_comes_once_and_after_what_was_taken() -> None:
    def groups() -> Iterator[Group]:
        yield group("a")
        raise KeyError("x")

    source, session = begun(groups())
    assert not source.pull()
    assert (session.taken, session.is_closed) == (["a"], True)
    with pytest.raises(KeyError):
        source.raise_error()
    source.raise_error()
    assert not source.pull()


def test_a_bad_group_of_an_iterator_ends_it_after_those_before() -> None:
    source, session = begun(iter([group("a"), "no group", group("c")]))
    assert not source.pull()
    assert (session.taken, session.is_closed) == (["a"], True)
    with pytest.raises(ConfigError):
        source.raise_error()


@pytest.mark.parametrize("bad", [None, group("b", prompt="stop")])
def test_nothing_but_the_iterators_end_is_taken_for_it(bad: object) -> None:
    source, session = begun(iter([group("a"), bad, group("c")]))
    assert not source.pull()
    assert session.taken == ["a"]
    with pytest.raises((ConfigError, RolloutError)):
        source.raise_error()


def test_an_interrupt_in_the_iterator_loses_nothing_that_was_taken() -> None:
    def groups() -> Iterator[Group]:
        yield group("a")
        yield group("b")
        raise KeyboardInterrupt

    source, session = begun(groups())
    with pytest.raises(KeyboardInterrupt):
        source.pull()
    assert session.taken == ["a", "b"]


def test_an_interrupt_while_a_prompt_is_encoded_loses_nothing_before_it() -> None:
    groups = [group("a"), group("b", prompt="interrupt"), group("c")]
    source, session = begun(iter(groups))
    with pytest.raises(KeyboardInterrupt):
        source.pull()
    assert session.taken == ["a"]
    assert not source.pull()
    assert session.taken == ["a", "c"]
    assert session.is_closed


def test_what_the_session_takes_no_more_comes_as_aborted_responses() -> None:
    taken: list[int] = []

    def groups() -> Iterator[Group]:
        for i in range(10):
            taken.append(i)
            yield group(str(i))

    source = source_of(groups(), max_pending=4)
    session = Session(takes=1)
    source.begin(session)
    assert not source.pull()
    assert session.taken == []
    assert session.is_closed
    first = source.next_refused()
    assert first is not None
    assert (first.finish_reason, first.weight_version) == ("aborted", 7)
    assert [first.request_id, *refused(source)] == ["0/0", "0/1", "1/0", "1/1"]
    for _ in range(8):
        source.yielded()
    assert not source.pull()
    assert taken == [0, 1]  # the user's iterator is left alone


def test_after_a_stop_nothing_is_taken() -> None:
    source, session = begun(group(str(i)) for i in range(5))
    source.stop()
    source.stop()
    assert not source.pull()
    assert (session.taken, session.is_closed) == ([], True)


def test_only_groups_that_were_taken_are_known() -> None:
    source, _ = begun(iter([group("a"), group("b")]), max_pending=1)
    source.pull()
    source.check_known("a")
    with pytest.raises(ConfigError, match="no group 'b' among the 1"):
        source.check_known("b")


# Async iterators


async def test_an_async_iterator_is_pumped_while_there_is_room() -> None:
    async def groups() -> AsyncIterator[Group]:
        for i in range(4):
            yield group(str(i))

    source, session = begun(groups(), max_pending=3)
    assert not session.is_closed
    source.start_pump()
    source.start_pump()
    assert not source.needs_reader
    await settled()
    assert session.taken == ["0", "1"]
    assert source.needs_reader
    for _ in range(8):
        source.yielded()
    await settled()
    assert session.taken == ["0", "1", "2", "3"]
    assert session.is_closed
    assert not source.needs_reader
    await source.wait_stopped()


async def test_an_async_iterators_error_comes_at_the_end() -> None:
    async def groups() -> AsyncIterator[Group]:
        yield group("a")
        raise KeyError("x")

    source, session = begun(groups())
    source.start_pump()
    await settled()
    assert (session.taken, session.is_closed) == (["a"], True)
    with pytest.raises(KeyError):
        source.raise_error()


async def test_an_async_iterator_that_ends_by_its_own_cancelled_error_is_told() -> None:
    async def groups() -> AsyncIterator[Group]:
        yield group("a")
        waited = asyncio.get_running_loop().create_future()
        waited.cancel()
        await waited

    source, session = begun(groups())
    source.start_pump()
    await settled()
    assert (session.taken, session.is_closed) == (["a"], True)
    with pytest.raises(RolloutError, match="CancelledError of its own") as caught:
        source.raise_error()
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@pytest.mark.parametrize("where", ["in its iterator", "for room"])
async def test_a_stop_ends_a_pump_wherever_it_waits(where: str) -> None:
    ended = []

    async def groups() -> AsyncIterator[Group]:
        try:
            yield group("a")
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("cleaned up")

    in_iterator = where == "in its iterator"
    generator = groups()
    source, session = begun(generator, max_pending=100 if in_iterator else 1)
    source.start_pump()
    await settled()
    assert session.taken == ["a"]
    await source.wait_stopped()
    assert session.is_closed
    source.raise_error()
    await generator.aclose()
    assert ended == ["cleaned up"]


async def test_a_stop_from_another_thread_ends_the_pump() -> None:
    async def groups() -> AsyncIterator[Group]:
        yield group("a")
        await asyncio.get_running_loop().create_future()

    source, session = begun(groups())
    source.start_pump()
    await settled()
    await asyncio.to_thread(source.stop)
    await source.wait_stopped()
    assert session.is_closed


async def test_a_refused_group_ends_the_pump() -> None:
    taken = []

    async def groups() -> AsyncIterator[Group]:
        for i in range(10):
            taken.append(i)
            yield group(str(i))

    generator = groups()
    source = source_of(generator)
    source.begin(Session(takes=1))
    source.start_pump()
    await settled()
    assert taken == [0, 1]
    assert refused(source) == ["1/0", "1/1"]
    await source.wait_stopped()
    await generator.aclose()


async def test_an_async_iterator_that_never_waits_lets_others_run(monkeypatch) -> None:
    monkeypatch.setattr("aseer.runtime.group_source._LONGEST_TURN_S", 0.0)

    async def groups() -> AsyncIterator[Group]:
        for i in range(100):
            yield group(str(i))

    source, session = begun(groups(), max_pending=10**6)
    source.start_pump()
    seen = set()
    for _ in range(300):
        await asyncio.sleep(0)
        seen.add(len(session.taken))
    assert len(seen) > 50
    assert len(session.taken) == 100


async def test_a_pump_whose_loop_is_gone_is_no_hindrance() -> None:
    async def groups() -> AsyncIterator[Group]:
        yield group("a")
        await asyncio.get_running_loop().create_future()

    source, session = begun(groups())

    def pump_elsewhere() -> None:
        async def pump() -> None:
            source.start_pump()
            await settled()

        asyncio.run(pump())

    await asyncio.to_thread(pump_elsewhere)
    assert (session.taken, session.is_closed) == (["a"], True)
    source.stop()
    await source.wait_stopped()


def test_a_source_without_an_end_does_not_grow():
    resolver = GroupResolver(INFO, Tokenizer(), SamplingParams(max_tokens=5))  # type: ignore[arg-type]
    source, session = OpenSource(resolver), Session()
    source.begin(session)
    for i in range(300):
        task = source.prepare(Group([1, 2], 1))
        source.add(replace(task, group_id=GroupId(f"desk-{i}")))
        source.check_known(f"desk-{i}")
        source.yielded()
    assert len(session.taken) == 300
    held = [value for value in vars(source).values() if isinstance(value, dict | list)]
    assert sum(map(len, held)) == 0


def test_while_one_thread_takes_groups_others_that_read_take_none() -> None:
    is_asked, goes_on = threading.Event(), threading.Event()

    def groups() -> Iterator[Group]:
        yield group("a")
        is_asked.set()
        assert goes_on.wait(10)
        yield group("b")

    source, session = begun(groups())
    pulling = threading.Thread(target=source.pull)
    pulling.start()
    assert is_asked.wait(10)
    assert not source.pull(), "it is not worth trying again at once"
    goes_on.set()
    pulling.join(10)
    assert session.taken == ["a", "b"]
    assert session.is_closed
    source.raise_error()


def test_an_iterator_that_reads_what_it_feeds_is_told_so() -> None:
    def groups() -> Iterator[Group]:
        yield group("a")
        source.pull()

    source, session = begun(groups())
    source.pull()
    with pytest.raises(RolloutError, match="reads from the rollout that it feeds"):
        source.raise_error()
    assert session.taken == ["a"]


async def test_an_iterator_that_ignores_its_cancellation_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aseer.runtime.group_source._LONGEST_STOP_S", 0.05)
    goes_on = asyncio.Event()

    async def groups() -> AsyncIterator[Group]:
        while not goes_on.is_set():
            try:
                await goes_on.wait()
            except asyncio.CancelledError:
                continue
        yield group("late")

    source, session = begun(groups())
    source.start_pump()
    await settled()
    async with asyncio.timeout(10):
        await source.wait_stopped()
    assert "was cancelled 0.05 s ago" in caplog.text
    goes_on.set()
    await settled()
    assert session.is_closed
    assert refused(source) == []
    assert session.taken == ["late"], "it was taken from the user, and is not lost"
