"""One response in the making: its state, what it has generated, what it went through.

                 start_chunk               chunk ended by stop / limit / error / cancel
      WAITING ----------------> RUNNING ---------------------------------> FINISHED_*
       ^   |                       |
       |   | cancel, no instance   | chunk over, instance lost
       |   +--> FINISHED_ABORTED,  |
       |        FINISHED_ERROR     |
       +---------------------------+

A move the table does not allow raises `InvalidTransition` with the request's story.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from aseer.core._native import untracked
from aseer.core.outputs import Outputs, numbers_of
from aseer.errors import InvalidTransition
from aseer.inputs.prompt_image import without_images
from aseer.types import (
    Chunk,
    InstanceId,
    RequestId,
    RequestMetrics,
    RequestState,
    Response,
    Task,
    request_id_of,
)

if TYPE_CHECKING:
    from aseer.types import FinishReason, Past

_S = RequestState
_MOVES = {
    _S.WAITING: (_S.RUNNING, _S.FINISHED_ABORTED, _S.FINISHED_ERROR),
    _S.RUNNING: (_S.WAITING, *(s for s in _S if s.is_finished)),
}
_STORY_LENGTH = 24


class Request:
    """One response in the making.

    Attributes:
        chunk: that runs; None between two.
        is_broken: a report of the chunk was refused.
        is_replayed: it was finished in an earlier run of the rollout.
        cached_by_chunk: `num_cached_tokens` of the chunk; None until it is reported.
    """

    __slots__ = (
        "_entered_at",
        "_handle",
        "_outputs",
        "cached_by_chunk",
        "cancelled",
        "chunk",
        "error",
        "finished_at",
        "group",
        "held_text",
        "index",
        "instances",
        "is_broken",
        "is_replayed",
        "num_cached_tokens",
        "num_recomputed_tokens",
        "num_retries",
        "past_metrics",
        "queue_s",
        "request_id",
        "run_s",
        "state",
        "stop_reason",
        "story",
    )

    def __init__(
        self,
        group: Task,
        index: int,
        now: float,
        outputs: Outputs,
    ) -> None:
        """It waits, and has generated nothing."""
        self.group = group
        self.index = index
        self.request_id: RequestId = request_id_of(group.group_id, index)
        self.state = RequestState.WAITING
        self._outputs = outputs
        self._handle = outputs.open()
        self.held_text = ""
        self.chunk: Chunk | None = None
        self.is_broken = False
        self.is_replayed = False
        self.past_metrics: RequestMetrics | None = None
        self.cached_by_chunk: int | None = None
        self.cancelled = False
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.instances: list[InstanceId] = untracked([])
        self.num_cached_tokens = 0
        self.num_recomputed_tokens = 0
        self.num_retries = 0
        self.queue_s = 0.0
        self.run_s = 0.0
        self.finished_at = 0.0
        self._entered_at = now
        self.story: list[tuple[float, RequestState, object]] = untracked([])
        untracked(self)  # its task's metadata: see `RequestBuffer.let_go`

    @property
    def is_probe(self) -> bool:
        return self.index == 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated."""
        return self.group.num_prompt_tokens + self.num_generated

    @property
    def num_generated(self) -> int:
        """Tokens so far; 0 once the user has the response."""
        return 0 if self._handle < 0 else self._outputs.num_tokens(self._handle)

    @property
    def generated(self) -> bytes:
        """The tokens so far, int32."""
        return b"" if self._handle < 0 else self._outputs.tokens(self._handle)

    @property
    def source(self) -> tuple[Outputs, int]:
        """Where its tokens are kept; of a request that is not over."""
        return self._outputs, self._handle

    @property
    def remaining(self) -> int:
        """The most it may still generate."""
        return self.group.max_tokens - self.num_generated

    def restore(self, past: Past, now: float) -> None:
        """Go on from what it had in an earlier run, or be finished as it was there.

        What cannot be gone on with starts over.
        """
        is_finished = past.finish_reason is not None
        is_partial = self.group.undivided_because is None and (
            past.num_tokens < self.group.max_tokens
        )
        if not (is_finished or is_partial):
            return
        self._outputs.restore(self._handle, past)
        self.held_text = past.held_text
        if past.finish_reason is not None:
            self.is_replayed = True
            self.state = RequestState(past.finish_reason)
            self.stop_reason = past.stop_reason
            self.past_metrics = past.metrics
            self.finished_at = now

    @property
    def running(self) -> Chunk:
        """The chunk that runs.

        Raises:
            InvalidTransition: none does.
        """
        if self.chunk is None:
            raise InvalidTransition(f"no chunk runs: {self.story_text()}")
        return self.chunk

    def begin(self, chunk: Chunk) -> None:
        """Its next chunk runs, and will report."""
        self._outputs.begin(chunk.chunk_id, self._handle, chunk.max_tokens)
        self.chunk = chunk
        self.is_broken = False
        self.cached_by_chunk = None
        self.instances.append(chunk.instance_id)

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
        self.story.append(untracked((now, state, why)))
        if state.is_finished:
            self.finished_at = now

    def story_text(self) -> str:
        """The last moves, for a message."""
        moves = [f"{now:.3f} s {state.name} ({why})" for now, state, why in self.story]
        return "; ".join(moves) or "never moved"

    def start_over(self) -> None:
        """Drop what was generated."""
        self._outputs.clear(self._handle)

    def drop_output(self) -> None:
        """The user has the response: keep only how it ended."""
        if self._handle >= 0:
            self._outputs.close(self._handle)
            self._handle = -1
        self.held_text = ""
        del self.story[:-1]

    def to_response(self, weight_version: int) -> Response:
        """What the user gets; the request must be finished."""
        assert self.state.is_finished
        outputs, handle = self._outputs, self._handle
        prompt, images = self.group.prompt, self.group.images
        return Response(
            group_id=self.group.group_id,
            index=self.index,
            prompt_token_ids=numbers_of("i", prompt),
            token_ids=outputs.token_ids(handle),
            logprobs=outputs.logprobs_of_tokens(handle),
            text=outputs.text(handle).decode(errors="replace") + self.held_text,
            finish_reason=cast("FinishReason", self.state.value),
            stop_reason=self.stop_reason,
            weight_version=weight_version,
            metrics=self._metrics(),
            metadata=self.group.metadata,
            error=self.error,
            replayed=self.is_replayed,
            unexpanded_prompt_token_ids=untracked(
                without_images(prompt, images).tolist()
            )
            if images
            else None,
        )

    def _metrics(self) -> RequestMetrics:
        if self.past_metrics is not None:
            return replace(self.past_metrics, finished_at_s=self.finished_at)
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
    outputs = Outputs()
    requests = [Request(task, i, 0.0, outputs) for i in range(task.num_requests)]
    for request in requests:
        request.move(RequestState.FINISHED_ABORTED, 0.0, "it never began")
    return [request.to_response(weight_version) for request in requests]
