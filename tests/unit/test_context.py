"""What a group's finished requests tell of the others."""

from __future__ import annotations

import pytest

from aseer.context import ContextManager
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


def test_service_adds_up() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    for num_tokens in (5, 0, 7):
        context.record_tokens(G, num_tokens)
    assert context[G].num_tokens == 12


def test_a_group_is_added_once() -> None:
    context = ContextManager()
    context.add_group(G, max_tokens=1000, num_requests=4)
    with pytest.raises(ValueError, match="group 'g' is known already"):
        context.add_group(G, max_tokens=1000, num_requests=4)
