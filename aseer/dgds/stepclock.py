"""Measures an engine's steps, and what drafting takes of them.

The clock wraps the method with which vLLM's model runner begins a step. A step lasts
until its drafts are made: from the end of the step before, or from its own beginning if
the engine was idle.
"""

from __future__ import annotations

import functools
import time
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from aseer.counts import DRAFTING_SHARES

if TYPE_CHECKING:
    from collections.abc import Callable

# An engine with more time than this between two steps had nothing to do.
_MAX_IDLE_S = 0.02


class StepClock:
    """Measures the steps of a runner, and what was scheduled in them."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.draft_s = 0.0
        self.share_buckets = [0] * (len(DRAFTING_SHARES) + 1)
        self.num_scheduled: dict[str, int] = {}
        self.num_tokens = 0
        self.was_idle = True  # before the step, which then began slowly
        self._started_at = 0.0
        self._ended_at = 0.0

    def timed(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        """A runner's `execute_model` that begins a step of this clock's."""

        @functools.wraps(execute)
        def timed_execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._begin_step(scheduler_output)
            return execute(scheduler_output, *args, **kwargs)

        return timed_execute

    def _begin_step(self, scheduler_output: Any) -> None:
        now = time.perf_counter()
        self.was_idle = now - self._ended_at > _MAX_IDLE_S
        self._started_at = now if self.was_idle else self._ended_at
        self.num_tokens = scheduler_output.total_num_scheduled_tokens
        self.num_scheduled = {
            request_id: len(tokens)
            for request_id, tokens in (
                scheduler_output.scheduled_spec_decode_tokens.items()
            )
        }

    def end_step(self, drafting_since: float) -> float:
        """Note that a step is over, drafting included; returns its seconds."""
        self._ended_at = time.perf_counter()
        step_s = self._ended_at - self._started_at
        draft_s = self._ended_at - drafting_since
        self.step_s += step_s
        self.draft_s += draft_s
        self.share_buckets[bisect_left(DRAFTING_SHARES, draft_s / step_s)] += 1
        return step_s
