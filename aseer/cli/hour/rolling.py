"""Rollouts that are compared with one another, token for token."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aseer import scheduler
from aseer.cli.findings import fail
from aseer.cli.hour.steps import REPORT_IT
from aseer.groups import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aseer.cli.findings import Finding
    from aseer.core.fleet import Fleet
    from aseer.core.residency import Holders
    from aseer.report import RolloutReport
    from aseer.runtime.engine import Engine
    from aseer.runtime.rollout import Rollout
    from aseer.types import InstanceId, Response

# Of logprobs in float32, between kernels for one row and for several.
ROUNDING = 2e-5
# Workers add up their parts in another order.
RANKS_ROUNDING = 5e-5
# What is done midway is done when this share of a rollout's tokens is there, so that
# all requests run, and most of their tokens are still to come.
_MIDWAY = 0.25
_LOOK_S = 0.02


class Sampled(NamedTuple):
    """A rollout, read to its end."""

    responses: dict[str, Response]
    report: RolloutReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A rollout beside the one that it should equal.

    Attributes:
        difference: in words; "" = they are equal.
        num_recomputed_tokens: whose KV was computed again.
    """

    what: str
    difference: str
    num_responses: int
    num_chunks: int
    num_migrations: int
    num_preemptions: int
    num_retries: int
    num_recomputed_tokens: int
    tokens_per_s: float


def greedy_groups(max_tokens: int = 160, n: int = 2) -> list[Group]:
    """Groups with prompts of several lengths, of which any two runs are equal."""
    rng = random.Random(7)
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    return [
        Group(
            [rng.randrange(3, 90) for _ in range(length)],
            n=n,
            group_id=f"g{length}",
            sampling=sampling,
        )
        for length in (7, 33, 90)
    ]


async def sample(
    engine: Engine,
    groups: Sequence[Group],
    *,
    midway: Callable[[], object] | None = None,
    **settings: Any,
) -> Sampled:
    """All responses.

    Args:
        midway: called once a quarter of all tokens is there.
        settings: of `Engine.rollout`.
    """
    responses = {}
    async with engine.rollout(groups, **settings) as rollout:
        with _calling(rollout, _MIDWAY * num_tokens(groups), midway):
            async for response in rollout:
                responses[response.request_id] = response
    return Sampled(responses, rollout.report)


@contextmanager
def _calling(
    rollout: Rollout, at: float, act: Callable[[], object] | None
) -> Iterator[None]:
    """Call once a rollout has so many tokens; no task of its own, which errors wrap."""
    loop = asyncio.get_running_loop()
    timer = None

    def look() -> None:
        nonlocal timer
        progress = rollout.progress()
        if act is not None and progress and progress.num_output_tokens >= at:
            act()
        else:
            timer = loop.call_later(_LOOK_S, look)

    if act is not None:
        timer = loop.call_later(_LOOK_S, look)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def num_tokens(groups: Sequence[Group]) -> int:
    """Tokens of all responses, if none ends early; sampling settings are mappings."""
    settings = ((g.n, g.sampling) for g in groups)
    return sum(n * int(s["max_tokens"]) for n, s in settings if isinstance(s, Mapping))


def compare(
    what: str, expected: Sampled, found: Sampled, rounding: float = ROUNDING
) -> Compared:
    """The second rollout beside the first."""
    report = found.report
    return Compared(
        what=what,
        difference=difference(expected.responses, found.responses, rounding),
        num_responses=len(found.responses),
        num_chunks=report.num_chunks,
        num_migrations=report.num_migrations,
        num_preemptions=report.num_preemptions,
        num_retries=report.num_retries,
        num_recomputed_tokens=report.num_recomputed_tokens,
        tokens_per_s=round(report.throughput_tok_s, 1),
    )


def difference(
    expected: dict[str, Response], found: dict[str, Response], rounding: float
) -> str:
    """How two rollouts of the same groups differ; "" if they do not.

    Greedy sampling may take another of two tokens that are equally likely to rounding.
    That is a difference as well, but the text says so: it is no fault of chunks.
    """
    if expected.keys() != found.keys():
        return f"{len(expected)} and {len(found)} responses"
    for request_id, one in expected.items():
        other = found[request_id]
        if other.error is not None:
            return f"{request_id} ended with an error: {other.error}"
        both = list(zip(one.token_ids, other.token_ids, strict=False))
        place = next((i for i, (a, b) in enumerate(both) if a != b), None)
        if place is not None:
            off = abs(one.logprobs[place] - other.logprobs[place])
            tie = (
                f", where both are equally likely ({off:.1e})"
                if off <= rounding
                else ""
            )
            return f"the tokens of {request_id} from place {place} on{tie}"
        if len(one.token_ids) != len(other.token_ids):
            lengths = f"{len(one.token_ids)} and {len(other.token_ids)}"
            return f"the lengths of {request_id}, {lengths}"
        pairs = zip(one.logprobs, other.logprobs, strict=True)
        off = max((abs(a - b) for a, b in pairs), default=0.0)
        if off > rounding:
            return f"the logprobs of {request_id}, by {off:.1e}"
    return ""


def num_equal(expected: dict[str, Response], found: dict[str, Response]) -> int:
    """How many responses have the same tokens in both."""
    pairs = ((one, found.get(request_id)) for request_id, one in expected.items())
    return sum(
        other is not None and list(one.token_ids) == list(other.token_ids)
        for one, other in pairs
    )


def judge_equal(
    compared: Sequence[Compared], advice: str = REPORT_IT
) -> Finding | None:
    """What is wrong with the first that differs; None if none does."""
    for each in compared:
        if each.difference:
            return fail(f"{each.what}: {each.difference}", advice)
    return None


@contextmanager
def moving() -> Iterator[None]:
    """Every chunk goes to another engine than the one that holds its KV.

    No policy does so: requests move where that evens out loads, which a few do not.
    """
    before = scheduler.place_by_affinity
    scheduler.place_by_affinity = elsewhere
    try:
        yield
    finally:
        scheduler.place_by_affinity = before


def elsewhere(holders: Holders, room: Fleet, nodes: Sequence[int] = ()) -> InstanceId:
    """The least loaded instance but for the one that holds the request's KV."""
    del nodes
    home = max(holders.tokens, key=lambda i: holders.tokens[i], default=-1)
    others = [i for i in room.alive_ids() if room.is_selected(i) and i != home]
    return min(others, key=room.num_running, default=room.least_loaded())


async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for a condition; False if it does not come about in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True
