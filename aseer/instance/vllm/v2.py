"""Drafts by group on vLLM's model runner V2: when, with which settings, and the start.

What is done to V2 is in `aseer/dgds/speculator.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from aseer.dgds.messages import ADDITIONAL_CONFIG_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.dgds.budget import Budget
    from aseer.dgds.replica import Replica
    from aseer.dgds.steptime import StepTimeModel

_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_SCHEDULE = "num_speculative_tokens_per_batch_size"
# Of V2's own drafters, the one that needs no model.
_METHOD = "ngram_gpu"
# In a step of at most so many requests drafts may be `tail_draft_tokens` long.
_TAIL_ROWS = 4
# Steps of more requests than this compute as long as they read weights, or longer, and
# verify for nothing. Each row takes room for its longest draft from what a step may
# schedule, and no step of more rows than this needs it.
_MAX_ROWS = 255
# The fewest tokens that vLLM schedules in a step on a GPU, unless it is told.
_LEAST_STEP_TOKENS = 8192

PRICE_OF_V1 = (
    "speculation='dgds' is on vLLM's deprecated model runner V1 here ({reason}): it "
    "schedules synchronously and launches CUDA graphs in pieces, which an 8B model's "
    "steps pay for with an estimated 25% to 50% before a draft is accepted. Compare "
    "with speculation='off'"
)


def why_not_v2(args: Mapping[str, Any], *, device: str) -> str:
    """Why an engine drafts on model runner V1; empty = it drafts on V2.

    Args:
        args: of the engine.
        device: "cuda" or "cpu".
    """
    said = os.environ.get(_VARIABLE)
    if said is not None and said.strip() in ("0", ""):
        return f"{_VARIABLE}={said}"
    if said is None and device == "cpu":
        return "CPUs run V1"
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if int(args.get(name) or 1) > 1:
            return f"{name}={args[name]}, and drafts are made in one worker"
    if importlib.util.find_spec("vllm.v1.worker.gpu.spec_decode.ngram") is None:
        return "this vLLM's V2 has no drafter without a model"
    from vllm.config import SpeculativeConfig

    if _SCHEDULE not in {field.name for field in fields(SpeculativeConfig)}:
        return "this vLLM cannot vary how many tokens it drafts"
    return ""


def engine_args_for_v2(
    args: Mapping[str, Any], *, max_draft_tokens: int, tail_draft_tokens: int
) -> dict[str, Any]:
    """The engine's arguments, so that V2 has our speculator.

    The number of placeholders depends on the number of rows. That no row has any where
    there are many makes vLLM capture whole CUDA graphs for steps without drafts.
    """
    tokens = int(args.get("max_num_batched_tokens") or _LEAST_STEP_TOKENS)
    most = int(args.get("max_num_seqs") or _MAX_ROWS + 1)
    # At most half of a step's tokens are placeholders: the rest is for prompts.
    rows = min(_MAX_ROWS, most - 1, tokens // (2 * (1 + max_draft_tokens)))
    tail = max(1, min(_TAIL_ROWS, rows))
    schedule = [(1, tail, max(max_draft_tokens, tail_draft_tokens))]
    if rows > tail:
        schedule.append((tail + 1, rows, max_draft_tokens))
    if most > max(rows, tail):
        schedule.append((max(rows, tail) + 1, most, 0))
    return {
        **args,
        "speculative_config": {
            "method": _METHOD,
            "num_speculative_tokens": max(max_draft_tokens, tail_draft_tokens),
            # Nothing is looked up by it.
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 2,
            _SCHEDULE: schedule,
        },
        "additional_config": {
            **(args.get("additional_config") or {}),
            ADDITIONAL_CONFIG_KEY: 1,
        },
    }


def offer() -> None:
    """Have model runners V2 that this process makes take our speculator, if there are
    such.
    """
    if importlib.util.find_spec("vllm.v1.worker.gpu.spec_decode") is not None:
        from aseer.dgds import speculator

        speculator.offer()


def is_v2(runner: Any) -> bool:
    """Whether this is a model runner V2."""
    return hasattr(runner, "req_states")


def verify_drafts(runner: Any) -> Any:
    """Have our sampler verify our drafts; the `Verdict` on whatever verifies drafts."""
    from aseer.dgds.sampler_v2 import test_sampler_v2
    from aseer.dgds.speculator import GroupSpeculator
    from aseer.dgds.verifier_v2 import RowVerifier

    if isinstance(runner.speculator, GroupSpeculator):
        runner.rejection_sampler = RowVerifier(
            runner.sampler, runner.num_speculative_steps
        )
    return test_sampler_v2(runner)


def refuse_drafts(runner: Any) -> bool:
    """Have no step verify a draft of ours; false if the drafts are not ours."""
    from aseer.dgds.speculator import GroupSpeculator, Joined

    if not isinstance(runner.speculator, GroupSpeculator):
        return runner.speculator is None
    Joined(runner, None)
    return True


def start_drafting(
    runner: Any,
    replica: Replica,
    budget: Budget,
    model: StepTimeModel,
    probe_weight: float,
) -> Any:
    """Draft from now on; returns what counts."""
    from aseer.dgds.ahead import Ahead
    from aseer.dgds.rows import Rows
    from aseer.dgds.speculator import Joined, upload

    ahead = Ahead(
        Rows(runner.max_num_reqs, runner.max_model_len),
        replica,
        budget,
        model,
        probe_weight,
        runner.max_model_len,
        functools.partial(upload, runner),
        launches_ahead=runner.device.type != "cpu",
    )
    Joined(runner, ahead)
    return ahead
