"""What a group's finished requests tell of the others."""

from __future__ import annotations

import pytest

from aseer.context import ContextManager, LengthPriors
from aseer.types import GroupId

G, H = GroupId("g"), GroupId("h")


def test_an_estimate_is_max_tokens_then_the_first_length_then_the_longest() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    trace = [context.length_estimate(G)]
    for length in (120, 80, 300):
        context.record_finished(G, length)
        trace.append(context.length_estimate(G))
    assert trace == [1000, 120, 120, 300]


def test_a_finished_request_says_whether_the_estimate_changed() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    changes = [context.record_finished(G, n) for n in (1000, 400, 1000, 1001)]
    assert changes == [False, False, False, True]


def test_groups_learn_nothing_from_each_other() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    context.add_group(H, max_tokens=500, num_requests=4)
    context.record_finished(G, 7)
    assert (context.length_estimate(G), context.length_estimate(H)) == (7, 500)


@pytest.mark.parametrize(
    ("prior", "estimates"),
    [
        (200, [200, 200, 300]),
        (0, [0, 120, 300]),
        (5000, [1000, 1000, 1000]),  # no response can be as long today
    ],
)
def test_a_prior_counts_like_a_finished_sibling(
    prior: int, estimates: list[int]
) -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4, prior=prior)
    seen = [context.length_estimate(G)]
    for length in (120, 300):
        context.record_finished(G, length)
        seen.append(context.length_estimate(G))
    assert seen == estimates


def test_the_longest_is_known_once_all_have_ended_by_themselves() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=2, prior=700)
    context.record_finished(G, 30)
    assert context.longest(G) is None
    context.record_finished(G, 20)
    assert context.longest(G) == 30


def test_priors_are_of_the_last_rollout_and_the_oldest_are_forgotten() -> None:
    priors = LengthPriors(max_prompts=2)
    for prompt, longest in ((b"a", 5), (b"b", 6), (b"a", 4), (b"c", 7)):
        priors.learn(prompt, longest)
    assert [priors.get(p) for p in (b"a", b"b", b"c")] == [4, None, 7]


def test_a_group_is_added_once() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    with pytest.raises(ValueError, match="group 'g' is known already"):
        context.add_group(G, max_tokens=1000, num_requests=4)
