"""Two ways to sample the same groups: aseer, and plain vLLM to compare it with.

Both roll out on two engines of one core each, give every response's token ids and the
logprobs it was sampled with, and take new weights between rollouts.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import aseer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from transformers import PreTrainedModel

Groups = Any  # a list of aseer.Group, or an async iterator of them


class Sample(NamedTuple):
    """One response; `problem` is its group's metadata."""

    problem: Any
    prompt: list[int]
    response: list[int]
    logprobs: list[float]


class AseerSampler:
    """Rollouts by aseer."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self._engine = aseer.Engine(aseer.EngineConfig(model=str(model), **settings))
        self._stack = AsyncExitStack()
        self.acceptance_length = 1.0

    async def __aenter__(self) -> AseerSampler:
        await self._stack.enter_async_context(self._engine)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def rollout(self, groups: Groups) -> AsyncIterator[list[Sample]]:
        """Whole groups as they are complete; leaving the loop aborts the rest."""
        async with self._engine.rollout(groups) as rollout:
            try:
                async for responses in rollout.by_group():
                    yield [
                        Sample(r.metadata, r.prompt_token_ids, r.token_ids, r.logprobs)
                        for r in responses
                    ]
            finally:
                progress = rollout.progress()
                if progress is not None and progress.speculation is not None:
                    self.acceptance_length = progress.speculation.acceptance_length

    async def update(self, policy: PreTrainedModel, folder: Path) -> None:
        """The next rollout samples from these weights."""
        await self._engine.update_weights(policy)


class VllmSampler:
    """Rollouts by plain vLLM: samples go round the engines, each runs to its end."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self._args = {"model": str(model), **settings}
        self._engines: list[Any] = []
        self._sockets = tempfile.TemporaryDirectory()  # which vLLM leaves behind
        self._num_samples = 0
        self.acceptance_length = 1.0

    async def __aenter__(self) -> VllmSampler:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = self._args
        os.environ["VLLM_RPC_BASE_PATH"] = self._sockets.name
        for i in range(args["num_instances"]):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(i)
            engine_args = AsyncEngineArgs(
                model=args["model"],
                dtype=args["dtype"],
                max_model_len=args["max_model_len"],
                max_num_seqs=args["max_num_seqs"],
                kv_cache_memory_bytes=args["kv_cache_bytes"],
                seed=(args["seed"] or 0) + i,
                enforce_eager=True,
                block_size=32,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
            )
            self._engines.append(AsyncLLM.from_engine_args(engine_args))
        return self

    async def __aexit__(self, *error: object) -> None:
        for engine in self._engines:
            engine.shutdown()
        self._sockets.cleanup()

    async def rollout(self, groups: Groups) -> AsyncIterator[list[Sample]]:
        """Whole groups as they are complete; for lists of groups only."""
        async with asyncio.TaskGroup() as tasks:
            runs = [tasks.create_task(self._group(group)) for group in groups]
            for done in asyncio.as_completed(runs):
                yield await done

    async def _group(self, group: aseer.Group) -> list[Sample]:
        async with asyncio.TaskGroup() as tasks:
            runs = [tasks.create_task(self._sample(group)) for _ in range(group.n)]
        return [run.result() for run in runs]

    async def _sample(self, group: aseer.Group) -> Sample:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number, self._num_samples = self._num_samples, self._num_samples + 1
        params = SamplingParams(
            **group.sampling, logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        engine = self._engines[number % len(self._engines)]
        prompt = {"prompt_token_ids": group.prompt}
        async for output in engine.generate(prompt, params, str(number)):
            done = output.outputs[0]
        tokens = list(done.token_ids)
        rows = zip(done.logprobs, tokens, strict=True)
        logprobs = [row[token].logprob for row, token in rows]
        return Sample(group.metadata, group.prompt, tokens, logprobs)

    async def update(self, policy: PreTrainedModel, folder: Path) -> None:
        """By way of a checkpoint on disk, which every engine loads."""
        policy.save_pretrained(folder)
        for engine in self._engines:
            where = {"weights_path": str(folder)}
            await engine.collective_rpc("reload_weights", kwargs=where)
            await engine.reset_prefix_cache()
