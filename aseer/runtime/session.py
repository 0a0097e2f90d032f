"""One rollout on the engine's thread: decisions, joined to clock, instances, reader.

    Intake      groups on their way here, from any thread
    Controller  decides: an event goes in, commands come out (`_carry_out` does them)
    Followers   hear of groups and chunks: drafts, the KV pool, length priors
    Recorder    figures; Outcome: what the reader is told at the end

Callbacks on the engine's loop never wait; methods that any thread may call say so. The
session is over when its intake is closed and every request has finished: by itself, or
earlier by `abort` (its reader reads on) or `leave` (nobody does). A decision that fails
is the rollout's failure, and not the engine's: the reader gets the error, nothing more
is decided, and the session is over once the engines have stopped its chunks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from aseer.core.commands import Abort, Blame, Command, Dispatch, Finished
from aseer.errors import RolloutClosedError, RolloutError, describe
from aseer.instance.messages import Run
from aseer.runtime.call_log import controller_of
from aseer.runtime.followers import Followers
from aseer.runtime.intake import Intake, seeded
from aseer.runtime.outcome import Outcome
from aseer.runtime.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aseer.context import LengthPriors
    from aseer.core.columns import Columns
    from aseer.dgds.server import DraftServer
    from aseer.instance.messages import Report
    from aseer.report import Progress, RolloutReport
    from aseer.runtime.call_log import CallLog
    from aseer.runtime.calls import Settings
    from aseer.runtime.instances import InstancePool
    from aseer.runtime.journal import Journal
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.mailbox import Mailbox
    from aseer.runtime.metrics import Figures
    from aseer.types import (
        ChunkId,
        GroupId,
        GroupKey,
        InstanceId,
        InstanceInfo,
        InstanceLoad,
        Past,
        Response,
        Task,
    )

_log = logging.getLogger("aseer")

# Requests that are ended in one turn of the engine's loop: some tens of milliseconds.
_CANCEL_AT_ONCE = 1000


class Session:
    """A rollout in progress."""

    def __init__(
        self,
        *,
        pool: InstancePool,
        mailbox: Mailbox[Response],
        settings: Settings,
        post: Callable[[Callable[[], object]], bool],
        draft_server: DraftServer | None = None,
        kv_pool: KvPools | None = None,
        length_priors: LengthPriors | None = None,
        call_log: CallLog | None = None,
        journal: Journal | None = None,
        seeds: Random | None = None,
        checks_integrity: bool = False,
    ) -> None:
        """Begin, without instances: each is told of by `instance_up`.

        Args:
            post: runs a function on the loop, soon, from any thread; False if the loop
                has ended.
            checks_integrity: whether the books are compared after each event.
        """
        self._pool = pool
        self._checks_integrity = checks_integrity
        self._mailbox = mailbox
        self.weight_version = weight_version = settings.weight_version
        self._controller = controller_of(settings, call_log)
        self._recorder = Recorder(
            self._controller,
            settings.policy,
            settings.chunk_size,
            weight_version,
            kv_pool,
        )
        self._followers = Followers(
            self._controller,
            weight_version=weight_version,
            rollout_id=settings.first_chunk_id,  # no other rollout has that chunk
            draft_server=draft_server,
            kv_pool=kv_pool,
            priors=length_priors,
        )
        self._journal = journal
        self._seeds = seeds or Random()
        self._started_at = time.monotonic()
        self._post = post
        self._intake = Intake(
            lambda add: post(lambda: self.guarded(add)),
            self._add,
            journal.in_parts if journal is not None else None,
            self._end_if_over,
        )
        self._cancelled_early: set[GroupId] = set()  # before they had arrived
        self._left = False  # by its reader: nothing is delivered any more
        self._ends_early = False  # groups that come now are cancelled, too
        self._failure: Exception | None = None  # nothing is decided any more
        self._outcome = Outcome()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.report: RolloutReport | None = None
        self.progress: Progress = self._recorder.progress(0.0, intake_open=True)
        if call_log is not None:
            self.over.add_done_callback(lambda _: call_log.close())
        if journal is not None:
            self.over.add_done_callback(lambda _: journal.abandon())

    @property
    def next_chunk_id(self) -> int:
        return self._controller.buffer.next_chunk_id

    def was_left(self, asker: object) -> bool:
        """Whether its user walked away from it, as far as the asking task can know."""
        if self.over.done():  # it ended just now, and is in nobody's way
            return True
        mailbox = self._mailbox
        return self._left or mailbox.is_closed or mailbox.was_given_up_by(asker)

    def is_held_up_by(self, asker: object) -> bool:
        """Whether it cannot end before the asking task or thread reads on."""
        return self._intake.is_open and self._mailbox.is_held_up_by(asker)

    def description(self) -> str:
        """The rollout in a few words, for whoever wants the engine meanwhile."""
        num = self._controller.num_unfinished
        return f"with {num} unfinished requests" if num else "that waits for groups"

    def count_into(self, figures: Figures) -> None:
        """Add what the rollout has done so far."""
        self._recorder.count_into(figures)

    # From the user

    def offer(self, tasks: list[Task]) -> bool:
        """Hand groups over, from any thread; False if no more are taken.

        What was taken yields a response a request, whatever happens.
        """
        return self._intake.offer(tasks)

    def check_group(self, key: GroupKey) -> None:
        """See that a group fits the rollout's journal; from any thread.

        Raises:
            ConfigError: it does not.
        """
        if self._journal is not None:
            self._journal.check_group(key)

    def _add(self, tasks: list[Task]) -> None:
        if self._left or self._failure is not None:
            self._end_if_over()
            return
        tasks = self._followers.prepared(tasks)
        past: dict[GroupId, dict[int, Past]] = {}
        if self._journal is not None:
            tasks, past = self._journal.add_groups(tasks)
        tasks = [seeded(task, self._seeds) for task in tasks]
        commands = self._controller.add_groups(tasks, self._now(), past)
        self._followers.added(tasks, past)
        self._carry_out(commands)
        if self._outcome.fatal is not None:
            self._carry_out(self._controller.fail_all(self._now(), self._outcome.fatal))
        elif self._ends_early:  # since the offer
            self._cancel_some()
        for task in tasks:
            if task.group_id in self._cancelled_early:
                self._cancelled_early.discard(task.group_id)
                self._carry_out(
                    self._controller.cancel_group(task.group_id, self._now())
                )

    def close_intake_soon(self) -> None:
        """No more groups will be offered; from any thread."""
        self._post(lambda: self.guarded(self._close_intake))

    def _close_intake(self) -> None:
        self._intake.close()
        self._end_if_over()

    def cancel(self, group_id: GroupId) -> None:
        """End a group early; one that is over is left alone."""
        if self._failure is not None:
            return
        if self._controller.buffer.has_group(group_id):
            self._carry_out(self._controller.cancel_group(group_id, self._now()))
        elif not self._intake.is_over:  # it is on its way here
            self._cancelled_early.add(group_id)

    def leave(self) -> None:
        """Its reader is gone: abort, and deliver nothing. May be called again."""
        if not self._left:
            self._left = True
            self._mailbox.close(
                RolloutClosedError(
                    "this rollout was ended, since the task that read it gave up "
                    "waiting and went on to something else"
                )
            )
            self.abort()

    def engine_closes(self) -> None:
        """Finish every request as aborted, then tell the reader of the engine's end."""
        self._outcome.engine_closed = True
        self.abort()

    def abort(self) -> None:
        """Finish every request as aborted, with its tokens. May be called again."""
        self._ends_early = True
        self._intake.close()
        if self._failure is None and not self.over.done():
            self.guarded(self._cancel_some)

    def _cancel_some(self) -> None:
        """End requests early, and go on later, so that others get their turn."""
        if self._failure is not None or self.over.done():
            return
        self._carry_out(self._controller.cancel_all(self._now(), _CANCEL_AT_ONCE))
        if not self._controller.is_cancelled:
            self._post(lambda: self.guarded(self._cancel_some))

    # When something goes wrong

    def guarded(self, decide: Callable[[], object]) -> None:
        """Run a decision; if it fails, this rollout does, and nothing else."""
        try:
            decide()
        except Exception as error:
            _log.exception("a rollout failed")
            failure = RolloutError(f"the rollout failed: {describe(error)}")
            failure.__cause__ = error
            self.fail(failure)

    def fail(self, error: Exception) -> None:
        """End the rollout with an error for its reader, and have the engines stop."""
        if self.over.done() or self._failure is not None:
            return
        self._failure = error
        self._intake.close()
        self._mailbox.close(error)
        self._pool.abort_all()
        self._end_if_over()

    def give_up(self) -> None:
        """Be over now, although the engines have not stopped its work."""
        self.fail(RolloutError("the engines did not stop this rollout's work"))
        if not self.over.done():
            self._end()

    # From the pool

    def instance_up(self, info: InstanceInfo, load: InstanceLoad) -> None:
        """An instance takes work; what its load counts so far is earlier rollouts'."""
        if self._failure is not None:
            return
        self._recorder.instance_up(info, load)
        self._carry_out(self._controller.instance_up(info, self._now()))

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        """Take what an instance says of its chunks, and how busy it is."""
        if self._failure is not None:
            self._end_if_over()
            return
        now = self._now()
        commands = self._controller.progress(report.chunks, now)
        self._recorder.count_tokens(instance_id)
        self._carry_out(commands, report=report.chunks)
        self._recorder.sample(instance_id, report.load, now)
        progress = self._recorder.progress(now, intake_open=self._intake.is_open)
        if progress is not self.progress:
            self._followers.progressed(self._recorder)
        self.progress = progress

    def instance_down(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId] = ()
    ) -> None:
        """An instance has died; see `Controller.instance_down`."""
        down = partial(self._controller.instance_down, why=why, partners=partners)
        self._lose(down, instance_id, *partners)

    def instance_left(self, instance_id: InstanceId, why: str) -> None:
        """An instance is gone with its node; see `Controller.instance_left`."""
        self._lose(partial(self._controller.instance_left, why=why), instance_id)

    def _lose(self, decide: Callable[..., list[Command]], *gone: InstanceId) -> None:
        if self._failure is not None:
            self._end_if_over()
            return
        for each in gone:
            self._recorder.instance_down(each, self._now())
        lost = [c for i in gone for c in self._controller.running.chunks_on(i)]
        self._carry_out(decide(gone[0], self._now()), lost=lost)

    def exhausted(self, why: str) -> None:
        """No instance is left: every unfinished request ends as an error."""
        self._outcome.fatal = why
        self._intake.close()
        if self._failure is None:
            self._carry_out(self._controller.fail_all(self._now(), why))
        else:
            self._end_if_over()

    def _now(self) -> float:
        return time.monotonic() - self._started_at

    def _carry_out(
        self,
        commands: Sequence[Command],
        *,
        report: Columns | None = None,
        lost: Sequence[ChunkId] = (),
    ) -> None:
        if self._journal is not None:
            self._journal.record(commands, report=report, lost=lost)
        for command in commands:
            match command:
                case Dispatch(chunk):
                    after = self._followers.dispatched(chunk)
                    self._pool.run_chunk(chunk.instance_id, Run(chunk), after)
                case Abort(instance_id, chunk_id):
                    self._pool.abort_chunks(instance_id, [chunk_id])
                case Finished(response):
                    self._finish(response)
                case Blame(num_deaths):
                    self._pool.forgive(num_deaths)
        if self._checks_integrity:
            self._controller.check_integrity()
        self._recorder.mark_busy(self._now())
        self._end_if_over()

    def _finish(self, response: Response) -> None:
        self._recorder.finished(response)
        self._followers.finished(response, self._recorder.any_instance())
        self._outcome.count(response)
        if self._journal is None:
            self._deliver(response)
        else:
            self._journal.after(lambda: self._deliver(response))

    def _deliver(self, response: Response) -> None:
        if not self._left:
            self._mailbox.put(response)

    def _end_if_over(self) -> None:
        if self.over.done() or not self._intake.is_over:
            return
        if self._failure is not None:
            if self._pool.is_idle and self._is_journal_closed():
                self._end()
            return
        if self._controller.num_unfinished or not self._is_journal_closed():
            return
        now = self._now()
        restarts = [self._pool.num_restarts(i) for i in self._recorder.instance_ids()]
        self.report = self._recorder.report(now, restarts)
        if self._journal is not None:
            self.report = replace(self.report, journal_error=self._journal.error)
        self.progress = self._recorder.progress(now, intake_open=False, is_over=True)
        self._end()
        num_finished = self._controller.counters.num_finished
        self._mailbox.close(self._outcome.error(num_finished, was_left=self._left))

    def _end(self) -> None:
        """Let go of what groups had, such as images: users may keep a rollout long."""
        self._controller.forget_finished()
        self._controller.buffer.let_go()
        self.over.set_result(None)

    def _is_journal_closed(self) -> bool:
        """Whether all is written; if not, `_end_if_over` is called again once it is."""
        return self._journal is None or self._journal.close(
            lambda: self.guarded(self._end_if_over)
        )
