"""What a group's finished requests tell of the others."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from aseer.context import FEW, SURE, UNFORESEEN, ContextManager, LengthPriors
from aseer.types import GroupId, RequestId

G, H = GroupId("g"), GroupId("h")


def finish(context: ContextManager, group_id: GroupId, *lengths: int) -> list[bool]:
    """Responses of so many tokens end; whether the estimate changed, for each."""
    taken = context[group_id].num_completed
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


def unforeseen(context: ContextManager, group_id: GroupId, num: int) -> None:
    """A group's first response has 20 tokens, and so many others far more."""
    context.add_group(group_id, max_tokens=1000, num_requests=num + 1)
    finish(context, group_id, 20)
    for i in range(num):
        request_id = RequestId(f"{group_id}/{i + 1}")
        context.record_length(group_id, request_id, UNFORESEEN * 20 + 1)


def test_a_response_is_unforeseen_once_it_is_far_longer_than_was_known() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=8)
    many = [RequestId(f"g/{i}") for i in range(1, 8)]
    for request_id in many:
        context.record_length(G, request_id, 900)  # nothing is known yet
    finish(context, G, 20)
    for request_id in many:
        context.record_length(G, request_id, UNFORESEEN * 20)
        for _ in range(9):
            context.record_length(G, many[0], UNFORESEEN * 20 + 1)  # counts once
    assert context.siblings_are_alike
    for request_id in many:
        context.record_length(G, request_id, UNFORESEEN * 20 + 1)
    assert not context.siblings_are_alike


def test_few_unforeseen_responses_prove_nothing() -> None:
    context = ContextManager()
    unforeseen(context, G, round(SURE**2))
    assert context.siblings_are_alike
    unforeseen(context, H, 1)
    assert not context.siblings_are_alike


def test_many_responses_as_they_were_foreseen_are_needed_to_take_it_back() -> None:
    context = ContextManager()
    num = 16
    unforeseen(context, G, num)
    assert not context.siblings_are_alike
    context.add_group(H, max_tokens=1000, num_requests=10_000)
    num_told = 0
    while not context.siblings_are_alike:
        finish(context, H, 20)
        num_told += 1
    assert num_told >= (num + SURE * num**0.5) / FEW, "not as soon as they are few"


@pytest.mark.parametrize("share", [0.002, 0.01, FEW, 0.03, 0.1])
def test_an_opinion_of_siblings_rarely_changes(share: float) -> None:
    rng = random.Random(5)
    changes = []
    for _ in range(3):
        context = ContextManager()
        opinions = [True]
        for g in range(2000):
            group_id = GroupId(f"g{g}")
            context.add_group(group_id, max_tokens=100_000, num_requests=8)
            for i in range(8):
                is_unforeseen = i > 0 and rng.random() < share
                finish(context, group_id, 600 if is_unforeseen else 100)
                opinions.append(context.siblings_are_alike)
        changes.append(sum(a != b for a, b in pairwise(opinions)))
        assert opinions[-1] or share > FEW / 2
        assert not opinions[-1] or share < FEW * 2
    assert max(changes) <= 4


def test_what_an_earlier_rollout_told_is_known_too() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=20, prior=150)
    finish(context, G, 10, *[700] * 19)
    assert context.siblings_are_alike
    context.add_group(H, max_tokens=1000, num_requests=20, prior=100)
    for i in range(9):
        context.record_length(H, RequestId(f"h/{i}"), 501)
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
