"""The example's task: only a right last try is rewarded, and its examples are right."""

from __future__ import annotations

import random

import pytest

from examples.grpo.countdown import Problem, make_problem, reward, solved_problem

PROBLEM = Problem((3, 7, 12), 33)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("7*3=21+12=33.", 1.0),
        ("3+7=10+12=22;3*7=21+12=33.", 1.0),
        ("7*3=21+12=33", 0.0),  # not ended
        ("7*3=21+12=33.;", 0.0),
        ("7*3=20+13=33.", 0.0),  # another number
        ("7*3=22+11=33.", 0.0),
        ("7*3=22+12=33.", 0.0),  # wrongly worked out
        ("3*7=21+12=33;3+7=10+12=22.", 0.0),  # the last try counts
        ("21+12=33.", 0.0),
        ("33.", 0.0),
        ("", 0.0),
        ("7*3==21+12=33.", 0.0),
        ("12+7=19*3=57-12=45-12=33.", 0.0),  # a number too often
    ],
)
def test_what_is_rewarded(response, expected):
    assert reward(PROBLEM, response) == expected


def test_problems_can_be_solved_and_examples_solve_them():
    rng = random.Random(0)
    for _ in range(300):
        prompt, response = solved_problem(rng, hit=0.1)
        numbers, target = prompt[:-1].split(">")
        problem = Problem(tuple(map(int, numbers.split())), int(target))
        assert problem.prompt == prompt
        assert reward(problem, response) == 1.0
        assert len(response) <= 240


def test_the_same_seed_makes_the_same_problems():
    first, second = random.Random(5), random.Random(5)
    assert [make_problem(first) for _ in range(9)] == [
        make_problem(second) for _ in range(9)
    ]
