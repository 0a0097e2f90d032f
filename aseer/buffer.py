"""The requests of a rollout and the chunks that run, by id (`request.py`: one's life).

A finished request gives up what it generated with its `Response`, and of a finished
group only the id is kept, so that it is not taken twice: a rollout that goes on for
ever holds what is unfinished.

Invariants: a request finishes exactly once (I1); tokens, logprobs and text only ever
grow, and have one logprob a token. Reports may be lost, late, doubled or overtaken
(`columns.py`): a chunk that ends with something missing is lost, as with its instance.
A request that cannot be resumed (`undivided_because`) starts over when its instance is
lost: the one case in which tokens are dropped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from aseer.core._native import untracked
from aseer.core.outputs import Outputs
from aseer.core.request import Request, aborted_responses
from aseer.sampling import chunk_seed
from aseer.types import (
    Assignment,
    Chunk,
    ChunkEnd,
    ChunkId,
    GroupId,
    RequestId,
    RequestState,
    Task,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from aseer.core.columns import Columns
    from aseer.types import Past

__all__ = ["News", "Outcome", "Request", "RequestBuffer", "Taken", "aborted_responses"]

Outcome = Literal["running", "broken", "waiting", "finished"]
_MISSING = "a report of its tokens is missing or malformed"


class News(NamedTuple):
    """What a report says of a chunk besides its tokens.

    Attributes:
        is_refused: its tokens did not follow, and were not taken.
    """

    chunk_id: ChunkId
    is_refused: bool
    num_cached_tokens: int | None
    end: ChunkEnd | None


class Taken(NamedTuple):
    """What was new in a report.

    Attributes:
        news: of chunks of which more is to be said than their tokens, in the report's
            order.
    """

    num_tokens: int
    news: list[News]


class RequestBuffer:
    """The requests of one rollout, by id; the chunks that run, by id."""

    def __init__(
        self,
        *,
        max_request_retries: int,
        first_chunk_id: int = 0,
        weight_version: int = 0,
        outputs: Outputs | None = None,
    ) -> None:
        """Start empty.

        Args:
            max_request_retries: lost instances a request survives.
            first_chunk_id: chunk ids continue from here, unique over an engine's life;
                it names the rollout, too.
            weight_version: of the weights that chunks are to run with.
            outputs: keeps what requests generate; a simulation's only counts.
        """
        self._max_retries = max_request_retries
        self._outputs = Outputs() if outputs is None else outputs
        self._next_chunk_id = first_chunk_id
        self._rollout_id = first_chunk_id
        self._weight_version = weight_version
        self._requests: dict[RequestId, Request] = {}
        self._groups: dict[GroupId, list[Request]] = {}
        # Forgotten but for their ids.
        self._finished_groups: set[GroupId] = untracked(set())
        self._chunks: dict[ChunkId, Request] = {}
        self._num_requests = 0
        self.num_unfinished = 0

    def __getitem__(self, request_id: RequestId) -> Request:
        return self._requests[request_id]

    def __len__(self) -> int:
        """All that were added, the forgotten too."""
        return self._num_requests

    @property
    def next_chunk_id(self) -> int:
        return self._next_chunk_id

    def requests(self) -> Iterator[Request]:
        """All that are not forgotten, in order of arrival."""
        return iter(self._requests.values())

    def group(self, group_id: GroupId) -> list[Request]:
        """A group's requests by index; none if it is forgotten.

        Raises:
            KeyError: no such group.
        """
        if group_id in self._finished_groups:
            return []
        return self._groups[group_id]

    def has_group(self, group_id: GroupId) -> bool:
        """Whether the group was added."""
        return group_id in self._groups or group_id in self._finished_groups

    @property
    def chunk_owner(self) -> Callable[[ChunkId], Request | None]:
        """Tells the request whose chunk runs under an id; None if it is over."""
        return self._chunks.get

    def add_group(
        self, task: Task, now: float, past: Mapping[int, Past] | None = None
    ) -> list[Request]:
        """Split a group into its requests, WAITING; the first is the probe.

        Args:
            past: what requests had in an earlier run, by index; such requests go on
                from there, or are finished already.
        Raises:
            ValueError: the group was added before.
        """
        if self.has_group(task.group_id):
            raise ValueError(f"group {task.group_id!r} is in this rollout already")
        requests = untracked(
            [Request(task, i, now, self._outputs) for i in range(task.num_requests)]
        )
        for index, had in (past or {}).items():
            requests[index].restore(had, now)
        self._groups[task.group_id] = requests
        self._requests.update((r.request_id, r) for r in requests)
        for each in (task, self._groups, self._requests):
            untracked(each)
        self.num_unfinished += sum(not r.state.is_finished for r in requests)
        self._num_requests += len(requests)
        return requests

    def forget_group(self, group_id: GroupId, *, was_taken: bool = True) -> None:
        """Keep nothing of a group that is finished but its id.

        Args:
            was_taken: False = it is as if it had never come.
        """
        requests = self._groups.pop(group_id, [])
        for request in requests:
            del self._requests[request.request_id]
            request.drop_output()
        if was_taken:
            self._finished_groups.add(group_id)
        else:
            self.num_unfinished -= sum(not r.state.is_finished for r in requests)
            self._num_requests -= len(requests)

    def let_go(self) -> None:
        """Nothing more is decided: drop what users gave with unfinished groups.

        Their metadata may refer to the rollout, and so be in a cycle with requests, at
        which the garbage collector does not look.
        """
        for requests in self._groups.values():
            task = replace(requests[0].group, metadata=None, images=())
            for request in requests:
                request.group = task

    def start_chunk(self, assignment: Assignment, now: float) -> Chunk:
        """A waiting request starts its next chunk."""
        request = self._requests[assignment.request_id]
        task = request.group
        done = request.num_generated
        seed = task.seed
        chunk = untracked(
            Chunk(
                chunk_id=ChunkId(self._next_chunk_id),
                request_id=request.request_id,
                group_id=task.group_id,
                instance_id=assignment.instance_id,
                prompt=task.prompt,
                generated=request.generated,
                max_tokens=assignment.max_tokens,
                min_tokens=min(max(0, task.min_tokens - done), assignment.max_tokens),
                sampling=task.sampling,
                seed=None if seed is None else chunk_seed(seed, request.index, done),
                num_reserved_blocks=assignment.num_reserved_blocks,
                rollout_id=self._rollout_id,
                weight_version=self._weight_version,
                images=task.images,
            )
        )
        request.move(RequestState.RUNNING, now, assignment)
        self._next_chunk_id += 1
        self._chunks[chunk.chunk_id] = request
        untracked(self._chunks)
        request.begin(chunk)
        return chunk

    def take(self, report: Columns) -> Taken:
        """Append what running chunks generated; `settle` the chunks that it names."""
        num_tokens, refused = self._outputs.take_columns(report)
        if not (refused or report.cached or report.ends):
            return Taken(num_tokens, [])
        cached, ends = dict(report.cached), dict(report.ends)
        num_chunks, failed = report.num_chunks, set(refused)
        return Taken(
            num_tokens,
            [
                News(report.chunk_id_at(i), i in failed, cached.get(i), ends.get(i))
                for i in sorted(failed.union(cached, ends))
                if 0 <= i < num_chunks
            ],
        )

    def settle(self, news: News, now: float) -> Outcome | None:
        """Take what else a report says of a chunk: its end, if it is over.

        Returns:
            The request's state after it; None for a chunk that is over already.
            `broken`, once a chunk: it is to be aborted, and is lost when it ends.
        """
        chunk_id, refused, num_cached, end = news
        request = self._chunks.get(chunk_id)
        if request is None:
            return None
        was_broken = request.is_broken
        if refused:
            request.is_broken = True
        elif request.cached_by_chunk is None:
            request.cached_by_chunk = num_cached
        if end is None:
            return "broken" if refused and not was_broken else "running"
        if refused:
            return self.lose_chunk(chunk_id, now, _MISSING)
        if end.reason == "aborted" and not request.cancelled:
            why = _MISSING if was_broken else "its engine aborted it"
            return self.lose_chunk(chunk_id, now, why)
        if end.reason == "length" and self._made_nothing(request):
            return self.lose_chunk(chunk_id, now, "its engine made no token")
        return self._end_chunk(request, end, now)

    def longest_running(self) -> tuple[RequestId, int] | None:
        """The running request with the most tokens, and how many."""
        chunk_id, num_tokens = self._outputs.longest_running()
        if chunk_id < 0:
            return None
        return self._chunks[ChunkId(chunk_id)].request_id, num_tokens

    def lose_chunk(
        self, chunk_id: ChunkId, now: float, why: str, *, is_blamed: bool = True
    ) -> Outcome:
        """A chunk died with its instance; what can be resumed from is kept.

        Args:
            is_blamed: whether the request may have been the cause; if not, it goes on
                however often it was lost.
        """
        request = self._chunks[chunk_id]
        request.num_retries += 1
        if request.remaining == 0:
            end = ChunkEnd(reason="length")
        elif (
            is_blamed
            and request.num_retries > self._max_retries
            and not request.cancelled
        ):
            end = ChunkEnd(
                reason="error",
                error=f"it was lost {request.num_retries} times while running: {why}",
            )
        else:
            end = ChunkEnd(reason="aborted")
        outcome = self._end_chunk(request, end, now)
        if outcome == "waiting" and request.group.undivided_because is not None:
            request.start_over()
        return outcome

    def finish_waiting(
        self, request: Request, state: RequestState, now: float, why: str
    ) -> None:
        """End a request that is not running."""
        assert request.chunk is None, request.story_text()
        request.move(state, now, why)
        if state is RequestState.FINISHED_ERROR:
            request.error = why
        self.num_unfinished -= 1

    def check_integrity(self) -> None:
        """Assert what must always hold; changes nothing."""
        running = {r.request_id for r in self._chunks.values()}
        for r in self._requests.values():
            assert (r.state is RequestState.RUNNING) == (r.request_id in running), (
                r.story_text()
            )
            assert 0 <= r.remaining, r.request_id
        assert len(self._chunks) == self._outputs.num_running
        unfinished = sum(not r.state.is_finished for r in self._requests.values())
        assert unfinished == self.num_unfinished

    def _made_nothing(self, request: Request) -> bool:
        """Whether its chunk had room for tokens and made none; it would go on so."""
        num_before = len(request.running.generated) // 4
        return request.remaining > 0 and request.num_generated == num_before

    def _end_chunk(self, request: Request, end: ChunkEnd, now: float) -> Outcome:
        chunk, num_cached = request.running, request.cached_by_chunk
        if num_cached is not None:
            self._count_cached(request, chunk, num_cached)
        del self._chunks[chunk.chunk_id]
        self._outputs.end(chunk.chunk_id)
        request.chunk = None
        request.held_text = end.held_text
        state = self._state_after(request, end)
        request.move(state, now, end.error or end.reason)
        if state is RequestState.WAITING:
            return "waiting"
        request.stop_reason = end.stop_reason
        request.error = end.error
        self.num_unfinished -= 1
        return "finished"

    def _state_after(self, request: Request, end: ChunkEnd) -> RequestState:
        if end.reason == "stop":
            return RequestState.FINISHED_STOPPED
        if end.reason == "error":
            return RequestState.FINISHED_ERROR
        if end.reason == "length" and request.remaining == 0:
            return RequestState.FINISHED_LENGTH_CAPPED
        if request.cancelled:
            return RequestState.FINISHED_ABORTED
        return RequestState.WAITING

    def _count_cached(self, request: Request, chunk: Chunk, num_cached: int) -> None:
        request.num_cached_tokens += num_cached
        if len(request.instances) > 1:  # the last token's KV was never computed before
            at_start = (len(chunk.prompt) + len(chunk.generated)) // 4
            request.num_recomputed_tokens += max(0, at_start - 1 - num_cached)
