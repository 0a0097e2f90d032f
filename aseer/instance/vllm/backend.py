"""A vLLM engine (AsyncLLM) behind the instance contract.

What aseer changes in vLLM is in `patches.py`. Three things are done here rather than by
vLLM, because a chunk is a request of its own to it:

- Stop strings are matched, and text is decoded, by vLLM's own incremental detokenizer,
  primed with what earlier chunks generated, so that both see the response and not the
  chunk.
- Output is streamed a few tokens at a time (`stream_interval`), enough for progress
  reports at a fraction of the cost of a message a token.
- Every instance gets a random seed of its own: with vLLM's default (0 everywhere) two
  engines in the same state would draw the same samples for siblings of one group.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
from array import array
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from aseer.compat.versions import installed_vllm
from aseer.dgds.messages import EXTRA_ARGS_KEY
from aseer.errors import EngineError, describe
from aseer.instance.base import EngineDied
from aseer.instance.vllm import patches
from aseer.instance.vllm.arguments import USAGE, engine_args_of, with_our_defaults
from aseer.instance.vllm.asking import (
    end_of,
    engine_params,
    not_finite,
    sampled_logprobs,
)
from aseer.instance.vllm.images import ImagePrompts
from aseer.instance.vllm.joining import join_pool
from aseer.instance.vllm.limits import (
    are_mixed,
    kv_world_size,
    num_lookahead_tokens,
)
from aseer.instance.vllm.speculation import (
    Speculation,
    draft_identity,
    unpadded,
)
from aseer.instance.vllm.stats import EngineStats
from aseer.instance.vllm.text import Text
from aseer.instance.vllm.transfer import Transfer
from aseer.instance.vllm.v2 import PRICE_OF_V1, engine_args_for_v2, why_not_v2
from aseer.instance.vllm.weights import EngineWeights
from aseer.kv.settings import cache_salt
from aseer.types import ChunkEnd, InstanceId, InstanceInfo, KvGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.instance.base import Emit, InstanceSpec
    from aseer.types import Chunk, ChunkId, InstanceLoad
    from aseer.weights.checks import ModelSpec

_log = logging.getLogger("aseer.instance")


class VllmBackend:
    """See `Backend`."""

    def __init__(self, spec: InstanceSpec) -> None:
        self._spec = spec
        self._llm: AsyncLLM | None = None
        self._tokenizer: Any = None
        self._stats = EngineStats()
        self._running: dict[ChunkId, str] = {}
        self._speculation: Speculation | None = None
        self._info: InstanceInfo | None = None
        self._images: ImagePrompts | None = None
        self._weights = EngineWeights(lambda: self._engine)

    async def start(self) -> InstanceInfo:
        """See `Backend`."""
        args = with_our_defaults(await join_pool(self._spec.engine_args))
        given, on_v2 = dict(args), False
        if self._spec.drafting is not None:
            reason = why_not_v2(args, device=current_platform.device_type)
            on_v2 = self._plan_drafts(args, reason)
        self._llm = llm = self._make_engine(args)
        if on_v2 and not llm.vllm_config.use_v2_model_runner:
            await asyncio.to_thread(llm.shutdown)
            args = given
            on_v2 = self._plan_drafts(args, "vLLM chose it, and says why above")
            self._llm = llm = self._make_engine(args)
        if llm.vllm_config.speculative_config is not None:
            self._speculation = Speculation(llm, self._spec.drafting, on_v2=on_v2)
            await self._speculation.start()
            if self._speculation.drafts_on:
                _log.warning(
                    "model runner V2 drafts on whatever its worker is told: the engine "
                    "is started again without speculation"
                )
                self._speculation = None
                await asyncio.to_thread(llm.shutdown)
                del args["speculative_config"]
                self._llm = llm = self._make_engine(args)
            self._stats.speculation = self._speculation
        tokenizer = llm.get_tokenizer()
        self._tokenizer = (
            await tokenizer if inspect.isawaitable(tokenizer) else tokenizer
        )
        config = llm.vllm_config
        groups, num_set_aside = await self._kv_groups()
        num_blocks = config.cache_config.num_gpu_blocks - 1  # without the null block
        # Some of vLLM's backends switch it off, as those for latents (MLA) on CPUs.
        caches_prefixes = bool(config.cache_config.enable_prefix_caching)
        self._images = ImagePrompts(llm)
        name, version = installed_vllm() or ("vllm", metadata.version("vllm"))
        self._info = InstanceInfo(
            instance_id=InstanceId(self._spec.instance_id),
            num_kv_blocks=max(1, num_blocks - num_set_aside),
            # A hit ends where a block of every group does.
            block_size=math.lcm(*(group.block_size for group in groups)),
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            num_lookahead_tokens=num_lookahead_tokens(config),
            shares_prompts=caches_prefixes,
            keeps_kv=caches_prefixes,
            model=config.model_config.model,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=config.device_config.device_type,
            engine_version=f"{name} {version}",
            pid=os.getpid(),
            kv_groups=tuple(groups) if are_mixed(groups) else (),
            kv_world_size=kv_world_size(config),
            why_no_pool=await self._why_no_pool(),
            max_images=self._images.max_images,
            image_token_id=self._images.image_token_id,
        )
        return self._info

    def _plan_drafts(self, args: dict[str, Any], why_not: str) -> bool:
        """Set in `args` how the engine drafts; whether that is on model runner V2.

        Args:
            why_not: the reason why it cannot be; empty = it can.
        """
        assert self._spec.drafting is not None
        if not why_not:
            settings = self._spec.drafting.settings
            args |= engine_args_for_v2(
                args,
                max_draft_tokens=settings.max_draft_tokens,
                tail_draft_tokens=settings.tail_draft_tokens,
            )
            return True
        if not current_platform.is_cpu():
            _log.warning("%s", PRICE_OF_V1.format(reason=why_not))
        args["speculative_config"] = unpadded(args["speculative_config"])
        patches.apply("configure")
        return False

    def _make_engine(self, args: dict[str, Any]) -> AsyncLLM:
        return AsyncLLM.from_engine_args(
            engine_args_of(args),
            stat_loggers=[self._stats.make_logger],
            usage_context=USAGE,
        )

    async def run(self, chunk: Chunk, emit: Emit) -> ChunkEnd:
        """See `Backend`."""
        request_id = f"{chunk.request_id}#{chunk.chunk_id}"
        try:
            return await self._generate(chunk, request_id, emit)
        except Exception as error:
            if isinstance(error, EngineDeadError) or self._engine.errored:
                raise EngineDied(describe(error.__cause__ or error)) from error
            _log.exception("chunk %s failed", request_id)
            return ChunkEnd(reason="error", error=describe(error.__cause__ or error))
        finally:
            self._running.pop(chunk.chunk_id, None)

    async def _generate(self, chunk: Chunk, request_id: str, emit: Emit) -> ChunkEnd:
        text = Text(chunk, self._tokenizer) if chunk.sampling["detokenize"] else None
        inputs = array("i", chunk.prompt + chunk.generated).tolist()
        params = engine_params(chunk)
        if self._speculation is not None and self._speculation.drafts_by_group:
            params.extra_args = {
                **(params.extra_args or {}),
                EXTRA_ARGS_KEY: draft_identity(chunk),
            }
        assert self._info is not None
        namespace, version = self._spec.kv_namespace, chunk.weight_version
        salt = cache_salt(namespace, self._info, version)
        if chunk.images:
            assert self._images is not None
            outputs = self._images.generate(
                chunk, inputs, salt, params, request_id, self._weights.lora
            )
        else:
            prompt = tokens_input(inputs, cache_salt=salt)
            outputs = self._engine.generate(
                prompt, params, request_id, lora_request=self._weights.lora
            )
        self._running[chunk.chunk_id] = request_id
        cached: int | None = None
        async for output in outputs:
            done = output.outputs[0]
            if cached is None and output.num_cached_tokens is not None:
                cached = output.num_cached_tokens
                emit(num_cached_tokens=cached)
            tokens = list(done.token_ids)
            logprobs = sampled_logprobs(done.logprobs, tokens)
            # Of floats of 32 bits the sum is finite if each is.
            if not math.isfinite(sum(logprobs)):
                await self._engine.abort(request_id)
                return not_finite(tokens, logprobs, text)
            stopped = done.finish_reason == "stop"
            hit = None
            if text is not None:
                kept, hit = text.add(tokens, stopped)
                tokens, logprobs = tokens[:kept], logprobs[:kept]
            new_text = text.take(stopped or hit is not None) if text else ""
            if hit is not None:
                await self._engine.abort(request_id)
            # From here to the chunk's end nothing waits: tokens that end a response are
            # never reported without saying so, as a resume would go on behind them.
            emit(tokens=tokens, logprobs=logprobs, text=new_text)
            if hit is not None:
                return ChunkEnd(reason="stop", stop_reason=hit)
            if done.finish_reason is not None:
                return end_of(done, text)
        raise EngineDied(f"the engine ended {request_id} without a reason")

    @property
    def _engine(self) -> AsyncLLM:
        assert self._llm is not None, "start() first"
        return self._llm

    async def abort(self, chunk_id: ChunkId) -> None:
        """See `Backend`."""
        request_id = self._running.get(chunk_id)
        if request_id is not None:
            await self._engine.abort(request_id)

    def load(self) -> InstanceLoad:
        """See `Backend`."""
        return self._stats.load()

    async def attend(self) -> None:
        """See `Backend`."""
        if self._speculation is not None:
            await self._speculation.attend(lambda: bool(self._running))

    async def describe_weights(self) -> ModelSpec:
        """See `Backend`."""
        return await self._weights.describe()

    async def prepare_weights(self, index: str, others: Sequence[str] = ()) -> None:
        """See `Backend`."""
        await self._weights.prepare(index, *others)

    async def commit_weights(self) -> None:
        """See `Backend`."""
        await self._weights.commit()

    async def discard_weights(self) -> None:
        """See `Backend`."""
        await self._weights.discard()

    async def transfer_weights(self, step: str, info: dict[str, Any]) -> Any:
        """See `Backend`."""
        try:
            done = await Transfer(self._engine).do(step, info)
            if step == "finish":
                await self._weights.drop_adapters()
            return done
        except EngineDeadError as error:
            raise EngineDied(describe(error)) from error

    async def _kv_groups(self) -> tuple[list[KvGroup], int]:
        """See `describe_groups`."""
        answers = await self._engine.collective_rpc("aseer_describe_kv")
        groups, num_set_aside = answers[0]  # all workers plan the same
        return [KvGroup(*group) for group in groups], num_set_aside

    async def _why_no_pool(self) -> str:
        """See `InstanceInfo`."""
        answers = await self._engine.collective_rpc("aseer_why_no_pool")
        return str(answers[0])  # the same in all workers

    async def sleep(self, level: int) -> None:
        """See `Backend`."""
        config = self._engine.vllm_config
        if config.device_config.device_type == "cpu":
            raise EngineError("vLLM cannot sleep on a CPU: there is nothing to release")
        if not config.model_config.enable_sleep_mode:
            raise EngineError(
                "it was started without sleep mode; set "
                "EngineConfig(engine_args={'enable_sleep_mode': True})"
            )
        await self._engine.collective_rpc("aseer_rest_kv")
        await self._engine.sleep(level)

    async def wake(self, tags: list[str] | None = None) -> None:
        """See `Backend`."""
        await self._engine.wake_up(tags)

    async def close(self) -> None:
        """See `Backend`."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
