"""Policies: in which order requests wait, and what a response is expected to become.

A *policy* is a pure function, `rank` (which waiting request goes first), a way to
place, maybe another function, `expect` (how long a response becomes), and two switches:
whether requests are divided into chunks, and whether KV is reserved before a chunk is
admitted. Pure: a policy sees one waiting request and its group's length estimate, and
nothing of instances or time; `aseer.scheduler` asks it.

    context-aware           waiting probes first; then who is expected to be longest,
                            by the group's length estimate (Seer, Alg. 2)
    fcfs                    arrival order (divided rollout alone)
    longest-first           most tokens left first, by lengths known beforehand
                            (an oracle)
    group-round-robin       whole groups in turn (veRL in the Seer paper)
    least-loaded            each request to the instance with the fewest (verl today)
    group-least-unfinished  whole groups to the instance with the fewest (OpenRLHF)

The last three are baselines: everything is handed to the engines at once, undivided and
without reservation, and the engines' own queue and preemption do the rest.

Context-aware scheduling differs from the paper's in three points:

- A request is expected to become at least twice as long as it is, whatever its group's
  estimate, so that the one long response of a group of short ones does not wait behind
  longer groups until the end.
- Among requests with the same expectation the one with the most tokens goes first, not
  the one with the fewest. So a request that runs goes on, and fewer requests change
  places, each time at the price of loading KV (without a pool, of computing it).
- A chunk is no longer than what its response is expected to take, so that short
  responses reserve little, however large chunks may be.

Where siblings turn out not to be alike (`aseer.context`), the estimate of a group
counts for less. Every request first runs for a whole chunk, long groups first, so that
no request is found to be long only at the end. After that the requests with the most
expected tokens left go first, and a request is expected to become at least five times
as long as it is. The tokens left are compared by their power of two; within the same
power a request that runs goes on, again because of its KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aseer.config import PolicyName
    from aseer.core.waiting import Rank, Waiting

Placement = Literal[
    "affinity", "group-round-robin", "least-loaded", "group-least-unfinished"
]

# A request is expected to reach at least this multiple of its current length, so that
# the one long response of a short group does not wait until the end.
AT_LEAST = 2
# The same where siblings are not alike, and responses of five times the length known
# are not rare (`aseer.context.UNFORESEEN`).
AT_LEAST_UNLIKE = 5


@dataclass(frozen=True, slots=True)
class Policy:
    """How to order and place; see the module's table.

    Attributes:
        expect: how many tokens a response will have in the end, by what is known of the
            response and by its group's length estimate; None = the policy does not ask.
        if_unlike: the policy that replaces this one where siblings are not alike; None
            = this one stays.
    """

    name: PolicyName
    rank: Callable[[Waiting, int], Rank]
    placement: Placement
    divided: bool = True
    reserves_kv: bool = True
    expect: Callable[[Waiting, int], int] | None = None
    if_unlike: Policy | None = None


def expect_like_group(request: Waiting, length_estimate: int) -> int:
    """The group's estimate, but at least twice the tokens that the request has."""
    return _expect_at_least(AT_LEAST, request, length_estimate)


def expect_unlike(request: Waiting, length_estimate: int) -> int:
    """The group's estimate, but at least five times the tokens the request has."""
    return _expect_at_least(AT_LEAST_UNLIKE, request, length_estimate)


def _expect_at_least(times: int, request: Waiting, length_estimate: int) -> int:
    generated = request.num_generated
    at_least = times * generated
    if at_least <= length_estimate:
        return length_estimate
    most = generated + request.remaining
    return max(length_estimate, at_least if at_least < most else most)


def expect_known(request: Waiting, length_estimate: int) -> int:
    """The length that is known beforehand; without one, the group's estimate."""
    length = request.known_length
    return length_estimate if length is None else length


def rank_context_aware(request: Waiting, length_estimate: int) -> Rank:
    """Probes in the order of arrival, then the longest expected first."""
    if request.is_probe:
        return (0, request.arrival)
    expected = expect_like_group(request, length_estimate)
    return (1, -expected, -request.num_generated, request.arrival)


def rank_unlike(request: Waiting, length_estimate: int) -> Rank:
    """Probes by arrival, then new requests, then by the tokens expected to be left."""
    if request.is_probe:
        return (0, request.arrival)
    generated = request.num_generated
    if request.is_new:
        return (1, -length_estimate, request.arrival)
    left = expect_unlike(request, length_estimate) - generated
    return (2, -left.bit_length(), -generated, request.arrival)


def rank_fcfs(request: Waiting, length_estimate: int) -> Rank:
    """By arrival."""
    del length_estimate
    return (request.arrival,)


def rank_longest_first(request: Waiting, length_estimate: int) -> Rank:
    """By the tokens that are left, as known beforehand."""
    left = expect_known(request, length_estimate) - request.num_generated
    return (-left, request.arrival)


POLICIES: Mapping[PolicyName, Policy] = {
    p.name: p
    for p in (
        Policy(
            "context-aware",
            rank_context_aware,
            "affinity",
            expect=expect_like_group,
            if_unlike=Policy(
                "context-aware", rank_unlike, "affinity", expect=expect_unlike
            ),
        ),
        Policy("fcfs", rank_fcfs, "affinity"),
        Policy("longest-first", rank_longest_first, "affinity", expect=expect_known),
        Policy("group-round-robin", rank_fcfs, "group-round-robin", False, False),
        Policy("least-loaded", rank_fcfs, "least-loaded", False, False),
        Policy(
            "group-least-unfinished", rank_fcfs, "group-least-unfinished", False, False
        ),
    )
}
