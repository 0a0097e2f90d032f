"""A rollout's life, as far as both of its forms share it (`aseer.runtime.rollout`).

It is opened once, on the engine's thread; groups go there, and responses come back; it
is read to its end, or left before.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aseer.errors import AseerError, RolloutClosedError
from aseer.runtime.journal import JournalPlan
from aseer.runtime.mailbox import Mailbox
from aseer.types import GroupId, Response

if TYPE_CHECKING:
    from collections.abc import Generator
    from concurrent.futures import Future
    from pathlib import Path

    from aseer.config import PolicyName
    from aseer.report import Progress, RolloutReport
    from aseer.runtime.group_source import GroupSource
    from aseer.runtime.host import Host
    from aseer.runtime.loop_thread import LoopThread
    from aseer.runtime.session import Session
    from aseer.runtime.steps import Step


class Work:
    """What both forms of a rollout share: its life, its groups, its figures.

    `_lock` guards what several of the user's threads may touch; it is reentrant, since
    an iterator may be collected anywhere.

    Attributes:
        source: the user's groups. mailbox: the responses so far.
        session: the same rollout on the engine's thread; None until it has begun.
        was_left, is_read: how it was over for its reader, if it is.
    """

    def __init__(
        self,
        *,
        thread: LoopThread,
        host: Host,
        source: GroupSource,
        policy: PolicyName,
        chunk_size: int,
        journal: Path | None = None,
    ) -> None:
        self._thread = thread
        self._host = host
        self._how = (policy, chunk_size)
        self._journal = (
            None if journal is None else JournalPlan(path=journal, keys=source.keys)
        )
        self._lock = threading.RLock()
        self._opening: Future[Session] | None = None
        self._cancelled_early: set[str] = set()
        self._groups: dict[str, list[Response]] = {}
        self.mailbox: Mailbox[Response] = Mailbox()
        self.mailbox.needs_reader = lambda: source.needs_reader
        self.source = source
        self.session: Session | None = None
        self.was_left = False
        self.is_read = False

    @property
    def report(self) -> RolloutReport:
        report = self.session.report if self.session is not None else None
        if report is None:
            raise AseerError("the rollout is not finished; iterate it to its end first")
        return report

    @property
    def is_over(self) -> bool:
        """Whether the rollout came to its own end, and so has a report."""
        return self.session is not None and self.session.report is not None

    def progress(self) -> Progress | None:
        return self.session.progress if self.session is not None else None

    def cancel(self, group_id: str) -> None:
        """See `Rollout.cancel`."""
        self._check_here()
        self.source.check_known(group_id)
        with self._lock:
            session = self.session
            if session is None:
                self._cancelled_early.add(group_id)
                return
        self._post_cancel(session, group_id)

    def open(self, asker: object) -> Future[Session]:
        """The session to come; the same one when a wait for it was broken off."""
        self._check_here()
        with self._lock:  # who leaves meanwhile must know of it
            self.check_not_left()
            opening = self._opening
            if opening is None or _failed(opening):
                host, mailbox, how = self._host, self.mailbox, self._how
                journal = self._journal
                self._opening = opening = self._thread.submit(
                    lambda: host.rollouts.begin(mailbox, *how, asker, journal)
                )
            return opening

    def begin(self, session: Session) -> None:
        """The session is there: it gets the groups, and what was cancelled so far."""
        with self._lock:
            if self.was_left or self.session is not None:
                return
            self.session = session
            self.source.begin(session)
            while self._cancelled_early:
                self._post_cancel(session, self._cancelled_early.pop())

    def ended(self) -> Response:
        """A response of a group that came too late to run, once the mailbox is closed
        and empty; call it again for the next.

        Raises:
            StopIteration: there is none, and nothing went wrong.
            RolloutClosedError: the rollout was left meanwhile.
            Exception: what went wrong, with the user's groups or the rollout.
        """
        self.check_not_left()
        response = self.source.next_refused()
        if response is not None:
            return response
        self.is_read = True
        self.source.raise_error()
        raise self.mailbox.error or StopIteration

    def complete_group(self, response: Response) -> list[Response] | None:
        """The response's group, by index, if this was its last."""
        with self._lock:
            members = self._groups.setdefault(response.group_id, [])
            members.append(response)
            if len(members) < self.source.size_of(response.group_id):
                return None
            del self._groups[response.group_id]
        return sorted(members, key=lambda r: r.index)

    def leave(self) -> None:
        """Stop the work, from any thread; nobody will read on. May be called again."""
        if not self._thread.is_here:  # nor may the fork wait for locks of its parent's
            return
        with self._lock:
            if self.was_left or self.is_read:
                return
            self.was_left = True
            session, opening = self.session, self._opening
        self.mailbox.close()
        self.source.stop()
        if session is not None:
            self._thread.post(session.leave)
        elif opening is not None:
            opening.add_done_callback(self._leave_opened)
            self._thread.cancel(opening)

    def check_not_left(self) -> None:
        """See that responses are still to be had.

        Raises:
            RolloutClosedError: the rollout was left.
            EngineClosedError: this process was forked from the one that has it.
        """
        self._check_here()
        if self.was_left:
            raise RolloutClosedError(
                "this rollout was left before its end (its loop ended early, or it was "
                "closed), and its work was stopped; begin another with Engine.rollout"
            )

    def close(self) -> Generator[Step, Any, None]:
        """Leave, and wait until the engines have stopped the work (see `steps`)."""
        if not self._thread.is_here:
            return
        self.leave()
        opening, host = self._opening, self._host
        with suppress(AseerError):  # it never began, or the engine has ended
            if opening is not None:
                session: Session = yield opening
                yield self._thread.submit(lambda: host.rollouts.drain(session))

    def _check_here(self) -> None:
        if not self._thread.is_here:
            raise self._thread.closed_error()

    def _post_cancel(self, session: Session, group_id: str) -> None:
        self._thread.post(
            lambda: session.guarded(lambda: session.cancel(GroupId(group_id)))
        )

    def _leave_opened(self, opening: Future[Session]) -> None:
        if not _failed(opening):
            self._thread.post(opening.result().leave)


def _failed(opening: Future[Session]) -> bool:
    return opening.done() and opening.exception() is not None
