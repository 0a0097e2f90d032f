"""Speculation on one engine: its start and its figures.

At the start the sampler that verifies drafts is tested on the running engine. If it
fails, nothing is drafted, and the log says so. Then a few short runs measure what steps
with and without drafts take, for the budget to start from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import msgspec
from vllm import SamplingParams
from vllm.config import SpeculativeConfig
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from aseer.counts import DraftCounts
from aseer.dgds.cap import max_rows_verified
from aseer.dgds.messages import EXTRA_ARGS_KEY, DraftingSpec
from aseer.dgds.profile import graph_tokens, profile_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.types import Chunk

_log = logging.getLogger("aseer.instance")

_TIMES_INTERVAL_S = 1.0
_WATCH_INTERVAL_S = 0.1
# Tokens of each request of the steps that are measured at the start.
_PROFILE_STEPS = 4
_SCHEDULE = "num_speculative_tokens_per_batch_size"


def draft_identity(chunk: Chunk) -> dict[str, Any]:
    """What the drafter must know of a chunk, for vLLM's `extra_args`."""
    prefix = f"{chunk.rollout_id}:"
    return {
        "group": prefix + chunk.group_id,
        "request": prefix + chunk.request_id,
        "prompt_tokens": len(chunk.prompt) // 4,
        "probe": chunk.request_id.endswith("/0"),
        "images": "".join(image.key for image in chunk.images),
    }


def unpadded(settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's `speculative_config`, so that it drafts what we draft and no more.

    vLLM has a request that begins with one token to compute, as a chunk does that finds
    its KV, verify as many made-up tokens as are ever drafted, to give all steps one
    shape. It does not where the number drafted depends on the batch's size; that it
    says the same for every size does not matter. On a GPU its CUDA graphs are piecewise
    then; whole ones are for steps of one shape.
    """
    is_known = _SCHEDULE in {field.name for field in fields(SpeculativeConfig)}
    if settings["method"] != "custom_class" or not is_known:
        return settings
    return {_SCHEDULE: [(1, 1, settings["num_speculative_tokens"])], **settings}


def ends_with_chunk(config: Any) -> bool:
    """Whether no drafted token's KV lies past its chunk's end; of vLLM's config."""
    return config.method == "custom_class" and bool(getattr(config, _SCHEDULE, None))


class Speculation:
    """An engine's speculation: its start, and what it has done."""

    def __init__(
        self, llm: Any, drafting: DraftingSpec | None, *, on_v2: bool = False
    ) -> None:
        """Prepare; `drafting` is for our own drafter, None for one of vLLM's.

        Args:
            on_v2: whether it is on model runner V2, which counts for itself.
        """
        self._llm = llm
        self._drafting = drafting
        self._counts_itself = on_v2
        self._counts = DraftCounts()
        self._times_at_start = DraftCounts()
        self.is_refused = False
        self.drafts_on = False
        """Whether drafts were refused, and vLLM cannot be made to stop drafting."""

    @property
    def counts(self) -> DraftCounts:
        """Since the start."""
        return self._counts

    @property
    def drafts_by_group(self) -> bool:
        """Whether chunks must bring their `draft_identity`."""
        return self._drafting is not None and not self.is_refused

    async def start(self) -> None:
        """Test the sampler; then begin to draft, or never."""
        for verdict in await self._call("aseer_check_sampler"):
            if not verdict["is_right"]:
                self.is_refused = True
                _log.warning(
                    "NOT SPECULATING: this engine's sampler for drafts does not sample "
                    "from the model's distribution (%s)",
                    verdict["fault"],
                )
        if self.is_refused:
            self.drafts_on = not all(await self._call("aseer_refuse_drafts"))
        elif self._drafting is not None:
            spec = msgspec.to_builtins(self._drafting)
            await self._call("aseer_start_drafting", spec)
            await self._profile()
            self._times_at_start = await self._times()

    async def attend(self, is_busy: Callable[[], bool]) -> None:
        """Keep the times up to date, until cancelled.

        An engine is asked while it is busy and as soon as it is not, but not when it is
        idle: a worker polls for the next call after each, and takes its core from
        others.
        """
        was_busy = False
        asked_at = 0.0
        while self.drafts_by_group:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            was_busy, before = is_busy(), was_busy
            is_due = was_busy and time.monotonic() - asked_at >= _TIMES_INTERVAL_S
            if not (is_due or (before and not was_busy)):
                continue
            asked_at = time.monotonic()
            times = await self._times() - self._times_at_start
            if self._counts_itself:
                self._counts = times
            else:
                self._counts = replace(
                    self._counts,
                    step_s=times.step_s,
                    draft_s=times.draft_s,
                    share_buckets=times.share_buckets,
                )

    def record(self, stats: Any) -> None:
        """Take vLLM's statistics of a step's drafts (its SpecDecodingStats)."""
        if self._counts_itself:
            return
        self._counts += DraftCounts(
            num_drafts=stats.num_drafts,
            drafted=_per_position(stats, "num_draft_tokens_per_pos"),
            accepted=_per_position(stats, "num_accepted_tokens_per_pos"),
        )

    async def _times(self) -> DraftCounts:
        """Of the steps since the worker's start, as its first rank counts them."""
        counts = (await self._call("aseer_drafting_times"))[0]
        return msgspec.convert(counts, DraftCounts)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        results: list[Any] = await self._llm.collective_rpc(method, args=args)
        return results

    async def _profile(self) -> None:
        """Measure short steps of several sizes; the drafter learns from them."""
        assert self._drafting is not None
        config = self._llm.vllm_config
        most = config.speculative_config.num_speculative_tokens
        sizes = profile_sizes(
            config.scheduler_config.max_num_seqs,
            self._drafting.settings.max_draft_tokens,
            graph_tokens(config),
            max_rows_verified(config.model_config.get_vocab_size()),
        )
        for num_rows, num_drafted in sizes:
            async with asyncio.TaskGroup() as tasks:
                for i in range(num_rows):
                    request = self._profile_request(i, min(num_drafted, most))
                    tasks.create_task(request)

    async def _profile_request(self, index: int, num_drafted: int) -> None:
        told = {
            "group": "profile",
            "request": str(index),
            "prompt_tokens": 1,
            "probe": False,
            "profile": num_drafted,
        }
        params = SamplingParams(
            max_tokens=_PROFILE_STEPS,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={EXTRA_ARGS_KEY: told},
        )
        prompt = tokens_input([index + 1])
        name = f"profile-{num_drafted}-{index}"
        async for _ in self._llm.generate(prompt, params, name):
            pass


def _per_position(stats: Any, name: str) -> tuple[int, ...]:
    return tuple(getattr(stats, name, ()))
