"""A rollout's journal on the engine's loop: what the rollout decides goes in, and what
an earlier run had comes out.

A response is handed to the user once it is in the file, so that nobody has seen what a
restart would sample again. That takes a fraction of a millisecond; if the disk takes
longer than `PATIENCE_S`, or fails, or too much is waiting for it, the journal goes off
with a warning, and the rollout goes on without it. What is in the file then still
counts: it is the rollout up to some moment.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aseer.errors import ConfigError, describe
from aseer.inputs.fields import refusal
from aseer.inputs.plain import as_text
from aseer.journal.file import Writer
from aseer.journal.keys import Known, check_model
from aseer.journal.ledger import Ledger
from aseer.journal.records import Record, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aseer.core.columns import Columns
    from aseer.core.commands import Command
    from aseer.journal.history import History, Weights
    from aseer.runtime.identity import Identity
    from aseer.types import GroupId, GroupKey, Past, Task

_log = logging.getLogger("aseer")

#: Seconds that the user waits for the disk at most; then the journal goes off. A disk
#: that is well answers a sync within a tenth of it, also under load.
PATIENCE_S = 10.0
_STEP_S = 0.25
# So much may wait to be written: what 20 million tokens with their logprobs and texts
# take.
_MAX_WAITING_BYTES = 256 << 20
_NAME_CHARACTERS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
)
_MAX_NAME = 200  # a file's name takes 255
_NONCE_BYTES = 16


def journal_path(directory: Path | str | None, name: object) -> Path:
    """The file of a journal.

    Raises:
        ConfigError: there is no directory for journals, or the name cannot be a file's.
    """
    text = as_text(name)
    is_name = text and len(text) <= _MAX_NAME and not text.startswith(".")
    if not text or not is_name or not _NAME_CHARACTERS.issuperset(text):
        allowed = "a name of letters, digits, '.', '_' and '-', such as 'step-17'"
        raise refusal("journal", name, allowed)
    if directory is None:
        raise ConfigError(
            f"journal={text!r} needs a directory: EngineConfig(journal_dir=...)"
        )
    return Path(directory) / f"{text}.journal"


class JournalPlan(NamedTuple):
    """What a rollout wants of its journal.

    Attributes:
        keys: of all its groups; None = they come one by one.
    """

    path: Path
    keys: Sequence[GroupKey] | None


class Journal:
    """A journal that is open. All calls are made on the loop that opened it."""

    def __init__(
        self,
        plan: JournalPlan,
        identify: Callable[[], Identity],
        post: Callable[[Callable[[], object]], object],
    ) -> None:
        """Prepare; `open` opens it.

        Args:
            identify: may be slow, and is called on the journal's thread.
            post: does something on the loop.
        """
        self._path = plan.path
        self._plan = plan
        self._identify = identify
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[History] = self._loop.create_future()
        self._writer = Writer(
            plan.path,
            self._check,
            post,
            on_open=self._on_open,
            on_written=self._on_written,
            on_failed=lambda error: self._go_off(str(error)),
            on_closed=self._on_closed,
        )
        self._known = Known((), None)
        self._identity: Identity
        self._ledger: Ledger
        self._waiting: deque[tuple[int, int]] = deque()  # number and size of writes
        self._num_waiting_bytes = 0
        self._num_last = self._num_written = 0
        self._held: deque[tuple[int, Callable[[], object]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._num_steps = 0  # since the disk last answered
        self._when_closed: list[Callable[[], object]] = []
        self._is_closing = self._is_over = False
        #: Why the journal went off; None = it did not.
        self.error: str | None = None

    async def open(self) -> None:
        """Read what an earlier run has left, and begin.

        Raises:
            ConfigError: it is of another rollout, or cannot be used.
        """
        self._writer.start()
        try:
            history = await self._opened
        except BaseException:
            self._writer.abandon()
            raise
        model, weights, repeats = self._identity
        self._warn_of_others(history, weights)
        nonce = os.urandom(_NONCE_BYTES)
        self._ledger = Ledger(history, weights, nonce=nonce, repeats=repeats)
        self._write(self._ledger.begin(model, self._plan.keys))

    def check_group(self, key: GroupKey) -> None:
        """See that a group fits what the journal knows; from any thread.

        Raises:
            ConfigError: it does not.
        """
        try:
            self._known.check(key)
        except ConfigError as error:
            raise ConfigError(f"{error}, in {self._words}") from None

    def in_parts(self, tasks: list[Task]) -> Iterator[list[Task]]:
        """See `Ledger.in_parts`."""
        return self._ledger.in_parts(tasks)

    def add_groups(
        self, tasks: Iterable[Task]
    ) -> tuple[list[Task], dict[GroupId, dict[int, Past]]]:
        """Groups as they are to be run, and what requests of theirs have already."""
        added = self._ledger.add_groups(tasks)
        self._write(added.records)
        return added.tasks, added.past

    def record(
        self,
        commands: Iterable[Command],
        *,
        report: Columns | None = None,
        lost: Sequence[int] = (),
    ) -> None:
        """Write an event down; see `Ledger.records_of`."""
        if not self._is_over:
            self._write(self._ledger.records_of(commands, report=report, lost=lost))

    def after(self, deliver: Callable[[], object]) -> None:
        """Do something once all that was written so far is in the file."""
        if self._is_over or self._num_written == self._num_last:
            deliver()
        else:
            self._held.append((self._num_last, deliver))

    def close(self, then: Callable[[], object]) -> bool:
        """Write what is left, and end; whether it has ended. `then` is called if not
        yet.
        """
        if self._is_over:
            return True
        self._when_closed.append(then)
        if not self._is_closing:
            self._is_closing = True
            self._writer.close()
            self._watch()
        return False

    def abandon(self) -> None:
        """Wait for nothing any more. May be called again."""
        if not self._is_over:
            self._writer.abandon()
            self._end()

    # On the journal's thread

    def _check(self, history: History) -> None:
        self._identity = self._identify()
        if history.begin is None:
            return
        known = Known(history.keys, history.begin.groups)
        try:
            check_model(history.begin.model, self._identity.model)
            if self._plan.keys is not None:
                known.check_all(self._plan.keys)
        except ConfigError as error:
            raise ConfigError(
                f"{self._words} was written by another rollout: {error}; give another "
                "name, or remove the file"
            ) from None
        self._known = known

    # From the journal's thread

    def _on_open(self, opened: History | Exception) -> None:
        if self._opened.done():  # whoever waited has gone
            return
        if isinstance(opened, Exception):
            self._opened.set_exception(opened)
        else:
            self._opened.set_result(opened)

    def _on_written(self, number: int) -> None:
        self._num_written = max(self._num_written, number)
        while self._waiting and self._waiting[0][0] <= number:
            self._num_waiting_bytes -= self._waiting.popleft()[1]
        self._num_steps = 0
        self._deliver(number)

    def _on_closed(self) -> None:
        if not self._is_over:
            self._end()

    # On the loop

    @property
    def _words(self) -> str:
        return f"the journal {self._path}"

    def _warn_of_others(self, history: History, weights: Weights) -> None:
        others = [other for other in history.weights() if other != weights]
        if others:
            _log.warning(
                "%s has what was generated with other weights (version %d, %s) than "
                "the engine has now (version %d, %s); that is left out, and generated "
                "anew",
                self._words,
                *others[-1],
                *weights,
            )

    def _write(self, records: list[Record]) -> None:
        if self._is_over or not records:
            return
        try:
            data = encode(records)
        except (TypeError, ValueError) as error:  # no reason to end a rollout
            self._go_off(describe(error))
            return
        self._num_last = self._writer.write(data)
        self._waiting.append((self._num_last, len(data)))
        self._num_waiting_bytes += len(data)
        if self._num_waiting_bytes > _MAX_WAITING_BYTES:
            self._go_off("the disk is too slow for what is generated")
        else:
            self._watch()

    def _watch(self) -> None:
        """See later whether the disk has answered."""
        if self._timer is None and not self._is_over:
            self._num_steps = 0
            self._timer = self._loop.call_later(_STEP_S, self._look)

    def _look(self) -> None:
        self._timer = None
        self._num_steps += 1
        if not (self._waiting or self._is_closing):
            return
        if self._num_steps * _STEP_S >= PATIENCE_S:
            self._go_off(f"the disk has not answered for {PATIENCE_S:g} s")
        else:  # one step counts as one, however long this process was stopped
            self._timer = self._loop.call_later(_STEP_S, self._look)

    def _go_off(self, why: str) -> None:
        if not self._is_over:
            self.error = why
            _log.warning(
                "%s ends here, and the rollout goes on without it: %s",
                self._words,
                why,
            )
            self._writer.abandon()
            self._end()

    def _end(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._deliver(self._num_last)
        when_closed, self._when_closed = self._when_closed, []
        for then in when_closed:
            then()

    def _deliver(self, number: int) -> None:
        while self._held and self._held[0][0] <= number:
            self._held.popleft()[1]()
