"""What a rollout's events are in its journal, and what its past is to it: pure.

A `Ledger` is between a rollout's decisions and records: groups get their numbers and
seeds, commands become records, and what an earlier run had is handed out, once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from aseer.core.commands import Dispatch, Finished
from aseer.journal.keys import digest_of, seed_of
from aseer.journal.records import (
    FORMAT,
    Begin,
    Done,
    Groups,
    Lost,
    Record,
    Start,
    Started,
    Taken,
)
from aseer.types import GroupId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from aseer.core.columns import Columns
    from aseer.core.commands import Command
    from aseer.journal.history import History, Weights
    from aseer.types import GroupKey, Past, Task

# Groups with finished responses that are added in one turn of the engine's loop, and
# the most tokens of theirs: some tens of milliseconds.
_GROUPS_AT_ONCE = 256
_TOKENS_AT_ONCE = 1_000_000


class Added(NamedTuple):
    """Groups that came.

    Attributes:
        tasks: as they are to be run. past: what requests of theirs have already, by
            group and index. records: to be written before anything else.
    """

    tasks: list[Task]
    past: dict[GroupId, dict[int, Past]]
    records: list[Record]


class Ledger:
    """One run of a journaled rollout."""

    def __init__(
        self, history: History, weights: Weights, *, nonce: bytes, repeats: bool
    ) -> None:
        """Go on from what a journal tells; it may be nothing.

        Args:
            history: taken over; what other weights generated is dropped.
            nonce: random; used if there is none in the history.
            repeats: whether engines that start draw the same random numbers as before.
        """
        history.keep_only(weights)
        self._history = history
        self._weights = weights
        self._nonce = history.nonce(weights) or nonce
        self._life = history.num_lives(weights)
        self._repeats = repeats
        self._numbers: dict[GroupId, int] = {}

    def begin(
        self, model: dict[str, str], keys: Sequence[GroupKey] | None
    ) -> list[Record]:
        """The first event; `keys` as `JournalPlan` has them."""
        begin = Begin(
            format=FORMAT,
            model=model,
            groups=None if keys is None else digest_of(keys),
            weight_version=self._weights.version,
            weights=self._weights.fingerprint,
            nonce=self._nonce,
        )
        return [begin]

    def in_parts(self, tasks: list[Task]) -> Iterator[list[Task]]:
        """Cut groups into parts that are added in a turn each.

        Groups of which nothing is finished come first and as a whole, since they are
        scheduled as a whole.
        """
        done = [task for task in tasks if self._has_finished(task)]
        if len(done) < len(tasks):
            ids = {task.group_id for task in done}
            yield [task for task in tasks if task.group_id not in ids]
        part: list[Task] = []
        num_tokens = 0
        for task in done:
            part.append(task)
            num_tokens += task.num_requests * task.max_tokens
            if len(part) == _GROUPS_AT_ONCE or num_tokens >= _TOKENS_AT_ONCE:
                yield part
                part, num_tokens = [], 0
        if part:
            yield part

    def add_groups(self, tasks: Iterable[Task]) -> Added:
        """Groups came, which have keys."""
        history, weights = self._history, self._weights
        added = Added([self._seeded(task) for task in tasks], {}, [])
        new: list[GroupKey] = []
        for task in added.tasks:
            key = _key_of(task)
            if key not in history.numbers:
                new.append(key)
                history.add_groups([key])
            elif had := history.pop(key, weights):
                added.past[task.group_id] = had
            self._numbers[task.group_id] = history.numbers[key]
        if new:
            added.records.append(Groups(new))
        return added

    def records_of(
        self,
        commands: Iterable[Command],
        *,
        report: Columns | None = None,
        lost: Sequence[int] = (),
    ) -> list[Record]:
        """An event, with all that it caused.

        Args:
            report: of an instance, if that is what the event is.
            lost: chunks that were gone with their instance, if that is it.
        """
        records: list[Record] = []
        if report is not None and (report.tokens or report.text or report.ends):
            records.append(Taken(report))
        if lost:
            records.append(Lost(list(lost)))
        started: list[Start] = []
        for command in commands:
            match command:
                case Dispatch():
                    started.append(self._start(command))
                case Finished():
                    records += self._done(command)
        if started:
            records.append(Started(started))
        return records

    def _start(self, dispatch: Dispatch) -> Start:
        chunk = dispatch.chunk
        return Start(
            chunk.chunk_id,
            self._numbers[chunk.group_id],
            int(chunk.request_id.rpartition("/")[2]),
            len(chunk.generated) // 4,
            chunk.max_tokens,
        )

    def _done(self, finished: Finished) -> list[Record]:
        response = finished.response
        reason = response.finish_reason
        # What was aborted or failed is not finished: it goes on in the next run.
        if response.replayed or not (reason == "stop" or reason == "length"):
            return []
        done = Done(
            self._numbers[GroupId(response.group_id)],
            response.index,
            len(response.token_ids),
            reason,
            response.stop_reason,
            finished.held_text,
            response.metrics,
        )
        return [done]

    def _has_finished(self, task: Task) -> bool:
        return self._history.has_finished(_key_of(task), self._weights)

    def _seeded(self, task: Task) -> Task:
        """The group with a seed, where engines' own random numbers will not do.

        A request that cannot be resumed starts over in the next run. With other random
        numbers short responses would be the likelier ones, as they have two chances to
        end before the trainer does; with the same ones it is sampled as before. And
        engines that repeat their random numbers must not draw for this run's requests
        what they drew for the last one's.
        """
        key = _key_of(task)
        if task.seed is not None:
            return task
        if task.undivided_because is not None:
            return replace(task, seed=seed_of(self._nonce, 0, key))
        if self._repeats and self._life:
            return replace(task, seed=seed_of(self._nonce, self._life, key))
        return task


def _key_of(task: Task) -> GroupKey:
    assert task.key is not None, "a journal's groups have keys"
    return task.key
