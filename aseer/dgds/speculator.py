"""Our drafts on vLLM's model runner V2, whose drafters are a closed list.

`offer` puts ours on the list, in a worker's process, before the worker has a model
runner. vLLM is told of a drafter that V2 has and that needs no model (`ngram_gpu`); if
its `additional_config` asks for ours, ours is made instead. Until `join`, and for good
if drafts are refused, no step verifies a draft.

Here is all that touches V2's insides:

    model_runner.init_speculator    replaced, while workers are started
    runner.execute_model            gets what `Ahead.prepare` makes of a step
    runner.sample_tokens            its answer is noted; a grammar's masks are trimmed
    runner.rejection_sampler        is a `RowVerifier`
    runner.req_states.draft_tokens  is written, before a step with drafts is launched
"""

from __future__ import annotations

import functools
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu import spec_decode

from aseer.dgds.ahead import trimmed
from aseer.dgds.messages import ADDITIONAL_CONFIG_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from aseer.dgds.ahead import Ahead

_log = logging.getLogger("aseer.dgds")

_MODEL_RUNNER = "vllm.v1.worker.gpu.model_runner"


def offer() -> None:
    """Have V2's model runners take our speculator where their configuration says so."""
    make = spec_decode.init_speculator
    if getattr(make, "offers_ours", False):
        return

    @functools.wraps(make)
    def init_speculator(vllm_config: Any, device: Any, *args: Any) -> Any:
        if ADDITIONAL_CONFIG_KEY in (vllm_config.additional_config or {}):
            return GroupSpeculator(vllm_config, device)
        return make(vllm_config, device, *args)

    init_speculator.offers_ours = True  # type: ignore[attr-defined]
    spec_decode.init_speculator = init_speculator
    if _MODEL_RUNNER in sys.modules:
        sys.modules[_MODEL_RUNNER].init_speculator = init_speculator  # type: ignore


class GroupSpeculator:
    """What V2 asks of a speculator (its BaseSpeculator): nothing is drafted here."""

    num_query_per_req = 1
    num_extra_query_per_req = 0
    supports_mm_inputs = False
    draft_logits = None
    pcp_manager: Any = None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        self.num_speculative_steps = (
            vllm_config.speculative_config.num_speculative_tokens
        )
        shape = (vllm_config.scheduler_config.max_num_seqs, self.num_speculative_steps)
        self._nothing = torch.zeros(shape, dtype=torch.int64, device=device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Do nothing: no graph is captured."""

    def capture(self) -> None:
        """Do nothing."""

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[num_rows, most], tokens that any model has; drafts come before the step."""
        return self._nothing[: input_batch.num_reqs].zero_()


class Joined:
    """A model runner with our drafts, or with none."""

    def __init__(self, runner: Any, ahead: Ahead | None) -> None:
        """Have the runner launch only what is drafted.

        Args:
            ahead: drafts; None = nothing is ever drafted.
        """
        self.ahead = ahead
        self._req_states = runner.req_states
        self._device = runner.device
        self._placeholders: dict[str, list[int]] = {}
        self._has_failed = ahead is None
        self._execute = runner.execute_model
        self._sample = runner.sample_tokens
        runner.execute_model = self._execute_model
        runner.sample_tokens = self._sample_tokens

    def _execute_model(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return self._execute(output, *args, **kwargs)
        self._placeholders = output.scheduled_spec_decode_tokens
        launched = self._guard(lambda ahead: ahead.prepare(output))
        if launched is None:
            launched = trimmed(output, {})
        answer = self._execute(launched, *args, **kwargs)
        self._guard(lambda ahead: ahead.launched())
        return answer

    def _sample_tokens(self, grammar_output: Any) -> Any:
        answer = self._sample(self._trim_masks(grammar_output))
        if answer is not None:
            self._guard(lambda ahead: ahead.took(answer))
        return answer

    def _guard(self, call: Callable[[Ahead], Any]) -> Any:
        """A failure costs the drafts and nothing else."""
        if self._has_failed:
            return None
        assert self.ahead is not None
        try:
            return call(self.ahead)
        except Exception:
            _log.exception("drafting failed; no drafts from now on")
            self._has_failed = True
            return None

    def _trim_masks(self, grammar_output: Any) -> Any:
        """A grammar's masks without those for placeholders, which were trimmed."""
        if grammar_output is None or not self._placeholders:
            return grammar_output
        kept, start = [], 0
        req_ids = grammar_output.structured_output_request_ids
        for req_id in req_ids:
            kept.append(start)
            start += 1 + len(self._placeholders.get(req_id, ()))
        changes: dict[str, Any] = {
            "grammar_bitmask": grammar_output.grammar_bitmask[kept]
        }
        if getattr(grammar_output, "num_acceptable_drafts", None) is not None:
            changes["num_acceptable_drafts"] = [0] * len(req_ids)
        return replace(grammar_output, **changes)


def upload(runner: Any, req_ids: Sequence[str], drafts: NDArray[np.int64]) -> None:
    """Put drafts where the next step reads them.

    Args:
        drafts: [len(req_ids), longest]; what is beyond a request's draft is not read.
    """
    from vllm.utils.torch_utils import async_tensor_h2d

    states = runner.req_states
    slots = torch.tensor([states.req_id_to_index[req_id] for req_id in req_ids])
    device = runner.device
    slots = async_tensor_h2d(slots, device=device)
    tokens = async_tensor_h2d(torch.from_numpy(drafts), device=device)
    states.draft_tokens[slots, : drafts.shape[1]] = tokens
