"""Countdown, written out: reach a target from a few numbers, trying until it works.

The prompt `3 7 12>33:` asks for 33. A response tries orders of the numbers, worked out
from left to right, and ends with a full stop: `3+7=10+12=22;7*3=21+12=33.`. It is right
if its last try uses each number once, is worked out correctly, and reaches the target.
How long the search takes varies from response to response, and so do the lengths.
"""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MAX_NUMBER, MAX_VALUE, MAX_TRIES = 12, 199, 10
_TRY = re.compile(r"\d+(?:[-+*]\d+=\d+)+")


class Problem(NamedTuple):
    """Numbers and the target that some order of them reaches."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))}>{self.target}:"


def make_problem(rng: random.Random) -> Problem:
    """Three numbers mostly, and sometimes four, which is much harder."""
    size = rng.choices([3, 4], weights=[3, 1])[0]
    numbers = tuple(rng.randint(1, MAX_NUMBER) for _ in range(size))
    return Problem(numbers, _attempt(numbers, rng)[1])


def search(problem: Problem, solution: str, rng: random.Random, hit: float) -> str:
    """A response that tries at random, and with probability `hit` a try is right."""
    tries = []
    while rng.random() > hit and len(tries) < MAX_TRIES - 1:
        text, value = _attempt(problem.numbers, rng)
        if value == problem.target:
            return ";".join([*tries, text]) + "."
        tries.append(text)
    return ";".join([*tries, solution]) + "."


def solved_problem(rng: random.Random, hit: float) -> tuple[str, str]:
    """A prompt and a response for it, to learn the way of writing from."""
    problem = make_problem(rng)
    while True:
        text, value = _attempt(problem.numbers, rng)
        if value == problem.target:
            return problem.prompt, search(problem, text, rng, hit)


def reward(problem: Problem, response: str) -> float:
    """1 if the response ends with a right try, else 0."""
    if not response.endswith("."):
        return 0.0
    last = response[:-1].split(";")[-1]
    if not _TRY.fullmatch(last):
        return 0.0
    value, *steps = re.findall(r"\d+|[-+*]", re.sub(r"=\d+", "", last))
    results = [int(text) for text in re.findall(r"=(\d+)", last)]
    used, total = [int(value)], int(value)
    for sign, number, result in zip(steps[::2], steps[1::2], results, strict=True):
        used.append(int(number))
        total = OPERATORS[sign](total, int(number))
        if total != result:
            return 0.0
    is_right = total == problem.target and sorted(used) == sorted(problem.numbers)
    return float(is_right)


def _attempt(numbers: tuple[int, ...], rng: random.Random) -> tuple[str, int]:
    """A try at random whose values stay small, and what it comes to."""
    while True:
        first, *rest = rng.sample(numbers, len(numbers))
        text, value = str(first), first
        for number in rest:
            sign = rng.choice(list(OPERATORS))
            value = OPERATORS[sign](value, number)
            text += f"{sign}{number}={value}"
            if not 0 <= value <= MAX_VALUE:
                break
        else:
            return text, value
