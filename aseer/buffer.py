"""Every request's state: what it has generated, where it runs, what it went through.

                 start_chunk               chunk ended by stop / limit / error / cancel
      WAITING ----------------> RUNNING ---------------------------------> FINISHED_*
       ^   |                       |
       |   | cancel, no instance   | chunk over, instance lost
       |   +--> FINISHED_ABORTED,  |
       |        FINISHED_ERROR     |
       +---------------------------+

Invariants: a request finishes exactly once (I1); tokens, logprobs and text only ever
grow, and have one logprob a token. Reports may be lost, late, doubled or overtaken
(`intake.py`): a chunk that ends with something missing is lost, as with its instance. A
request that cannot be resumed (`undivided_because`) starts over when its instance is
lost: the one case in which tokens are dropped. A move the table does not allow raises
`InvalidTransition` with the request's story.
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

from aseer.errors import InvalidTransition
from aseer.intake import Intake
from aseer.sampling import chunk_seed
from aseer.types import (
    Assignment,
    Chunk,
    ChunkEnd,
    ChunkId,
    ChunkProgress,
    GroupId,
    InstanceId,
    RequestId,
    RequestMetrics,
    RequestState,
    Response,
    Task,
    request_id_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aseer.types import FinishReason

_S = RequestState
_MOVES = {
    _S.WAITING: (_S.RUNNING, _S.FINISHED_ABORTED, _S.FINISHED_ERROR),
    _S.RUNNING: (_S.WAITING, *(s for s in _S if s.is_finished)),
}
_STORY_LENGTH = 24

Outcome = Literal["running", "broken", "waiting", "finished"]
_MISSING = "a report of its tokens is missing or malformed"


class Request:
    """One response in the making."""

    __slots__ = (
        "_entered_at",
        "cancelled",
        "chunk",
        "error",
        "finished_at",
        "group",
        "held_text",
        "index",
        "instances",
        "intake",
        "logprobs",
        "num_cached_tokens",
        "num_recomputed_tokens",
        "num_retries",
        "queue_s",
        "request_id",
        "run_s",
        "state",
        "stop_reason",
        "story",
        "text",
        "tokens",
    )

    def __init__(
        self,
        group: Task,
        index: int,
        now: float,
        new_array: Callable[[str], array[Any]],
    ) -> None:
        self.group = group
        self.index = index
        self.request_id: RequestId = request_id_of(group.group_id, index)
        self.state = RequestState.WAITING
        self.tokens: array[int] = new_array("i")
        self.logprobs: array[float] = new_array("f")
        self.text: list[str] = []
        self.held_text = ""
        self.chunk: Chunk | None = None
        self.intake = self.new_intake(0)  # of the reports of the latest chunk
        self.cancelled = False
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.instances: list[InstanceId] = []
        self.num_cached_tokens = 0
        self.num_recomputed_tokens = 0
        self.num_retries = 0
        self.queue_s = 0.0
        self.run_s = 0.0
        self.finished_at = 0.0
        self._entered_at = now
        self.story: list[tuple[float, RequestState, object]] = []

    @property
    def is_probe(self) -> bool:
        return self.index == 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated."""
        return self.group.num_prompt_tokens + len(self.tokens)

    @property
    def remaining(self) -> int:
        """The most it may still generate."""
        return self.group.max_tokens - len(self.tokens)

    def new_intake(self, max_tokens: int) -> Intake:
        """For a chunk that may generate so many tokens."""
        return Intake(self.tokens, self.logprobs, self.text, max_tokens)

    def move(self, state: RequestState, now: float, why: object) -> None:
        """Change state and account the time spent in the old one.

        Raises:
            InvalidTransition: the table does not allow it.
        """
        if state not in _MOVES.get(self.state, ()):
            raise InvalidTransition(
                f"request {self.request_id} cannot go from {self.state.name} to "
                f"{state.name} ({why}); its story: {self.story_text()}"
            )
        spent = now - self._entered_at
        if self.state is RequestState.WAITING:
            self.queue_s += spent
        else:
            self.run_s += spent
        self._entered_at = now
        self.state = state
        if len(self.story) == _STORY_LENGTH:
            del self.story[0]
        self.story.append((now, state, why))
        if state.is_finished:
            self.finished_at = now

    def story_text(self) -> str:
        """The last moves, for a message."""
        moves = [f"{now:.3f} s {state.name} ({why})" for now, state, why in self.story]
        return "; ".join(moves) or "never moved"

    def start_over(self) -> None:
        """Drop what was generated."""
        del self.tokens[:], self.logprobs[:], self.text[:]

    def to_response(self, weight_version: int) -> Response:
        """What the user gets; the request must be finished."""
        assert self.state.is_finished
        return Response(
            group_id=self.group.group_id,
            index=self.index,
            prompt_token_ids=array("i", self.group.prompt).tolist(),
            token_ids=self.tokens.tolist(),
            logprobs=self.logprobs.tolist(),
            text="".join(self.text) + self.held_text,
            finish_reason=cast("FinishReason", self.state.value),
            stop_reason=self.stop_reason,
            weight_version=weight_version,
            metrics=self._metrics(),
            metadata=self.group.metadata,
            error=self.error,
        )

    def _metrics(self) -> RequestMetrics:
        places = self.instances
        return RequestMetrics(
            queue_s=self.queue_s,
            run_s=self.run_s,
            finished_at_s=self.finished_at,
            num_chunks=len(places),
            num_migrations=sum(a != b for a, b in pairwise(places)),
            num_retries=self.num_retries,
            instances=[int(i) for i in places],
            num_cached_tokens=self.num_cached_tokens,
            num_recomputed_tokens=self.num_recomputed_tokens,
        )


def aborted_responses(task: Task, weight_version: int) -> list[Response]:
    """The responses of a group that never began."""
    requests = [Request(task, i, 0.0, array) for i in range(task.num_requests)]
    for request in requests:
        request.move(RequestState.FINISHED_ABORTED, 0.0, "it never began")
    return [request.to_response(weight_version) for request in requests]


class RequestBuffer:
    """The requests of one rollout, by id; the chunks that run, by id."""

    def __init__(
        self,
        *,
        max_request_retries: int,
        first_chunk_id: int = 0,
        weight_version: int = 0,
        new_array: Callable[[str], array[Any]] = array,
    ) -> None:
        """Start empty.

        Args:
            max_request_retries: lost instances a request survives.
            first_chunk_id: chunk ids continue from here, unique over an engine's life;
                it names the rollout, too.
            weight_version: of the weights that chunks are to run with.
            new_array: makes an empty array of a type code; a simulation's arrays only
                count.
        """
        self._max_retries = max_request_retries
        self._new_array = new_array
        self._next_chunk_id = first_chunk_id
        self._rollout_id = first_chunk_id
        self._weight_version = weight_version
        self._requests: dict[RequestId, Request] = {}
        self._groups: dict[GroupId, list[Request]] = {}
        self._chunks: dict[ChunkId, Request] = {}
        self.num_unfinished = 0

    def __getitem__(self, request_id: RequestId) -> Request:
        return self._requests[request_id]

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def next_chunk_id(self) -> int:
        return self._next_chunk_id

    def requests(self) -> Iterator[Request]:
        """All of them, in order of arrival."""
        return iter(self._requests.values())

    def group(self, group_id: GroupId) -> list[Request]:
        """A group's requests by index.

        Raises:
            KeyError: no such group.
        """
        return self._groups[group_id]

    def has_group(self, group_id: GroupId) -> bool:
        """Whether the group was added."""
        return group_id in self._groups

    def chunk_owner(self, chunk_id: ChunkId) -> Request | None:
        """The request whose chunk runs under that id; None if it is over."""
        return self._chunks.get(chunk_id)

    def add_group(self, task: Task, now: float) -> list[Request]:
        """Split a group into its requests, all WAITING; the first is the probe."""
        requests = [
            Request(task, i, now, self._new_array) for i in range(task.num_requests)
        ]
        self._groups[task.group_id] = requests
        self._requests.update((r.request_id, r) for r in requests)
        self.num_unfinished += len(requests)
        return requests

    def start_chunk(self, assignment: Assignment, now: float) -> Chunk:
        """A waiting request starts its next chunk."""
        request = self._requests[assignment.request_id]
        task = request.group
        done = len(request.tokens)
        seed = task.seed
        chunk = Chunk(
            chunk_id=ChunkId(self._next_chunk_id),
            request_id=request.request_id,
            group_id=task.group_id,
            instance_id=assignment.instance_id,
            prompt=task.prompt,
            generated=request.tokens.tobytes(),
            max_tokens=assignment.max_tokens,
            min_tokens=min(max(0, task.min_tokens - done), assignment.max_tokens),
            sampling=task.sampling,
            seed=None if seed is None else chunk_seed(seed, request.index, done),
            num_reserved_blocks=assignment.num_reserved_blocks,
            rollout_id=self._rollout_id,
            weight_version=self._weight_version,
        )
        request.move(RequestState.RUNNING, now, assignment)
        self._next_chunk_id += 1
        self._chunks[chunk.chunk_id] = request
        request.chunk = chunk
        request.intake = request.new_intake(chunk.max_tokens)
        request.instances.append(chunk.instance_id)
        return chunk

    def progress(self, report: ChunkProgress, now: float) -> Outcome | None:
        """Take a running chunk's new tokens, and its end if it is over.

        Returns:
            The request's state after it; None for a chunk that is over already.
            `broken`, once a chunk: it is to be aborted, and is lost when it ends.
        """
        request = self._chunks.get(report.chunk_id)
        if request is None:
            return None
        intake, end = request.intake, report.end
        was_broken = intake.is_broken
        follows = intake.take(report)
        if end is None:
            return "running" if follows or was_broken else "broken"
        if not follows:
            return self.lose_chunk(report.chunk_id, now, _MISSING)
        if end.reason == "aborted" and not request.cancelled:
            why = _MISSING if was_broken else "its engine aborted it"
            return self.lose_chunk(report.chunk_id, now, why)
        return self._end_chunk(request, end, now)

    def lose_chunk(self, chunk_id: ChunkId, now: float, why: str) -> Outcome:
        """A chunk died with its instance; what can be resumed from is kept."""
        request = self._chunks[chunk_id]
        request.num_retries += 1
        if request.remaining == 0:
            end = ChunkEnd(reason="length")
        elif request.num_retries > self._max_retries and not request.cancelled:
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
            assert len(r.tokens) == len(r.logprobs), r.request_id
            assert 0 <= r.remaining, r.request_id
        unfinished = sum(not r.state.is_finished for r in self._requests.values())
        assert unfinished == self.num_unfinished

    def _end_chunk(self, request: Request, end: ChunkEnd, now: float) -> Outcome:
        chunk, num_cached = request.chunk, request.intake.num_cached_tokens
        assert chunk is not None
        if num_cached is not None:
            self._count_cached(request, chunk, num_cached)
        del self._chunks[chunk.chunk_id]
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
