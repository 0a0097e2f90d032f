"""A session with a journal: nobody sees what is not written, and no disk stops it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aseer.core.columns import columns_of
from aseer.errors import ConfigError
from aseer.instance.messages import Report
from aseer.journal.history import History, Weights, read
from aseer.journal.keys import KeyMaker
from aseer.runtime.identity import Identity
from aseer.runtime.journal import Journal, JournalPlan, journal_path
from aseer.types import InstanceLoad
from tests.unit.builders import info_of, report_of, task_of
from tests.unit.runtime.test_session import A, Rolling

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.types import GroupKey, Response, Task

WEIGHTS = Weights(3, "w")
IDENTITY = Identity({"vocab_size": "5"}, WEIGHTS, repeats=False)


class Disk:
    """Stands for the thread and its file: writes when the test says so."""

    made: Disk

    def __init__(
        self, path: Path, check: Any, post: Any, **tells: Callable[..., Any]
    ) -> None:
        self.check, self.tells = check, tells
        self.queue: list[bytes] = []
        self.file = b""
        self.num_written = 0
        self.is_closing = self.is_abandoned = False
        Disk.made = self

    def start(self) -> None:
        reading = read(Disk.before)
        self.file = Disk.before[: reading.end]
        try:
            self.check(reading.history)
        except ConfigError as error:
            self.tells["on_open"](error)
        else:
            self.tells["on_open"](reading.history)

    before = b""

    def write(self, data: bytes) -> int:
        self.queue.append(data)
        return self.num_written + len(self.queue)

    def close(self) -> None:
        self.is_closing = True

    def abandon(self) -> None:
        self.is_abandoned = True

    def work(self) -> None:
        """Write what is queued, and close if it is time."""
        self.file += b"".join(self.queue)
        self.num_written += len(self.queue)
        self.queue.clear()
        self.tells["on_written"](self.num_written)
        if self.is_closing:
            self.tells["on_closed"]()


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aseer.runtime.journal.Writer", Disk)
    monkeypatch.setattr(Disk, "before", b"")


def keyed(name: str, **settings: Any) -> Task:
    task = task_of(name, **{"num_requests": 2, "max_tokens": 8} | settings)
    return replace(task, key=KeyMaker().key_of(task, has_own_id=True))


class Journaled(Rolling):
    """A session whose journal is open."""

    @classmethod
    async def begun(
        cls,
        before: bytes = b"",
        keys: list[GroupKey] | None = None,
        **settings: Any,
    ) -> Journaled:
        Disk.before = before
        journal = Journal(JournalPlan(Path("j"), keys), lambda: IDENTITY, print)
        await journal.open()
        return cls(journal=journal, first_chunk_id=0, **settings)

    @property
    def disk(self) -> Disk:
        return Disk.made

    def offer_tasks(self, *tasks: Task) -> None:
        assert self.session.offer(list(tasks))

    def seen(self) -> list[Response]:
        return list(self.mailbox._items)


async def broken_off() -> bytes:
    """A journal of two groups: of "g" one response is finished, of "h" none."""
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"), keyed("h"))
    rolling.work()
    chunk = next(c for c in rolling.pool.running.values() if c.request_id == "g/0")
    rolling.end(chunk.chunk_id)
    rolling.disk.work()
    rolling.session.give_up()
    return rolling.disk.file


async def test_a_response_is_seen_once_it_is_written() -> None:
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"))
    rolling.work()
    rolling.disk.work()
    rolling.end(next(iter(rolling.pool.running)))
    assert rolling.seen() == []
    assert b"done" in rolling.disk.queue[-1]
    rolling.disk.work()
    (response,) = rolling.seen()
    assert not response.replayed
    rolling.session.give_up()


async def test_the_end_waits_for_the_file_and_its_report_says_so() -> None:
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"))
    rolling.work()
    rolling.end_all()
    rolling.session.close_intake_soon()
    rolling.work()
    assert not rolling.is_over
    assert rolling.disk.is_closing
    rolling.disk.work()
    assert rolling.is_over
    assert len(rolling.seen()) == 2
    assert rolling.mailbox.is_closed
    assert rolling.session.report is not None
    assert rolling.session.report.journal_error is None


@pytest.mark.parametrize("gone", ["instance_down", "instance_left"])
async def test_what_comes_late_of_an_instance_that_is_gone_is_not_taken(gone) -> None:
    rolling = await Journaled.begun(num_instances=1)
    rolling.offer_tasks(keyed("g", num_requests=1))
    rolling.work()
    (chunk,) = rolling.pool.running.values()

    def report(tokens: list[int], start: int) -> None:
        progress = columns_of([report_of(chunk.chunk_id, tokens, start=start)])
        rolling.session.instance_report(
            chunk.instance_id, Report(progress, InstanceLoad())
        )

    report([1, 2], start=0)
    rolling.pool.running.clear()
    getattr(rolling.session, gone)(chunk.instance_id, "told by a test")
    report([3], start=2)
    rolling.session.instance_up(info_of(1), InstanceLoad())
    rolling.end_all()
    rolling.disk.work()
    reading = read(rolling.disk.file)
    assert not reading.damage
    (response,) = rolling.seen()
    assert len(response.token_ids) == 8
    rolling.session.give_up()


async def test_a_disk_that_fails_holds_nothing_back(caplog) -> None:
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"))
    rolling.work()
    rolling.end(next(iter(rolling.pool.running)))
    rolling.disk.tells["on_failed"](OSError(28, "No space left on device"))
    assert len(rolling.seen()) == 1
    rolling.end_all()
    rolling.session.close_intake_soon()
    rolling.work()
    assert rolling.is_over
    assert len(rolling.seen()) == 2
    assert "No space left" in str(rolling.session.report.journal_error)
    assert caplog.text.count("goes on without it") == 1
    assert rolling.disk.is_abandoned


async def test_a_disk_that_does_not_answer_is_given_up(monkeypatch, caplog) -> None:
    monkeypatch.setattr("aseer.runtime.journal.PATIENCE_S", 0.03)
    monkeypatch.setattr("aseer.runtime.journal._STEP_S", 0.01)
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"))
    rolling.work()
    rolling.end_all()
    async with asyncio.timeout(5):
        await rolling.mailbox.get()
    assert "has not answered for 0.03 s" in caplog.text
    rolling.session.give_up()


async def test_a_disk_that_is_too_slow_is_given_up(monkeypatch, caplog) -> None:
    monkeypatch.setattr("aseer.runtime.journal._MAX_WAITING_BYTES", 400)
    rolling = await Journaled.begun()
    rolling.offer_tasks(*(keyed(f"g{i}") for i in range(9)))
    rolling.work()
    assert "too slow" in caplog.text
    rolling.session.give_up()


async def test_what_cannot_be_written_ends_the_journal_and_not_the_rollout(
    monkeypatch, caplog
) -> None:
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"))
    rolling.work()

    def fails(records: object) -> bytes:
        raise ValueError("surrogates not allowed")

    monkeypatch.setattr("aseer.runtime.journal.encode", fails)
    rolling.end_all()
    assert len(rolling.seen()) == 2
    assert "surrogates not allowed" in caplog.text
    rolling.session.close_intake_soon()
    rolling.work()
    assert rolling.is_over
    assert rolling.mailbox.error is None


async def test_what_was_finished_comes_at_once_and_the_rest_goes_on() -> None:
    rolling = await Journaled.begun(await broken_off())
    rolling.offer_tasks(keyed("h"), keyed("g"))
    rolling.session.close_intake_soon()  # while parts of what was offered are to come
    rolling.work()
    rolling.disk.work()
    (response,) = rolling.seen()
    assert (response.request_id, response.replayed) == ("g/0", True)
    assert response.finish_reason == "length"
    running = sorted(c.request_id for c in rolling.pool.running.values())
    assert running == ["g/1", "h/0", "h/1"]
    assert rolling.pool.aborted == []
    rolling.end_all()
    rolling.disk.work()
    assert rolling.is_over
    assert rolling.session.report.num_replayed == 1
    assert [r.finish_reason for r in rolling.seen()] == ["length"] * 4


async def test_what_was_aborted_is_not_finished() -> None:
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"))
    rolling.work()
    rolling.session.leave()
    rolling.end_all("aborted")
    rolling.disk.work()
    assert rolling.is_over
    history = read(rolling.disk.file).history
    past = history.pop(keyed("g").key, WEIGHTS)
    assert [(p.num_tokens, p.finish_reason) for p in past.values()] == [(1, None)] * 2


async def test_a_lost_instance_is_in_the_journal() -> None:
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"))
    rolling.work()
    rolling.kill(A)
    rolling.disk.work()
    assert not read(rolling.disk.file).damage
    assert b"lost" in rolling.disk.file
    rolling.session.give_up()


async def test_an_abort_ends_groups_of_which_parts_are_to_come() -> None:
    rolling = await Journaled.begun(await broken_off())
    rolling.offer_tasks(keyed("g"), keyed("h"))
    rolling.posted.pop(0)()  # the first part is added, the second is to come
    rolling.session.abort()
    rolling.work()
    rolling.end_all("aborted")
    rolling.disk.work()
    assert rolling.is_over
    reasons = {r.request_id: r.finish_reason for r in rolling.seen()}
    assert reasons.pop("g/0") == "length"
    assert list(reasons.values()) == ["aborted"] * 3


async def test_an_error_in_a_decision_ends_it_with_its_file() -> None:
    rolling = await Journaled.begun()
    rolling.offer_tasks(task_of("g"))  # no key: a bug
    rolling.work()
    rolling.session.close_intake_soon()
    rolling.work()
    rolling.disk.work()
    assert rolling.is_over
    assert rolling.mailbox.error is not None


async def test_another_model_or_set_is_refused_when_it_is_opened() -> None:
    before = await broken_off()
    keys = [keyed("g").key, keyed("i").key]
    assert keys[0] is not None
    with pytest.raises(ConfigError, match="it has group 'h', which this rollout has"):
        await Journaled.begun(before, keys)  # type: ignore[arg-type]
    assert Disk.made.is_abandoned


async def test_groups_of_a_journal_are_checked_as_they_come() -> None:
    rolling = await Journaled.begun(await broken_off())
    rolling.session.check_group(keyed("g").key)
    rolling.session.check_group(keyed("new").key)
    with pytest.raises(
        ConfigError, match="'g' has n=3 here, and n=2 there, in the jou"
    ):
        rolling.session.check_group(keyed("g", num_requests=3).key)
    rolling.session.give_up()


async def test_seeds_are_made_where_a_request_would_be_sampled_otherwise() -> None:
    """Undivided requests start over with the same numbers; engines that repeat theirs
    get new ones.
    """
    rolling = await Journaled.begun()
    rolling.offer_tasks(keyed("g"), keyed("u", undivided_because="bad_words"))
    rolling.work()
    first = {c.request_id: c.seed for c in rolling.pool.running.values()}
    assert first["g/0"] is None
    assert first["u/0"] not in (None, first["u/1"])
    rolling.disk.work()
    rolling.session.give_up()
    repeating = IDENTITY._replace(repeats=True)
    Disk.before = rolling.disk.file
    journal = Journal(JournalPlan(Path("j"), None), lambda: repeating, print)
    await journal.open()
    again = Journaled(journal=journal)
    again.offer_tasks(keyed("g"), keyed("u", undivided_because="bad_words"))
    again.work()
    second = {c.request_id: c.seed for c in again.pool.running.values()}
    assert (second["u/0"], second["u/1"]) == (first["u/0"], first["u/1"])
    assert second["g/0"] is not None
    again.session.give_up()


def test_a_journals_name_is_a_files() -> None:
    assert journal_path("/d", "step-17") == Path("/d/step-17.journal")
    for name in ("", ".", "a/b", "a b", 5, None, "\0", "x" * 201):
        with pytest.raises(ConfigError, match="such as 'step-17'"):
            journal_path("/d", name)
    with pytest.raises(ConfigError, match="needs a directory"):
        journal_path(None, "s")


async def test_whoever_gives_up_the_opening_leaves_no_thread(monkeypatch) -> None:
    monkeypatch.setattr(Disk, "start", lambda self: None)  # it reads for ever
    journal = Journal(JournalPlan(Path("j"), None), lambda: IDENTITY, print)
    async with asyncio.TaskGroup() as tasks:
        opening = tasks.create_task(journal.open())
        await asyncio.sleep(0)
        opening.cancel()
    assert Disk.made.is_abandoned
    Disk.made.tells["on_open"](History())
