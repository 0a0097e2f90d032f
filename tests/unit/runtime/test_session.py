"""A session between user and pool: every order of events ends it, and once."""

from __future__ import annotations

import asyncio
import gc
import weakref
from array import array
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from aseer.context import LengthPriors
from aseer.core._native import TokenLog
from aseer.core.columns import columns_of
from aseer.errors import (
    EngineClosedError,
    InstanceLostError,
    RolloutClosedError,
    RolloutError,
)
from aseer.instance.messages import Report
from aseer.kv.messages import PoolCounts
from aseer.runtime.calls import Settings
from aseer.runtime.mailbox import Mailbox
from aseer.runtime.session import Session
from aseer.types import GroupId, InstanceId, InstanceLoad
from tests.unit.builders import info_of, report_of, task_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.core.outputs import Outputs
    from aseer.instance.messages import Run
    from aseer.types import Chunk, ChunkId, Response

A, B = InstanceId(0), InstanceId(1)


class Pool:
    """Keeps what it is told; chunks run until the test says how they end."""

    def __init__(self) -> None:
        self.running: dict[int, Chunk] = {}
        self.aborted: list[int] = []
        self.forgiven: list[int] = []

    def run_chunk(
        self, instance_id: InstanceId, message: Run, after: object = None
    ) -> None:
        assert message.chunk.instance_id == instance_id
        self.running[message.chunk.chunk_id] = message.chunk

    def abort_chunks(self, instance_id: InstanceId, chunk_ids: list[ChunkId]) -> None:
        self.aborted += chunk_ids

    def abort_all(self) -> None:
        self.aborted += self.running

    @property
    def is_idle(self) -> bool:
        return not self.running

    def num_restarts(self, instance_id: InstanceId) -> int:
        return 0

    def forgive(self, num_deaths: int) -> None:
        self.forgiven.append(num_deaths)


class Weakly:
    """What a weak reference can be had to."""


class Rolling:
    """A session; what it posts is done when the test says so."""

    def __init__(
        self,
        *,
        num_instances: int = 2,
        chunk_size: int = 8,
        first_chunk_id: int = 100,
        kv_pool: Any = None,
        **parts: Any,
    ) -> None:
        self.pool = Pool()
        self.mailbox: Mailbox[Response] = Mailbox()
        self.posted: list[Callable[[], object]] = []
        self.has_ended = False
        self.session = Session(
            pool=self.pool,  # type: ignore[arg-type]
            mailbox=self.mailbox,
            post=self.post,
            settings=Settings(
                policy="context-aware",
                chunk_size=chunk_size,
                max_request_retries=1,
                weight_version=3,
                first_chunk_id=first_chunk_id,
                granularity=kv_pool.granularity if kv_pool else None,
            ),
            kv_pool=kv_pool,
            **parts,
        )
        for i in range(num_instances):
            self.session.instance_up(info_of(i), InstanceLoad())

    def post(self, function: Callable[[], object]) -> bool:
        if self.has_ended:
            return False
        self.posted.append(function)
        return True

    def work(self) -> None:
        """Do what was posted, and what that posts."""
        while self.posted:
            self.posted.pop(0)()

    def offer(self, *names: str, **task: Any) -> bool:
        settings = {"num_requests": 2, "max_tokens": 8} | task
        return self.session.offer([task_of(name, **settings) for name in names])

    def end(self, chunk_id: int, reason: str = "length") -> None:
        chunk = self.pool.running.pop(chunk_id)
        num = chunk.max_tokens if reason == "length" else 1
        report = report_of(chunk_id, range(num), end=reason)
        self.session.instance_report(
            chunk.instance_id, Report(columns_of([report]), InstanceLoad())
        )

    def end_all(self, reason: str = "length") -> None:
        while self.pool.running:
            self.end(next(iter(self.pool.running)), reason)

    def kill(self, instance_id: InstanceId) -> None:
        """As the pool does it: it is idle before its owner hears of the death."""
        running = self.pool.running
        for chunk_id in [c for c, k in running.items() if k.instance_id == instance_id]:
            del running[chunk_id]
        self.session.instance_down(instance_id, "killed by a test")

    @property
    def is_over(self) -> bool:
        return self.session.over.done()

    async def read(self) -> list[tuple[str, str]]:
        read = []
        while self.mailbox._items:
            response = await self.mailbox.get()
            read.append((response.request_id, response.finish_reason))
        return sorted(read)


BOTH = ["g/0", "g/1"]


def each(reason: str) -> list[tuple[str, str]]:
    return [(name, reason) for name in BOTH]


async def test_it_is_over_once_the_intake_is_closed_and_all_is_finished() -> None:
    rolling = Rolling()
    assert rolling.offer("g")
    rolling.work()
    rolling.end_all()
    assert not rolling.is_over
    rolling.session.close_intake_soon()
    assert not rolling.is_over
    rolling.work()
    assert rolling.is_over
    assert rolling.mailbox.error is None
    assert await rolling.read() == each("length")
    report = rolling.session.report
    assert report is not None
    assert (report.num_responses, report.weight_version) == (2, 3)
    assert rolling.session.next_chunk_id == 102


async def test_an_offer_that_is_on_its_way_keeps_it_open() -> None:
    rolling = Rolling()
    assert rolling.offer("g")
    rolling.session._close_intake()
    assert not rolling.is_over
    assert not rolling.offer("h")
    rolling.work()
    rolling.end_all()
    assert rolling.is_over


async def test_what_is_offered_after_the_close_is_refused() -> None:
    rolling = Rolling()
    rolling.session.close_intake_soon()
    rolling.work()
    assert rolling.is_over
    assert not rolling.offer("g")
    assert rolling.mailbox.is_closed


async def test_an_offer_to_a_thread_that_has_ended_is_refused_and_not_waited_for() -> (
    None
):
    rolling = Rolling()
    rolling.has_ended = True
    assert not rolling.offer("g")
    rolling.session._close_intake()
    assert rolling.is_over


async def test_a_cancel_that_overtakes_its_group_ends_it_when_it_comes() -> None:
    rolling = Rolling()
    rolling.session.cancel(GroupId("g"))
    rolling.offer("g", "h")
    rolling.work()
    assert {c.group_id for c in rolling.pool.running.values()} == {"g", "h"}
    running = dict(rolling.pool.running)
    assert {running[c].group_id for c in rolling.pool.aborted} == {"g"}
    for chunk_id in list(rolling.pool.aborted):
        rolling.end(chunk_id, "aborted")
    rolling.end_all()
    assert await rolling.read() == [
        *each("aborted"),
        ("h/0", "length"),
        ("h/1", "length"),
    ]


async def test_a_group_that_is_over_can_be_cancelled_to_no_effect() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    rolling.end_all()
    for _ in range(2):
        rolling.session.guarded(lambda: rolling.session.cancel(GroupId("g")))
    rolling.offer("h")
    rolling.work()
    rolling.session.cancel(GroupId("g"))
    assert rolling.mailbox.error is None
    assert rolling.pool.aborted == []


async def test_leaving_ends_it_once_the_engines_have_stopped() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    rolling.session.leave()
    rolling.session.leave()
    rolling.work()
    assert sorted(rolling.pool.aborted) == [100, 101]
    assert not rolling.is_over
    assert rolling.session.was_left(None)
    rolling.end_all("aborted")
    assert rolling.is_over
    assert isinstance(rolling.mailbox.error, RolloutClosedError)
    assert await rolling.read() == []


async def test_what_was_offered_before_it_was_left_starts_nothing() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.session.leave()
    assert not rolling.is_over
    rolling.work()
    assert rolling.pool.running == {}
    assert rolling.is_over


async def test_an_abort_yields_a_response_for_all_that_was_taken() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    rolling.offer("h")
    rolling.session.abort()
    rolling.work()
    rolling.end_all("aborted")
    assert rolling.is_over
    assert [r for _, r in await rolling.read()] == ["aborted"] * 4
    assert rolling.mailbox.error is None


async def test_many_requests_are_ended_a_part_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr("aseer.runtime.session._CANCEL_AT_ONCE", 2)
    rolling = Rolling(num_instances=0)
    rolling.offer(*"abcdef")
    rolling.work()
    rolling.session.abort()
    assert len(rolling.mailbox._items) == 2
    assert len(rolling.posted) == 1
    rolling.work()
    assert rolling.is_over
    assert len(await rolling.read()) == 12


async def test_a_closing_engine_tells_its_reader_why_after_the_responses() -> None:
    rolling = Rolling(num_instances=0)
    rolling.offer("g")
    rolling.work()
    rolling.session.engine_closes()
    rolling.work()
    assert await rolling.read() == each("aborted")
    assert isinstance(rolling.mailbox.error, EngineClosedError)


# What goes wrong


async def test_requests_that_end_in_errors_are_counted_at_the_end() -> None:
    rolling = Rolling()
    rolling.offer("g", "h")
    rolling.work()
    rolling.end(100, "error")
    rolling.end_all()
    rolling.session._close_intake()
    assert isinstance(rolling.mailbox.error, RolloutError)
    assert "1 of 4 requests ended in an error" in str(rolling.mailbox.error)


async def test_a_lost_instances_work_goes_elsewhere() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    rolling.kill(A)
    assert {c.instance_id for c in rolling.pool.running.values()} == {B}
    rolling.end_all()
    while rolling.pool.running:
        rolling.end_all()
    rolling.session._close_intake()
    assert rolling.is_over
    assert await rolling.read() == each("length")


async def test_when_nothing_can_run_any_more_what_was_taken_ends_as_errors() -> None:
    rolling = Rolling(num_instances=1)
    rolling.offer("g")
    rolling.work()
    rolling.offer("h")
    rolling.kill(A)
    rolling.session.exhausted("no instance is left")
    assert not rolling.is_over  # a group is on its way
    rolling.work()
    assert rolling.is_over
    assert [r for _, r in await rolling.read()] == ["error"] * 4
    assert isinstance(rolling.mailbox.error, InstanceLostError)
    assert not rolling.offer("i")


CALLBACKS: list[tuple[str, Callable[[Rolling], object]]] = [
    ("instance_up", lambda r: r.session.instance_up(info_of(5), InstanceLoad())),
    ("progress", lambda r: r.end(100)),
    ("instance_down", lambda r: r.kill(A)),
    ("add_groups", lambda r: (r.offer("h"), r.work())),
    ("cancel_group", lambda r: r.session.cancel(GroupId("g"))),
    ("cancel_all", lambda r: r.session.abort()),
    ("fail_all", lambda r: r.session.exhausted("why")),
]


@pytest.mark.parametrize(("name", "call"), CALLBACKS, ids=[n for n, _ in CALLBACKS])
async def test_an_error_in_any_decision_fails_it_and_stops_its_work(
    monkeypatch, name, call
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("a bug")

    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    monkeypatch.setattr(f"aseer.controller.Controller.{name}", fail)
    rolling.session.guarded(lambda: call(rolling))
    monkeypatch.undo()
    assert isinstance(rolling.mailbox.error, RolloutError)
    assert isinstance(rolling.mailbox.error.__cause__, KeyError)
    assert set(rolling.pool.running) <= set(rolling.pool.aborted)
    # Whatever comes after it finds a failed rollout, and ends it.
    rolling.session.cancel(GroupId("g"))
    rolling.session.instance_up(info_of(7), InstanceLoad())
    assert not rolling.offer("z")
    rolling.end_all("aborted")
    rolling.kill(B)
    assert rolling.is_over
    assert rolling.session.report is None
    rolling.session.leave()
    rolling.session.abort()
    rolling.work()


@pytest.mark.parametrize("is_checked", [True, False])
async def test_books_that_do_not_agree_fail_the_rollout_if_they_are_compared(
    is_checked: bool,
) -> None:
    rolling = Rolling(checks_integrity=is_checked)
    rolling.offer("g")
    rolling.work()
    rolling.session._controller.buffer.num_unfinished += 1
    rolling.session.guarded(lambda: rolling.end(next(iter(rolling.pool.running))))
    error = rolling.mailbox.error
    assert isinstance(error, RolloutError) == is_checked
    if error is not None:
        assert isinstance(error.__cause__, AssertionError)


async def test_what_a_group_had_goes_with_the_rollout_whoever_keeps_that() -> None:
    """Images' files are there as long as a group is, and garbage is collected late."""
    had = Weakly()
    is_there = weakref.ref(had)
    rolling = Rolling()
    rolling.offer("g", metadata=had)
    del had
    rolling.session.close_intake_soon()
    rolling.work()
    rolling.end_all()
    assert rolling.is_over
    assert await rolling.read() == each("length")
    assert is_there() is None


@pytest.mark.parametrize("fails", [False, True])
async def test_a_rollout_that_its_own_metadata_refers_to_is_freed(fails: bool) -> None:
    had = Weakly()
    is_there = weakref.ref(had)
    rolling = Rolling()
    had.rolling = rolling  # as an episode keeps the rollout it is of
    rolling.offer("a", "b", metadata=had)
    rolling.work()
    if fails:
        rolling.session.fail(KeyError("x"))
        rolling.session.give_up()
    else:
        rolling.session.close_intake_soon()
        rolling.work()
        rolling.end_all()
    assert rolling.is_over
    del had, rolling
    await asyncio.sleep(0)
    gc.collect()
    assert is_there() is None


async def test_a_group_on_its_way_to_a_rollout_that_failed_ends_it() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.session.fail(KeyError("x"))
    assert not rolling.is_over
    rolling.work()
    assert rolling.is_over
    rolling.session.fail(KeyError("y"))
    assert str(rolling.mailbox.error) == "'x'"


async def test_a_rollout_is_over_by_force_whatever_the_engines_do() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    rolling.session.give_up()
    assert rolling.is_over
    assert "did not stop" in str(rolling.mailbox.error)
    rolling.session.give_up()
    rolling.end_all("aborted")  # late, and of no more interest


async def test_a_late_report_of_a_chunk_that_is_over_changes_nothing() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    late = Report(columns_of([report_of(100, range(8), end="length")]), InstanceLoad())
    where = rolling.pool.running[100].instance_id
    rolling.end_all()
    for _ in range(2):
        rolling.session.instance_report(where, late)
    rolling.session._close_intake()
    assert await rolling.read() == each("length")
    rolling.session.instance_report(where, late)
    assert rolling.mailbox.error is None


# Who stands in the way


async def test_one_that_its_reader_gave_up_was_left_for_that_reader_alone() -> None:
    rolling = Rolling()
    rolling.offer("g")
    rolling.work()
    reader, other = Weakly(), Weakly()
    assert rolling.session.description() == "with 2 unfinished requests"
    assert not rolling.session.was_left(reader)
    rolling.mailbox.give_up(reader)
    assert rolling.session.was_left(reader)
    assert not rolling.session.was_left(other)
    assert not rolling.session.was_left(None)


async def test_one_that_is_over_stands_in_nobodys_way() -> None:
    rolling = Rolling()
    assert rolling.session.description() == "that waits for groups"
    rolling.session._close_intake()
    assert rolling.is_over
    assert rolling.session.was_left(None)


# What hears of its tokens


class Drafts:
    """Keeps what the draft server is told."""

    def __init__(self) -> None:
        self.version = -1
        self.tokens: dict[str, array[int]] = {}
        self.followed: dict[str, tuple[Outputs, int]] = {}
        self._log = TokenLog()
        self.finished: list[str] = []

    def set_weight_version(self, version: int) -> None:
        self.version = version

    def follow(
        self, group_id: str, request_id: str, outputs: Outputs, handle: int
    ) -> None:
        assert request_id.startswith(group_id)
        assert request_id not in self.followed
        self.followed[request_id] = (outputs, handle)
        outputs.share(handle)
        self._log.follow(group_id, request_id, outputs, handle, 0.0)

    def finish_group(self, group_id: str) -> None:
        self.finished.append(group_id)
        _, texts = self._log.finish(group_id)
        self.tokens |= {name: array("i", text) for name, text in texts.items()}


class Kv:
    """Keeps what the KV pool is told."""

    granularity = 4
    namespace = "x"
    num_restarts = 0
    prefetches = False

    def __init__(self) -> None:
        self.counts = PoolCounts()
        self.freed: list[tuple[int, int]] = []

    def server_of(self, instance_id: int) -> int:
        return 0

    def free(
        self,
        info: object,
        version: int,
        tokens: bytes,
        start: int,
        instances: set[int],
    ) -> None:
        assert instances <= {0, 1}
        self.freed.append((len(tokens) // 4, start))


async def test_the_draft_server_follows_every_request_once_to_its_groups_end() -> None:
    drafts = Drafts()
    rolling = Rolling(draft_server=drafts)
    assert drafts.version == 3
    rolling.offer("g", "h", max_tokens=16)
    rolling.work()
    while rolling.pool.running:
        rolling.end_all()
    assert set(drafts.tokens) == {"100:g/0", "100:g/1", "100:h/0", "100:h/1"}
    assert {len(tokens) for tokens in drafts.tokens.values()} == {16}
    assert sorted(drafts.finished) == ["100:g", "100:h"]
    assert all(len(outputs) == 0 for outputs, _ in drafts.followed.values())


async def test_the_kv_pool_frees_what_nobody_asks_for_again() -> None:
    kv = Kv()
    rolling = Rolling(kv_pool=kv, chunk_size=0)
    rolling.offer("g")
    rolling.work()
    rolling.end_all()
    (first, second) = kv.freed
    assert first[1] >= 4  # a sibling still begins with the prompt
    assert second == (12, 0)
    rolling.session._close_intake()
    assert rolling.session.report is not None
    assert rolling.session.report.kv is not None


async def test_a_finished_group_teaches_its_prompts_next_rollout() -> None:
    priors = LengthPriors()
    rolling = Rolling(length_priors=priors)
    rolling.offer("g")
    rolling.work()
    rolling.end_all()
    assert priors.get(task_of("g").prompt) == 8


async def test_what_starts_over_draws_the_same_random_numbers_again() -> None:
    """Else short responses had two chances to end before their instance is lost."""
    rolling = Rolling()
    rolling.offer("u", undivided_because="bad_words")
    rolling.offer("own", undivided_because="bad_words", seed=7)
    rolling.offer("d")
    rolling.work()
    first = {c.request_id: c for c in rolling.pool.running.values()}
    assert first["u/0"].seed not in (None, first["u/1"].seed)
    assert first["own/0"].seed != first["u/0"].seed
    assert first["d/0"].seed is None, "it goes on where it was"
    rolling.kill(first["u/0"].instance_id)
    rolling.work()
    again = {c.request_id: c for c in rolling.pool.running.values()}
    assert again["u/0"].chunk_id != first["u/0"].chunk_id
    assert again["u/0"].seed == first["u/0"].seed
    rolling.session.give_up()


async def test_engines_with_a_seed_repeat_what_starts_over() -> None:
    seeds = []
    for settings in ({}, {}, {"seeds": Random(5)}, {"seeds": Random(5)}):
        rolling = Rolling(**settings)
        rolling.offer("u", num_requests=1, undivided_because="bad_words")
        rolling.work()
        seeds += [chunk.seed for chunk in rolling.pool.running.values()]
        rolling.session.give_up()
    assert len(set(seeds)) == 3
    assert seeds[2] == seeds[3]
