"""What a journal tells, read from its beginning: pure, a record at a time.

Reports are taken by the same native code that takes them in a rollout, in the same
order, so what a request has here is what it had there.

What was generated belongs to the weights that generated it: there is a state for each
fingerprint, and a rollout goes on with the state of its own weights only (I4). A record
that does not fit those before it is damage (`Damaged`), as a wrong checksum is.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from aseer.core.outputs import Outputs
from aseer.journal.frames import frames_in, is_followed
from aseer.journal.records import (
    FORMAT,
    Begin,
    Done,
    Groups,
    Lost,
    Record,
    Started,
    Taken,
    decode,
)
from aseer.types import Past

if TYPE_CHECKING:
    from mmap import mmap

    from aseer.journal.records import Start
    from aseer.types import GroupKey


class Damaged(ValueError):
    """A record does not fit those before it."""


class OtherFormat(ValueError):
    """The journal is of another version of aseer."""


class Weights(NamedTuple):
    """What identifies weights: the version that the trainer gave, and their content."""

    version: int
    fingerprint: str


class _Request:
    """What is known of one request."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.chunk_id: int | None = None
        self.held_text = ""
        self.done: Done | None = None


class _State:
    """What was generated with one set of weights."""

    def __init__(self, nonce: bytes) -> None:
        self.nonce = nonce
        self.num_lives = 0
        self.outputs = Outputs()
        self.requests: dict[int, dict[int, _Request]] = {}  # by group, by index
        self.chunks: dict[int, _Request] = {}

    def end_chunks(self) -> None:
        """Whatever ran, it runs no more."""
        for chunk_id in list(self.chunks):
            self.end_chunk(chunk_id)

    def end_chunk(self, chunk_id: int) -> _Request | None:
        self.outputs.end(chunk_id)
        request = self.chunks.pop(chunk_id, None)
        if request is not None:
            request.chunk_id = None
        return request

    def start(self, start: Start) -> None:
        members = self.requests.setdefault(start.group, {})
        request = members.get(start.index)
        if request is None:
            request = members[start.index] = _Request(self.outputs.open())
        if request.done is not None:
            raise Damaged("a request runs that has ended")
        if request.chunk_id is not None:
            self.end_chunk(request.chunk_id)
        if start.num_before == 0:
            self.outputs.clear(request.handle)
        elif start.num_before != self.outputs.num_tokens(request.handle):
            raise Damaged("a chunk begins where its request had not come to")
        self.outputs.begin(start.chunk_id, request.handle, start.max_tokens)
        request.held_text = ""
        request.chunk_id = start.chunk_id
        self.chunks[start.chunk_id] = request

    def take(self, report: Taken) -> None:
        columns = report.report
        _, refused = self.outputs.take_columns(columns)
        ids = array("q", columns.chunk_ids)
        for place, end in columns.ends:
            if not 0 <= place < len(ids):
                continue
            request = self.end_chunk(ids[place])
            if request is not None and place not in refused and end.reason == "length":
                request.held_text = end.held_text

    def finish(self, done: Done) -> None:
        request = self.requests.get(done.group, {}).get(done.index)
        if request is None or request.done is not None:
            raise Damaged("a request ends that did not run")
        if request.chunk_id is not None:
            self.end_chunk(request.chunk_id)
        if self.outputs.num_tokens(request.handle) != done.num_tokens:
            raise Damaged("a request ends with other tokens than it generated")
        request.done = done

    def pop(self, group: int) -> dict[int, Past]:
        """What a group's requests have, by index; it is forgotten here."""
        found = {}
        for index, request in self.requests.pop(group, {}).items():
            if request.chunk_id is not None:  # it ran when the run broke off
                self.end_chunk(request.chunk_id)
            outputs, handle, done = self.outputs, request.handle, request.done
            past = Past(
                tokens=outputs.tokens(handle),
                logprobs=outputs.logprobs(handle),
                text=outputs.text(handle),
                held_text=request.held_text if done is None else done.held_text,
                finish_reason=None if done is None else done.reason,
                stop_reason=None if done is None else done.stop_reason,
                metrics=None if done is None else done.metrics,
            )
            outputs.close(handle)
            if past.finish_reason is not None or past.tokens:
                found[index] = past
        return found


class History:
    """What a journal tells."""

    def __init__(self) -> None:
        """It is empty."""
        self.begin: Begin | None = None  # the first
        self.keys: list[GroupKey] = []  # by number
        self.numbers: dict[GroupKey, int] = {}
        self._states: dict[Weights, _State] = {}
        self._state: _State | None = None

    def apply(self, records: list[Record]) -> None:
        """Take an event.

        Raises:
            Damaged: it does not fit those before it.
            OtherFormat: it is of another version.
        """
        try:
            for record in records:
                self._apply(record)
        except (Damaged, OtherFormat):
            raise
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            raise Damaged(str(error)) from error

    def _apply(self, record: Record) -> None:
        if isinstance(record, Begin):
            self._begin(record)
            return
        state = self._state
        if state is None:
            raise Damaged("something happens before the rollout begins")
        match record:
            case Groups(keys):
                self.add_groups(keys)
            case Started(chunks):
                for start in chunks:
                    if not self._has_request(start.group, start.index):
                        raise Damaged("a request runs of a group that did not come")
                    state.start(start)
            case Taken():
                state.take(record)
            case Lost(chunk_ids):
                for chunk_id in chunk_ids:
                    state.end_chunk(chunk_id)
            case Done():
                state.finish(record)

    def _has_request(self, group: int, index: int) -> bool:
        is_known = 0 <= group < len(self.keys)
        return is_known and 0 <= index < self.keys[group].num_requests

    def _begin(self, begin: Begin) -> None:
        if begin.format != FORMAT:
            raise OtherFormat(
                f"it is of format {begin.format}, and this aseer reads format {FORMAT}"
            )
        self.begin = self.begin or begin
        if self._state is not None:
            self._state.end_chunks()
        weights = Weights(begin.weight_version, begin.weights)
        self._state = self._states.setdefault(weights, _State(begin.nonce))
        self._state.num_lives += 1

    def add_groups(self, keys: list[GroupKey]) -> None:
        """Groups came that were not known."""
        for key in keys:
            if key in self.numbers:
                raise Damaged("a group comes twice")
            self.numbers[key] = len(self.keys)
            self.keys.append(key)

    def weights(self) -> list[Weights]:
        """Weights that anything was generated with."""
        return [weights for weights, s in self._states.items() if s.requests]

    def num_lives(self, weights: Weights) -> int:
        """How often a rollout with these weights was begun."""
        state = self._states.get(weights)
        return 0 if state is None else state.num_lives

    def nonce(self, weights: Weights) -> bytes | None:
        """Of the first rollout with these weights."""
        state = self._states.get(weights)
        return None if state is None else state.nonce

    def pop(self, key: GroupKey, weights: Weights) -> dict[int, Past]:
        """What a group's requests have of these weights, by index; told only once."""
        state, number = self._states.get(weights), self.numbers.get(key)
        return {} if state is None or number is None else state.pop(number)

    def keep_only(self, weights: Weights) -> None:
        """Free what other weights have generated."""
        self._states = {w: s for w, s in self._states.items() if w == weights}

    def has_finished(self, key: GroupKey, weights: Weights) -> bool:
        """Whether a response of the group is finished."""
        state, number = self._states.get(weights), self.numbers.get(key)
        if state is None or number is None:
            return False
        return any(r.done is not None for r in state.requests.get(number, {}).values())


class Reading(NamedTuple):
    """A journal that was read.

    Attributes:
        end: where what counts ends.
        damage: why what is behind it does not count; empty if nothing is there, or only
            the remains of one write.
    """

    history: History
    end: int
    damage: str


def read(data: bytes | mmap) -> Reading:
    """Read a journal, up to the first frame that does not count.

    Raises:
        OtherFormat: it is of another version.
    """
    history, end = History(), 0
    for payload, frame_end in frames_in(data):
        try:
            history.apply(decode(payload))
        except (Damaged, msgspec.DecodeError) as error:
            return Reading(_again(data, end), end, str(error))
        end = frame_end
    is_damaged = end < len(data) and is_followed(data, end)
    return Reading(history, end, "a checksum is wrong" if is_damaged else "")


def _again(data: bytes | mmap, end: int) -> History:
    """What whole events up to `end` tell: of the next one, a part was applied."""
    history = History()
    for payload, frame_end in frames_in(data):
        if frame_end > end:
            break
        history.apply(decode(payload))
    return history
