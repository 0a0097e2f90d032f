"""The example's task: only a right last try is rewarded, and its examples are right."""

from __future__ import annotations

import random

import pytest

from examples.grpo.countdown import (
    Problem,
    example,
    make_problem,
    reward,
    write_tokenizer,
)

PROBLEM = Problem((3, 7, 9), 30)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("7 * 3 = 21 + 9 = 30 yes", 1.0),
        ("3 + 7 = 10 + 9 = 19 low 3 * 7 = 21 + 9 = 30 yes", 1.0),
        ("7 * 3 = 21 + 9 = 30", 0.0),  # not ended
        ("7 * 3 = 21 + 9 = 30 no", 0.0),
        ("7 * 3 = 21 + 9 = 30 yes yes", 0.0),
        ("7 * 3 = 20 + 10 = 30 yes", 0.0),  # another number
        ("7 * 3 = 22 + 8 = 30 yes", 0.0),
        ("7 * 3 = 22 + 9 = 30 yes", 0.0),  # wrongly worked out
        ("3 * 7 = 21 + 9 = 30 high 3 + 7 = 10 + 9 = 19 yes", 0.0),  # the last counts
        ("21 + 9 = 30 yes", 0.0),
        ("30 yes", 0.0),
        ("yes", 0.0),
        ("", 0.0),
        ("7 * 3 = = 21 + 9 = 30 yes", 0.0),
        ("9 + 7 = 16 * 3 = 48 - 9 = 39 - 9 = 30 yes", 0.0),  # a number too often
    ],
)
def test_what_is_rewarded(response, expected):
    assert reward(PROBLEM, response) == expected


def test_problems_can_be_solved_and_examples_solve_them_or_give_up():
    rng = random.Random(0)
    solved = 0
    for _ in range(300):
        prompt, response = example(rng, hit=0.2, give_up=0.3)
        numbers, target = prompt.removesuffix(" :").split(" for ")
        problem = Problem(tuple(map(int, numbers.split())), int(target))
        assert problem.prompt == prompt
        assert reward(problem, response) == response.endswith(" yes")
        assert response.endswith((" yes", " low no", " high no"))
        solved += response.endswith(" yes")
    assert 90 < solved < 210


def test_every_word_is_one_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, vocab_size=128)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt, response = example(random.Random(1), hit=0.1, give_up=0.1)
    for text in (prompt, response):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert max(ids) < 128
        assert tokenizer.decode(ids) == text


def test_the_same_seed_makes_the_same_problems():
    first, second = random.Random(5), random.Random(5)
    assert [make_problem(first) for _ in range(9)] == [
        make_problem(second) for _ in range(9)
    ]
