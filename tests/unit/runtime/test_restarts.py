"""The budget of restarts: never below zero, and not spent by one bad request."""

from __future__ import annotations

import signal

import pytest

from aseer.node.process import describe_exit
from aseer.runtime.restarts import MAX_FORGIVEN, RestartBudget, lacks_device_memory


def test_it_is_spent_once_each_and_then_there_is_none():
    budget = RestartBudget(2)
    assert [budget.spend() for _ in range(4)] == [True, True, False, False]
    assert budget.num_left == 0


def test_a_request_that_killed_four_engines_costs_nothing():
    """By the defaults: three restarts, and a request is ended at its fourth death."""
    budget = RestartBudget(3)
    assert all(budget.spend() for _ in range(3))
    budget.forgive(4)
    assert budget.spend(), "the restart after the fourth"
    assert budget.num_left == 3


def test_engines_that_do_no_work_at_all_are_not_forgiven_for_ever():
    budget = RestartBudget(3)
    num_deaths = 0
    while budget.forgive(1) or budget.num_left:
        assert budget.spend()
        num_deaths += 1
        assert num_deaths < 100
    assert num_deaths == 3 + MAX_FORGIVEN
    budget.worked()
    assert budget.forgive(1)
    assert budget.spend()


def test_more_is_never_given_back_than_was_there():
    budget = RestartBudget(3)
    assert budget.forgive(4)
    assert budget.num_left == 4, "the one that is not paid for yet"
    assert [budget.spend() for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("why", "lacks"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("Free memory on device cuda:0 (2/79 GiB) on startup is less than", True),
        ("ValueError: No available memory for the cache blocks. Try", True),
        ("CUDA error: CUDA_ERROR_OUT_OF_MEMORY at cumem_allocator.cpp", True),
        ("it died: no such model", False),
        ("instance 0 was killed by SIGKILL (out of memory?); cause: none", False),
        ("Free memory on device cuda:0 is 60 GiB", False),
        (describe_exit(-signal.SIGKILL), False),
    ],
)
def test_starts_that_lack_device_memory_are_told_from_others(why, lacks):
    assert lacks_device_memory(why) is lacks
