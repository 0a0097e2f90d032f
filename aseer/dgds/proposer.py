"""The drafter that vLLM's model runner V1 calls after every step (`custom_class`).

vLLM makes the drafter with vLLM's configuration alone, and passes no request ids. So
the drafter drafts nothing until the worker extension has joined it to the model runner.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from aseer.dgds.drafting import Drafting
from aseer.dgds.stepclock import StepClock

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aseer.dgds.budget import Budget
    from aseer.dgds.replica import Replica
    from aseer.dgds.steptime import StepTimeModel

_log = logging.getLogger("aseer.dgds")


class GroupDrafter:
    """Drafts for each request from its group's tree."""

    def __init__(self, vllm_config: Any) -> None:
        self._max_model_len = vllm_config.model_config.max_model_len
        self._drafting: Drafting | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no draft model."""

    def start(
        self,
        runner: Any,
        replica: Replica,
        budget: Budget,
        model: StepTimeModel,
        probe_weight: float,
    ) -> StepClock:
        """Draft from now on; returns what is to time the runner's steps."""
        clock = StepClock()
        self._drafting = Drafting(
            runner, replica, budget, model, clock, probe_weight, self._max_model_len
        )
        self._budget, self._clock = budget, clock
        return clock

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft for every request of the batch; see vLLM's CustomClassProposer."""
        drafting = self._drafting
        if drafting is None:
            return [[] for _ in sampled_token_ids]
        try:
            return self._step(
                drafting, sampled_token_ids, num_tokens_no_spec, token_ids_cpu
            )
        except Exception:
            _log.exception("drafting failed; no drafts from now on")
            self._drafting = None
            return [[] for _ in sampled_token_ids]

    def _step(
        self,
        drafting: Drafting,
        sampled: list[list[int]],
        num_tokens: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> list[list[int]]:
        since = time.perf_counter()
        num_rows = drafting.find(sampled, num_tokens, token_ids)
        drafting.learn(sampled)
        drafts: list[list[int]] = [[] for _ in sampled]
        if drafting.is_profile:
            drafts = drafting.draft_anything(sampled)
        elif num_rows:
            most = self._budget.max_draft_tokens(num_rows)
            if most:
                looks_since = time.perf_counter()
                drafts = drafting.look(sampled, num_tokens, token_ids, most)
                self._budget.pay(num_rows, time.perf_counter() - looks_since)
        drafting.observe(sampled, self._clock.end_step(since))
        return drafts
