"""What a group's finished requests tell of the others."""

from __future__ import annotations

import pytest

from aseer.context import FEW, UNFORESEEN, ContextManager, LengthPriors
from aseer.types import GroupId, RequestId

G, H = GroupId("g"), GroupId("h")


def finish(context: ContextManager, group_id: GroupId, *lengths: int) -> list[bool]:
    """Responses of so many tokens end; whether the estimate changed, for each."""
    taken = len(context[group_id].completed)
    return [
        context.record_finished(group_id, RequestId(f"{group_id}/{taken + i}"), length)
        for i, length in enumerate(lengths)
    ]


def test_an_estimate_is_max_tokens_then_the_first_length_then_the_longest() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    trace = [context.length_estimate(G)]
    for length in (120, 80, 300):
        finish(context, G, length)
        trace.append(context.length_estimate(G))
    assert trace == [1000, 120, 120, 300]


def test_a_finished_request_says_whether_the_estimate_changed() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    changes = finish(context, G, 1000, 400, 1000, 1001)
    assert changes == [False, False, False, True]


def test_groups_learn_nothing_from_each_other() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    context.add_group(H, max_tokens=500, num_requests=4)
    finish(context, G, 7)
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
        finish(context, G, length)
        seen.append(context.length_estimate(G))
    assert seen == estimates


def test_the_longest_is_known_once_all_have_ended_by_themselves() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=2, prior=700)
    finish(context, G, 30)
    assert context.longest(G) is None
    finish(context, G, 20)
    assert context.longest(G) == 30


def test_siblings_are_alike_until_one_is_far_longer_than_was_known() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=8)
    slow, other = RequestId("g/6"), RequestId("g/7")
    context.record_length(G, slow, 900)  # nothing is known yet
    finish(context, G, 20)
    context.record_length(G, slow, UNFORESEEN * 20)
    assert context.siblings_are_alike
    context.record_length(G, slow, UNFORESEEN * 20 + 1)
    assert not context.siblings_are_alike
    finish(context, G, *[20] * (round(1 / FEW) - 1))
    assert not context.siblings_are_alike
    context.record_length(G, slow, 1000)  # counts once
    finish(context, G, 20)
    assert context.siblings_are_alike, "one in fifty is few"
    context.record_length(G, other, 1000)
    assert not context.siblings_are_alike


def test_what_an_earlier_rollout_told_is_known_too() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4, prior=150)
    finish(context, G, 10, 700)
    assert context.siblings_are_alike
    finish(context, G, 720)
    context.add_group(H, max_tokens=1000, num_requests=4, prior=100)
    finish(context, H, 501)
    assert not context.siblings_are_alike


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
