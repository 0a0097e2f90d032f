"""Whatever happens to chunks, a request keeps its tokens and finishes exactly once."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from aseer.buffer import Request, RequestBuffer
from aseer.errors import InvalidTransition
from aseer.types import Assignment, ChunkProgress, InstanceId, RequestId, RequestState
from tests.unit.builders import report_of, taken_by, task_of

MAX_RETRIES = 2
ENDS = ["stop", "length", "error", "aborted"]


@dataclass
class Expected:
    """What is known of a request from what was done to it."""

    tokens: list[int] = field(default_factory=list)
    num_chunks: int = 0
    num_lost: int = 0
    finished: str | None = None


class BufferMachine(RuleBasedStateMachine):
    """Chunks start, report, end, get lost; reports come late and twice."""

    waiting = Bundle("waiting")
    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.buffer = RequestBuffer(max_request_retries=MAX_RETRIES)
        self.expected: dict[RequestId, Expected] = {}
        self.old: list[ChunkProgress] = []
        self.now = 0.0

    @rule(
        target=waiting,
        size=st.integers(1, 3),
        max_tokens=st.integers(1, 12),
        undivided=st.booleans(),
    )
    def add_group(self, size: int, max_tokens: int, undivided: bool) -> object:
        task = task_of(
            f"g{len(self.expected)}",
            num_requests=size,
            max_tokens=max_tokens,
            undivided_because="bad_words" if undivided else None,
        )
        requests = self.buffer.add_group(task, self.tick())
        self.expected.update((r.request_id, Expected()) for r in requests)
        return multiple(*requests)

    @rule(target=running, request=consumes(waiting), where=st.integers(0, 3))
    def start_chunk(self, request: Request, where: int) -> Request:
        expected = self.expected[request.request_id]
        assignment = Assignment(request.request_id, InstanceId(where), 100, 1)
        chunk = self.buffer.start_chunk(assignment, self.tick())
        assert chunk.generated == report_of(0, expected.tokens).tokens
        expected.num_chunks += 1
        return request

    @rule(request=running, num_tokens=st.integers(0, 12))
    def report(self, request: Request, num_tokens: int) -> None:
        report = self.make_report(request, num_tokens, None)
        if report is not None:
            assert taken_by(self.buffer, report, self.tick()) == "running"

    @rule(
        target=waiting,
        request=consumes(running),
        num_tokens=st.integers(0, 12),
        end=st.sampled_from(ENDS),
        cancel=st.booleans(),
    )
    def end_chunk(
        self, request: Request, num_tokens: int, end: str, cancel: bool
    ) -> object:
        request.cancelled |= cancel
        report = self.make_report(request, num_tokens, end)
        if report is None:
            return multiple()
        outcome = taken_by(self.buffer, report, self.tick())
        self.old.append(report)
        made_nothing = not (report.start or report.tokens) and request.remaining > 0
        if (end == "aborted" and not request.cancelled) or (
            end == "length" and made_nothing
        ):
            return self.expect_loss(request, outcome)
        expected = self.expected[request.request_id]
        if end == "length" and request.remaining:
            end = "aborted" if request.cancelled else "waiting"
        return self.expect(request, outcome, expected, end)

    @rule(target=waiting, request=consumes(running), cancel=st.booleans())
    def lose_chunk(self, request: Request, cancel: bool) -> object:
        if request.chunk is None:
            return multiple()
        request.cancelled |= cancel
        self.old.append(report_of(request.chunk.chunk_id, [7], end="stop"))
        outcome = self.buffer.lose_chunk(request.chunk.chunk_id, self.tick(), "lost")
        return self.expect_loss(request, outcome)

    @rule(request=consumes(waiting), failed=st.booleans())
    def finish_waiting(self, request: Request, failed: bool) -> None:
        state = RequestState.FINISHED_ERROR if failed else RequestState.FINISHED_ABORTED
        self.buffer.finish_waiting(request, state, self.tick(), "enough")
        self.expected[request.request_id].finished = "error" if failed else "aborted"

    @rule(pick=st.integers(0, 1000))
    def late_report(self, pick: int) -> None:
        if self.old:
            report = self.old[pick % len(self.old)]
            assert taken_by(self.buffer, report, self.tick()) is None

    @rule(pick=st.integers(0, 1000))
    def impossible_start(self, pick: int) -> None:
        moving = [r for r in self.buffer.requests() if r.state is not _WAITING]
        if moving:
            request = moving[pick % len(moving)]
            assignment = Assignment(request.request_id, InstanceId(0), 1, 1)
            with pytest.raises(InvalidTransition, match=request.request_id):
                self.buffer.start_chunk(assignment, self.tick())

    @invariant()
    def integrity_holds(self) -> None:
        self.buffer.check_integrity()

    @invariant()
    def requests_are_as_expected(self) -> None:
        num_unfinished = 0
        for request_id, expected in self.expected.items():
            request = self.buffer[request_id]
            tokens = array("i", request.generated).tolist()
            assert tokens == expected.tokens
            assert len(request.instances) == expected.num_chunks
            assert request.num_retries == expected.num_lost
            assert request.state.is_finished == (expected.finished is not None)
            num_unfinished += not expected.finished
            if expected.finished:
                response = request.to_response(0)
                assert response.finish_reason == expected.finished
                assert response.token_ids == expected.tokens
                assert response.logprobs == [-t for t in expected.tokens]
                assert response.metrics.num_chunks == expected.num_chunks
                spent = response.metrics.queue_s + response.metrics.run_s
                assert spent <= self.now
        assert self.buffer.num_unfinished == num_unfinished

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def make_report(
        self, request: Request, num_tokens: int, end: str | None
    ) -> ChunkProgress | None:
        if request.chunk is None:
            return None
        expected = self.expected[request.request_id]
        start = len(expected.tokens)
        tokens = range(start, start + min(num_tokens, request.remaining))
        expected.tokens += tokens
        error = {"error": "bad luck"} if end == "error" else {}
        at_start = len(request.chunk.generated) // 4
        return report_of(
            request.chunk.chunk_id, tokens, start=start - at_start, end=end, **error
        )

    def expect_loss(self, request: Request, outcome: object) -> object:
        expected = self.expected[request.request_id]
        expected.num_lost += 1
        if not request.remaining:
            return self.expect(request, outcome, expected, "length")
        if request.cancelled:
            return self.expect(request, outcome, expected, "aborted")
        if expected.num_lost > MAX_RETRIES:
            return self.expect(request, outcome, expected, "error")
        if request.group.undivided_because:
            expected.tokens.clear()
        return self.expect(request, outcome, expected, "waiting")

    def expect(
        self, request: Request, outcome: object, expected: Expected, end: str
    ) -> object:
        if end == "waiting":
            assert outcome == "waiting"
            return request
        assert outcome == "finished"
        expected.finished = end
        return multiple()


_WAITING = RequestState.WAITING
BufferMachine.TestCase.settings = settings(stateful_step_count=40)
TestBufferMachine = BufferMachine.TestCase
