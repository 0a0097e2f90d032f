"""Drafts that come with a step's tokens, with a stand-in for vLLM's executor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.stand_ins import imported


class Executor:
    """vLLM's: a step's answer, and drafts for whoever asks for them."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.num_asked = 0

    def sample_tokens(self, grammar: Any, *, non_block: bool = False) -> Any:
        assert (grammar, non_block) == ("grammar", True)
        return self._answers.pop(0)

    def take_draft_token_ids(self) -> str:
        self.num_asked += 1
        return "asked for"


@pytest.fixture
def executor_of(monkeypatch):
    names = {"vllm.v1.executor.multiproc_executor": {"MultiprocExecutor": Executor}}
    return imported(monkeypatch, "aseer.instance.vllm.executor", names).DraftingExecutor


def test_drafts_that_came_along_are_taken_once_and_nobody_is_asked(executor_of):
    for drafts in ("drafts", None):  # None: the worker says that there are none
        executor = executor_of(SimpleNamespace(aseer_drafts=drafts))
        executor.sample_tokens("grammar", non_block=True)
        assert (executor.take_draft_token_ids(), executor.num_asked) == (drafts, 0)
        assert executor.take_draft_token_ids() == "asked for"


def test_a_worker_whose_answer_brings_none_is_asked(executor_of):
    for answer in (SimpleNamespace(), None):
        executor = executor_of(answer)
        assert executor.sample_tokens("grammar", non_block=True) is answer
        assert (executor.take_draft_token_ids(), executor.num_asked) == ("asked for", 1)


def test_a_steps_drafts_are_not_the_next_ones(executor_of):
    executor = executor_of(SimpleNamespace(aseer_drafts="old"), SimpleNamespace())
    for _ in range(2):
        executor.sample_tokens("grammar", non_block=True)
    assert executor.take_draft_token_ids() == "asked for"
