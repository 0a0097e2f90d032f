"""Builders for the core's tests: small instances, small groups, short reports."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from aseer.controller import Controller
from aseer.core.columns import columns_of
from aseer.core.commands import Abort, Dispatch, Finished
from aseer.core.residency import NOWHERE, Holders
from aseer.core.waiting import Waiting
from aseer.types import (
    ChunkEnd,
    ChunkId,
    ChunkProgress,
    GroupId,
    InstanceId,
    InstanceInfo,
    KvGroup,
    RequestId,
    Task,
    request_id_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aseer.buffer import Outcome, RequestBuffer
    from aseer.core.columns import Columns
    from aseer.core.commands import Command
    from aseer.types import Chunk, Response

BLOCK = 4


def info_of(
    instance_id: int = 0,
    *,
    num_kv_blocks: int = 1000,
    max_num_seqs: int = 100,
    block_size: int = BLOCK,
    num_lookahead_tokens: int = 0,
    shares_prompts: bool = False,
    kv_groups: tuple[KvGroup, ...] = (),
    node: str = "",
) -> InstanceInfo:
    return InstanceInfo(
        instance_id=InstanceId(instance_id),
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=10_000,
        num_lookahead_tokens=num_lookahead_tokens,
        shares_prompts=shares_prompts,
        kv_groups=kv_groups,
        node=node,
    )


def task_of(
    group_id: str = "g",
    *,
    num_requests: int = 2,
    num_prompt_tokens: int = 4,
    max_tokens: int = 100,
    **settings: Any,
) -> Task:
    return Task(
        group_id=GroupId(group_id),
        num_requests=num_requests,
        prompt=array("i", range(num_prompt_tokens)).tobytes(),
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=max_tokens,
        **settings,
    )


def waiting_of(
    group_id: str,
    index: int = 0,
    *,
    arrival: int | None = None,
    num_generated: int = 0,
    num_prompt_tokens: int = 4,
    max_tokens: int = 100,
    divisible: bool = True,
    known_length: int | None = None,
    is_new: bool = False,
) -> Waiting:
    """A waiting request; groups named a, b, c arrive in that order."""
    order = 8 * (ord(group_id[0]) - ord("a")) + index
    return Waiting(
        request_id=request_id_of(GroupId(group_id), index),
        group_id=GroupId(group_id),
        arrival=order if arrival is None else arrival,
        is_probe=index == 0,
        num_tokens=num_prompt_tokens + num_generated,
        num_generated=num_generated,
        remaining=max_tokens - num_generated,
        divisible=divisible,
        known_length=known_length,
        is_new=is_new,
    )


def no_kv(request_id: RequestId) -> Holders:
    """No instance holds KV of any request."""
    del request_id
    return NOWHERE


def report_of(
    chunk_id: int,
    tokens: Iterable[int] = (),
    *,
    end: str | None = None,
    start: int = 0,
    text: str = "",
    text_start: int = 0,
    num_cached_tokens: int | None = None,
    **of_end: Any,
) -> ChunkProgress:
    """What an engine reports; every token's logprob is its negative.

    Tests of chunks with more than one report say where the later ones start.
    """
    ids = list(tokens)
    return ChunkProgress(
        chunk_id=ChunkId(chunk_id),
        start=start,
        tokens=array("i", ids).tobytes(),
        logprobs=array("f", [-t for t in ids]).tobytes(),
        text_start=text_start,
        text=text,
        num_cached_tokens=num_cached_tokens,
        end=ChunkEnd(reason=end, **of_end) if end is not None else None,
    )


def taken_by(
    buffer: RequestBuffer, report: ChunkProgress, now: float
) -> Outcome | None:
    """A report of one chunk, as the controller takes it; what became of its request."""
    outcome: Outcome | None = None
    if buffer.chunk_owner(report.chunk_id) is not None:
        outcome = "running"
    for news in buffer.take(columns_of([report])).news:
        outcome = buffer.settle(news, now)
    return outcome


def by_chunk(columns: Columns) -> Iterator[ChunkProgress]:
    """A report's chunks, one after the other."""
    names = ("starts", "counts", "text_starts", "text_counts")
    ids = array("q", columns.chunk_ids)
    starts, counts, text_starts, text_counts = (
        array("i", getattr(columns, name)) or array("i", bytes(4 * len(ids)))
        for name in names
    )
    cached, ends = dict(columns.cached), dict(columns.ends)
    at = text_at = 0
    for i, chunk_id in enumerate(ids):
        end, text_end = at + 4 * counts[i], text_at + text_counts[i]
        yield ChunkProgress(
            chunk_id=ChunkId(chunk_id),
            start=starts[i],
            tokens=columns.tokens[at:end],
            logprobs=columns.logprobs[at:end],
            text_start=text_starts[i],
            text=columns.text[text_at:text_end].decode(),
            num_cached_tokens=cached.get(i),
            end=ends.get(i),
        )
        at, text_at = end, text_end


def chunks_in(commands: Iterable[Command]) -> list[Chunk]:
    return [c.chunk for c in commands if isinstance(c, Dispatch)]


def finished_in(commands: Iterable[Command]) -> list[Response]:
    return [c.response for c in commands if isinstance(c, Finished)]


def aborts_in(commands: Iterable[Command]) -> list[tuple[int, int]]:
    return [(c.instance_id, c.chunk_id) for c in commands if isinstance(c, Abort)]


def placed(commands: Iterable[Command]) -> list[tuple[str, int]]:
    """Which requests were dispatched, and where."""
    return [(c.request_id, c.instance_id) for c in chunks_in(commands)]


def controller_of(**settings: Any) -> Controller:
    return Controller(**{"policy": "context-aware", "chunk_size": 8} | settings)
