"""Countdown, written out: reach a target from a few numbers, trying until it works.

The prompt `3 7 9 for 30 :` asks for 30. A response tries orders of the numbers, worked
out from left to right, and says of each how it went: `3 + 7 = 10 + 9 = 19 low 7 * 3 =
21 + 9 = 30 yes`. It is right if it ends with yes, and its last try uses each number
once, is worked out correctly, and reaches the target. It may also give up, after any
try: `3 + 7 = 10 + 9 = 19 low no`. How long the search takes varies from response to
response, and so do the lengths. What stands between blanks is one token.

The examples to learn the way of writing from give up early. That going on pays, within
the length that a response may have, is left to be found.
"""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, NamedTuple

from aseer.models import tiny

if TYPE_CHECKING:
    import random
    from pathlib import Path

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MAX_NUMBER, MAX_VALUE = 9, 99
VERDICTS = LOW, HIGH, YES, NO = "low", "high", "yes", "no"
_TRY = re.compile(r"\d+(?: [-+*] \d+ = \d+)+")


class Problem(NamedTuple):
    """Numbers and the target that some order of them reaches."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} for {self.target} :"


def make_problem(rng: random.Random) -> Problem:
    """Three numbers mostly, and sometimes four, which is much harder."""
    size = rng.choices([3, 4], weights=[3, 1])[0]
    numbers = tuple(rng.randint(1, MAX_NUMBER) for _ in range(size))
    return Problem(numbers, _attempt(numbers, rng)[1])


def example(rng: random.Random, hit: float, give_up: float) -> tuple[str, str]:
    """A prompt and a response that tries at random, to learn the way of writing from.

    Args:
        hit: probability that a try is right, but for those that are by chance.
        give_up: probability to end after a try that is not.
    """
    problem = make_problem(rng)
    solution = ""
    while not solution:
        text, value = _attempt(problem.numbers, rng)
        solution = text if value == problem.target else ""
    response = ""
    while True:
        text, value = _attempt(problem.numbers, rng)
        if value == problem.target or rng.random() < hit:
            return problem.prompt, f"{response}{solution} {YES}"
        response += f"{text} {LOW if value < problem.target else HIGH} "
        if rng.random() < give_up:
            return problem.prompt, response + NO


def reward(problem: Problem, response: str) -> float:
    """1 if the response ends with a right try and yes, else 0."""
    last = re.split(f" {LOW} | {HIGH} ", response.removesuffix(f" {YES}"))[-1]
    if not response.endswith(f" {YES}") or not _TRY.fullmatch(last):
        return 0.0
    value, *steps = last.split()
    used, total = [int(value)], int(value)
    for sign, number, _, result in zip(*[iter(steps)] * 4, strict=True):
        used.append(int(number))
        total = OPERATORS[sign](total, int(number))
        if total != int(result):
            return 0.0
    is_right = total == problem.target and sorted(used) == sorted(problem.numbers)
    return float(is_right)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer for the task, with the ids of a tiny model's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*tiny.vocabulary(vocab_size)[:3], *map(str, range(MAX_VALUE + 1))]
    ids = {
        word: i
        for i, word in enumerate([*words, *OPERATORS, "=", "for", ":", *VERDICTS])
    }
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=tiny.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=tiny.EOS, unk_token=tiny.UNKNOWN
    ).save_pretrained(folder)


def _attempt(numbers: tuple[int, ...], rng: random.Random) -> tuple[str, int]:
    """A try at random whose values stay small, and what it comes to."""
    while True:
        first, *rest = rng.sample(numbers, len(numbers))
        text, value = str(first), first
        for number in rest:
            sign = rng.choice(list(OPERATORS))
            value = OPERATORS[sign](value, number)
            text += f" {sign} {number} = {value}"
            if not 0 <= value <= MAX_VALUE:
                break
        else:
            return text, value
