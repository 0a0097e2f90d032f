"""A request's life: what it has, where it runs, what it went through."""

from __future__ import annotations

from array import array

import pytest

from aseer.buffer import Request, RequestBuffer
from aseer.errors import InvalidTransition
from aseer.sampling import chunk_seed
from aseer.types import (
    Assignment,
    Chunk,
    ChunkId,
    ChunkProgress,
    InstanceId,
    RequestState,
)
from tests.unit.builders import report_of, taken_by, task_of

A, B = InstanceId(0), InstanceId(1)


def tokens_of(request: Request) -> list[int]:
    return array("i", request.generated).tolist()


def buffer_of(*, max_request_retries: int = 3, **task: object) -> RequestBuffer:
    """With one group g of one request, unless told otherwise."""
    buffer = RequestBuffer(max_request_retries=max_request_retries)
    buffer.add_group(task_of(**({"num_requests": 1} | task)), now=0.0)  # type: ignore[arg-type]
    return buffer


def only(buffer: RequestBuffer) -> Request:
    (request,) = buffer.requests()
    return request


def start(
    buffer: RequestBuffer, now: float = 0.0, *, where: int = 0, max_tokens: int = 8
) -> Chunk:
    """The next chunk of the only request."""
    request = only(buffer)
    assignment = Assignment(
        request.request_id, InstanceId(where), max_tokens, num_reserved_blocks=1
    )
    return buffer.start_chunk(assignment, now)


# A life


def test_a_group_is_split_into_its_requests_the_first_is_the_probe() -> None:
    buffer = RequestBuffer(max_request_retries=3)
    requests = buffer.add_group(task_of("g", num_requests=3), now=0.0)
    assert [r.request_id for r in requests] == ["g/0", "g/1", "g/2"]
    assert [r.is_probe for r in requests] == [True, False, False]
    assert {r.state for r in requests} == {RequestState.WAITING}
    assert (len(buffer), buffer.num_unfinished) == (3, 3)
    buffer.check_integrity()


def test_a_life_in_three_chunks() -> None:
    buffer = buffer_of(max_tokens=100)
    request = only(buffer)

    first = start(buffer, now=1.0, where=0)
    assert request.state is RequestState.RUNNING
    assert (first.prompt, first.generated) == (request.group.prompt, b"")
    assert taken_by(buffer, report_of(0, [1, 2], text="ab"), now=2.0) == "running"
    end = report_of(0, [3], start=2, text_start=2, end="length", text="c")
    assert taken_by(buffer, end, now=3.0) == "waiting"

    second = start(buffer, now=5.0, where=1)
    assert second.generated == request.generated
    assert taken_by(buffer, report_of(1, [4], end="length", text="d"), 6.0) == "waiting"

    start(buffer, now=6.5, where=1)
    end = report_of(2, [5], end="stop", stop_reason=5, text="e")
    assert taken_by(buffer, end, now=8.0) == "finished"

    response = request.to_response(weight_version=7)
    assert response.token_ids == [1, 2, 3, 4, 5]
    assert response.logprobs == [-1, -2, -3, -4, -5]
    assert response.text == "abcde"
    assert (response.finish_reason, response.stop_reason) == ("stop", 5)
    assert response.prompt_token_ids == [0, 1, 2, 3]
    assert response.weight_version == 7
    metrics = response.metrics
    assert metrics.queue_s == (1 - 0) + (5 - 3) + (6.5 - 6)
    assert metrics.run_s == (3 - 1) + (6 - 5) + (8 - 6.5)
    assert metrics.finished_at_s == 8.0
    assert (metrics.instances, metrics.num_chunks) == ([0, 1, 1], 3)
    assert (metrics.num_migrations, metrics.num_retries) == (1, 0)
    assert buffer.num_unfinished == 0
    buffer.check_integrity()


def test_the_limit_is_the_requests_not_the_chunks() -> None:
    buffer = buffer_of(max_tokens=3)
    start(buffer)
    assert taken_by(buffer, report_of(0, [1, 2], end="length"), 1.0) == "waiting"
    start(buffer)
    assert taken_by(buffer, report_of(1, [3], end="length"), 2.0) == "finished"
    assert only(buffer).state is RequestState.FINISHED_LENGTH_CAPPED


def test_an_error_ends_a_request_with_what_it_has() -> None:
    buffer = buffer_of()
    start(buffer)
    end = report_of(0, [1], end="error", error="bad luck")
    assert taken_by(buffer, end, 1.0) == "finished"
    response = only(buffer).to_response(0)
    assert (response.finish_reason, response.error) == ("error", "bad luck")
    assert response.token_ids == [1]


def test_metadata_comes_back_untouched() -> None:
    metadata = object()
    buffer = buffer_of(metadata=metadata)
    start(buffer)
    taken_by(buffer, report_of(0, [1], end="stop"), 1.0)
    assert only(buffer).to_response(0).metadata is metadata


# What a chunk is told


def test_min_tokens_are_counted_over_the_response() -> None:
    buffer = buffer_of(min_tokens=11)
    told = []
    for chunk_id in range(3):
        told.append(start(buffer, max_tokens=8).min_tokens)
        taken_by(buffer, report_of(chunk_id, range(6), end="length"), 1.0)
    # 11, but a chunk cannot be asked for more than it may make; then 5 left; then none.
    assert told == [8, 5, 0]


def test_each_chunk_has_its_own_stream_of_the_groups_seed() -> None:
    buffer = buffer_of(seed=42)
    seeds = [start(buffer).seed]
    taken_by(buffer, report_of(0, [1, 2], end="length"), 1.0)
    seeds.append(start(buffer).seed)
    assert seeds == [chunk_seed(42, 0, 0), chunk_seed(42, 0, 2)]


def test_no_seed_leaves_the_stream_to_the_engine() -> None:
    assert start(buffer_of()).seed is None


def test_chunk_ids_go_on_from_where_they_are_told() -> None:
    buffer = RequestBuffer(max_request_retries=3, first_chunk_id=100)
    buffer.add_group(task_of(num_requests=1), now=0.0)
    assert start(buffer).chunk_id == 100
    assert buffer.next_chunk_id == 101


# Late and repeated reports


def test_a_report_of_a_chunk_that_is_over_changes_nothing() -> None:
    buffer = buffer_of()
    request = only(buffer)
    start(buffer)
    end = report_of(0, [1], end="length")
    taken_by(buffer, end, 1.0)
    for state in (RequestState.WAITING, RequestState.RUNNING):
        assert request.state is state
        assert taken_by(buffer, end, 2.0) is None
        assert taken_by(buffer, report_of(0, [9]), 2.0) is None
        assert tokens_of(request) == [1]
        if state is RequestState.WAITING:
            start(buffer, 2.0)
    buffer.check_integrity()


def test_a_report_of_an_unknown_chunk_changes_nothing() -> None:
    buffer = buffer_of()
    assert taken_by(buffer, report_of(77, [1], end="stop"), 1.0) is None
    assert buffer.chunk_owner(ChunkId(77)) is None


# Reports that are lost, doubled, overtaken, malformed


def test_a_doubled_report_is_taken_once() -> None:
    buffer = buffer_of()
    start(buffer)
    report = report_of(0, [1, 2], text="ab", num_cached_tokens=3)
    for _ in range(2):
        assert taken_by(buffer, report, 1.0) == "running"
    taken_by(
        buffer, report_of(0, [3], start=2, text_start=2, text="c", end="stop"), 2.0
    )
    response = only(buffer).to_response(0)
    assert (response.token_ids, response.text) == ([1, 2, 3], "abc")
    assert response.metrics.num_cached_tokens == 3


def test_of_a_report_that_overlaps_the_new_part_is_taken() -> None:
    buffer = buffer_of()
    start(buffer)
    taken_by(buffer, report_of(0, [1, 2], text="ab"), 1.0)
    taken_by(buffer, report_of(0, [2, 3], start=1, text_start=1, text="bc"), 1.0)
    taken_by(buffer, report_of(0, [1], text="a"), 1.0)
    taken_by(buffer, report_of(0, start=3, text_start=3, end="stop"), 2.0)
    response = only(buffer).to_response(0)
    assert (response.token_ids, response.logprobs) == ([1, 2, 3], [-1, -2, -3])
    assert response.text == "abc"


@pytest.mark.parametrize(
    "later",
    [
        report_of(0, [3], start=2, text_start=1, text="c"),
        report_of(0, [2], start=1, text_start=2, text="c"),
        report_of(0, [3], start=-1, text_start=1),
        report_of(0, [3], start=1, text_start=-1),
        report_of(0, range(8), start=1, text_start=1),
        ChunkProgress(chunk_id=ChunkId(0), start=1, text_start=1, tokens=b"abc"),
        ChunkProgress(
            chunk_id=ChunkId(0), start=1, text_start=1, tokens=b"abcd", logprobs=b""
        ),
    ],
    ids=[
        "tokens are missing",
        "text is missing",
        "tokens from before",
        "text from before",
        "more tokens than it may make",
        "no whole token",
        "a token without logprob",
    ],
)
def test_a_report_that_does_not_follow_breaks_its_chunk(later: ChunkProgress) -> None:
    buffer = buffer_of()
    request = only(buffer)
    start(buffer)
    taken_by(buffer, report_of(0, [1], text="a"), 1.0)
    assert taken_by(buffer, later, 2.0) == "broken"
    assert taken_by(buffer, later, 2.0) == "running", "it is aborted once"
    assert tokens_of(request) == [1]
    over = report_of(0, start=5, text_start=5, end="stop", stop_reason=9)
    assert taken_by(buffer, over, 3.0) == "waiting"
    assert request.num_retries == 1
    buffer.check_integrity()
    assert start(buffer, 4.0).generated == request.generated
    taken_by(buffer, report_of(1, [2], text="b", end="stop"), 5.0)
    response = request.to_response(0)
    assert (response.token_ids, response.text) == ([1, 2], "ab")


def test_a_broken_chunk_whose_reports_all_come_after_all_is_whole() -> None:
    buffer = buffer_of()
    start(buffer)
    late = report_of(0, [1], text="a")
    assert taken_by(buffer, report_of(0, [2], start=1, text_start=1), 1.0) == "broken"
    assert taken_by(buffer, late, 1.0) == "running"
    whole = report_of(0, [2, 3], start=1, text_start=1, text="bc", end="stop")
    assert taken_by(buffer, whole, 2.0) == "finished"
    assert only(buffer).to_response(0).text == "abc"


def test_an_end_that_overtakes_tokens_loses_its_chunk() -> None:
    buffer = buffer_of(undivided_because="presence_penalty")
    start(buffer)
    taken_by(buffer, report_of(0, [1], text="a"), 1.0)
    end = report_of(0, [3], start=2, text_start=2, text="c", end="stop")
    assert taken_by(buffer, end, 2.0) == "waiting"
    assert taken_by(buffer, report_of(0, [2], start=1, text_start=1), 3.0) is None
    assert start(buffer).generated == b""


def test_a_request_whose_reports_keep_missing_ends_as_an_error() -> None:
    buffer = buffer_of(max_request_retries=0)
    start(buffer)
    assert taken_by(buffer, report_of(0, [3], start=2, end="stop"), 1.0) == "finished"
    response = only(buffer).to_response(0)
    assert response.finish_reason == "error"
    assert "a report of its tokens is missing or malformed" in (response.error or "")
    assert response.token_ids == []


# Lost chunks


def test_a_lost_chunks_reported_tokens_are_kept() -> None:
    buffer = buffer_of()
    start(buffer)
    taken_by(buffer, report_of(0, [1, 2], text="ab"), 1.0)
    assert buffer.lose_chunk(ChunkId(0), 2.0, "it burnt") == "waiting"
    assert start(buffer).generated == only(buffer).generated
    taken_by(buffer, report_of(1, [3], text="c", end="stop"), 3.0)
    response = only(buffer).to_response(0)
    assert (response.token_ids, response.text) == ([1, 2, 3], "abc")
    assert response.metrics.num_retries == 1


def test_a_request_that_cannot_be_resumed_starts_over_when_its_chunk_is_lost() -> None:
    buffer = buffer_of(undivided_because="presence_penalty")
    start(buffer)
    taken_by(buffer, report_of(0, [1, 2], text="ab"), 1.0)
    assert buffer.lose_chunk(ChunkId(0), 2.0, "it burnt") == "waiting"
    assert start(buffer).generated == b""
    taken_by(buffer, report_of(1, [3], text="c", end="stop"), 3.0)
    response = only(buffer).to_response(0)
    assert (response.token_ids, response.logprobs, response.text) == ([3], [-3], "c")


def test_a_request_survives_so_many_losses_and_no_more() -> None:
    buffer = buffer_of(max_request_retries=2)
    outcomes = []
    for chunk_id in range(3):
        start(buffer)
        outcomes.append(buffer.lose_chunk(ChunkId(chunk_id), 1.0, "out of memory"))
    assert outcomes == ["waiting", "waiting", "finished"]
    response = only(buffer).to_response(0)
    assert response.finish_reason == "error"
    assert response.error == "it was lost 3 times while running: out of memory"


def test_a_lost_chunk_that_had_reported_everything_finishes_the_request() -> None:
    buffer = buffer_of(max_tokens=2, max_request_retries=0)
    start(buffer)
    taken_by(buffer, report_of(0, [1, 2]), 1.0)
    assert buffer.lose_chunk(ChunkId(0), 2.0, "it burnt") == "finished"
    assert only(buffer).to_response(0).finish_reason == "length"


def test_a_cancelled_request_whose_instance_is_lost_is_aborted_not_an_error() -> None:
    buffer = buffer_of(max_request_retries=0)
    start(buffer)
    only(buffer).cancelled = True
    assert buffer.lose_chunk(ChunkId(0), 1.0, "it burnt") == "finished"
    response = only(buffer).to_response(0)
    assert (response.finish_reason, response.error) == ("aborted", None)


def test_a_chunk_its_engine_aborted_unasked_is_a_lost_one() -> None:
    buffer = buffer_of(max_request_retries=1)
    start(buffer)
    assert taken_by(buffer, report_of(0, [1], end="aborted"), 1.0) == "waiting"
    start(buffer)
    assert taken_by(buffer, report_of(1, [2], end="aborted"), 2.0) == "finished"
    assert only(buffer).state is RequestState.FINISHED_ERROR
    assert tokens_of(only(buffer)) == [1, 2]


# Cancelled requests


def test_a_cancelled_request_is_aborted_with_what_it_has() -> None:
    buffer = buffer_of()
    start(buffer)
    only(buffer).cancelled = True
    assert taken_by(buffer, report_of(0, [1], end="aborted"), 1.0) == "finished"
    response = only(buffer).to_response(0)
    assert (response.finish_reason, response.token_ids) == ("aborted", [1])
    assert response.metrics.num_retries == 0


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ("stop", RequestState.FINISHED_STOPPED),
        ("error", RequestState.FINISHED_ERROR),
        ("length", RequestState.FINISHED_ABORTED),
    ],
)
def test_what_happened_before_the_cancel_arrived_counts(
    end: str, state: RequestState
) -> None:
    buffer = buffer_of()
    start(buffer)
    only(buffer).cancelled = True
    assert taken_by(buffer, report_of(0, [1], end=end), 1.0) == "finished"
    assert only(buffer).state is state


def test_a_waiting_request_can_end() -> None:
    buffer = buffer_of()
    request = only(buffer)
    buffer.finish_waiting(request, RequestState.FINISHED_ERROR, 3.0, "no engine left")
    response = request.to_response(0)
    assert (response.finish_reason, response.error) == ("error", "no engine left")
    assert (response.metrics.queue_s, response.metrics.num_chunks) == (3.0, 0)
    assert buffer.num_unfinished == 0


# Text that might begin a stop string


@pytest.mark.parametrize("max_tokens", [1, 100])
def test_held_text_counts_only_if_nothing_follows(max_tokens: int) -> None:
    buffer = buffer_of(max_tokens=max_tokens)
    request = only(buffer)
    start(buffer)
    end = report_of(0, [1], end="length", text="a", held_text="</th")
    taken_by(buffer, end, 1.0)
    if max_tokens == 1:
        assert request.to_response(0).text == "a</th"
        return
    start(buffer)
    taken_by(buffer, report_of(1, [2], end="stop", text="</this>"), 2.0)
    assert request.to_response(0).text == "a</this>"


def test_held_text_counts_for_a_request_that_is_cancelled_while_waiting() -> None:
    buffer = buffer_of()
    request = only(buffer)
    start(buffer)
    taken_by(buffer, report_of(0, [1], end="length", text="a", held_text="</"), 1.0)
    buffer.finish_waiting(request, RequestState.FINISHED_ABORTED, 2.0, "cancelled")
    assert request.to_response(0).text == "a</"


# Cached and recomputed tokens


def test_what_a_resumed_chunk_did_not_find_was_recomputed() -> None:
    buffer = buffer_of(num_prompt_tokens=4)
    start(buffer)
    taken_by(buffer, report_of(0, num_cached_tokens=0), 1.0)
    taken_by(buffer, report_of(0, range(5), end="length"), 2.0)
    start(buffer)
    # 4 + 5 tokens, of which the last was never computed; 4 were found.
    taken_by(buffer, report_of(1, range(4), end="length", num_cached_tokens=4), 3.0)
    start(buffer)
    taken_by(buffer, report_of(2, [1], end="stop", num_cached_tokens=12), 4.0)
    metrics = only(buffer).to_response(0).metrics
    assert metrics.num_cached_tokens == 0 + 4 + 12
    assert metrics.num_recomputed_tokens == (8 - 4) + 0


# Impossible moves


def test_an_impossible_move_raises_with_the_story() -> None:
    buffer = buffer_of()
    request = only(buffer)
    start(buffer, now=1.0, where=3)
    with pytest.raises(InvalidTransition) as error:
        start(buffer, now=2.0)
    message = str(error.value)
    assert "request g/0 cannot go from RUNNING to RUNNING" in message
    assert "1.000 s RUNNING" in message
    assert "instance_id=3" in message
    taken_by(buffer, report_of(0, [1], end="stop"), 3.0)
    with pytest.raises(InvalidTransition, match="FINISHED_STOPPED to RUNNING"):
        start(buffer, now=4.0)
    assert request.to_response(0).metrics.num_chunks == 1
    buffer.check_integrity()


@pytest.mark.parametrize("state", [s for s in RequestState if s.is_finished])
def test_what_is_finished_stays_finished(state: RequestState) -> None:
    request = only(buffer_of())
    if state in (RequestState.FINISHED_STOPPED, RequestState.FINISHED_LENGTH_CAPPED):
        request.move(RequestState.RUNNING, 1.0, "chunk")
    request.move(state, 2.0, "the end")
    for other in RequestState:
        with pytest.raises(InvalidTransition, match=f"from {state.name} to"):
            request.move(other, 3.0, "again")
    assert request.finished_at == 2.0


@pytest.mark.parametrize(
    "state",
    [
        RequestState.WAITING,
        RequestState.FINISHED_STOPPED,
        RequestState.FINISHED_LENGTH_CAPPED,
    ],
)
def test_a_request_that_does_not_run_makes_no_tokens(state: RequestState) -> None:
    request = only(buffer_of())
    with pytest.raises(InvalidTransition, match="never moved"):
        request.move(state, 1.0, "by itself")


def test_a_story_stays_short() -> None:
    request = only(buffer_of())
    for n in range(1000):
        request.move(RequestState.RUNNING, float(n), "chunk")
        request.move(RequestState.WAITING, n + 0.5, "length")
    assert len(request.story) < 50
    assert "999.500 s WAITING (length)" in request.story_text()


# Integrity


def test_the_check_sees_a_request_that_runs_nowhere() -> None:
    buffer = buffer_of()
    only(buffer).move(RequestState.RUNNING, 1.0, "behind the buffer's back")
    with pytest.raises(AssertionError, match="behind the buffer's back"):
        buffer.check_integrity()


def test_the_check_sees_more_tokens_than_allowed() -> None:
    buffer = buffer_of(max_tokens=2)
    start(buffer)
    taken_by(buffer, report_of(0, [1, 2, 3]), 1.0)
    with pytest.raises(AssertionError, match="g/0"):
        buffer.check_integrity()


def test_a_chunk_that_ends_for_its_length_without_a_token_is_a_retry() -> None:
    buffer = buffer_of(max_request_retries=2, max_tokens=100)
    for _ in range(2):
        chunk = start(buffer)
        report = report_of(chunk.chunk_id, end="length")
        assert taken_by(buffer, report, 0.0) == "waiting"
    chunk = start(buffer)
    assert taken_by(buffer, report_of(chunk.chunk_id, end="length"), 0.0) == "finished"
    request = only(buffer)
    assert request.state is RequestState.FINISHED_ERROR
    assert "lost 3 times" in (request.error or "")
    assert "made no token" in (request.error or "")
    buffer.check_integrity()
