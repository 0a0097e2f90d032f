"""A simulated engine: the contract of a real one, without a model.

For tests of everything around the engine and for trying the library without vLLM. Its
"model" is a function of the tokens so far, so that a response does not depend on how it
was divided: the next token is a hash of the last tokens and the position, and a token
below `num_eos_tokens` ends the response. At temperature > 0 the chunk's seed goes in.
Its "weights" are whatever tensors `weights` names; a checksum of their bytes goes in.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
import zlib
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aseer.errors import ConfigError
from aseer.types import (
    ChunkEnd,
    InstanceId,
    InstanceInfo,
    InstanceLoad,
)
from aseer.weights.checks import ModelSpec, TensorSpec
from aseer.weights.files import read_index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.instance.base import Emit, InstanceSpec
    from aseer.types import Chunk, ChunkId
    from aseer.weights.files import Index

_HELP_S = 3600.0  # longer than any test
_DEFAULTS: dict[str, Any] = {
    "num_kv_blocks": 4096,
    "block_size": 16,
    "max_num_seqs": 64,
    "max_model_len": 4096,
    "vocab_size": 512,
    "num_eos_tokens": 4,
    "step_s": 0.0005,
    "start_s": 0.0,
    "fail_at_start": "",
    "die_after_tokens": 0,
    "hang_after_tokens": 0,
    "helper": "",  # "spawn" or "fork": a process as vLLM has them, that only sleeps
    "fatal_prompt": None,  # token ids; kills the engine that runs it
    "max_lora_rank": 0,
    "weights": {},  # shape by name; all are F32
    # [identity, "prepare", "commit" or a transfer's step, "refuse" or "die"]: of one
    # incarnation.
    "weights_fault": None,
    "weight_transfer_config": None,  # {"backend": name}: takes transfers
}


class SimBackend:
    """See `Backend`; settings are the keys of `_DEFAULTS`."""

    def __init__(self, spec: InstanceSpec) -> None:
        unknown = sorted(set(spec.engine_args) - set(_DEFAULTS))
        if unknown:
            raise ConfigError(
                f"simulated instances do not know {unknown}; known: {sorted(_DEFAULTS)}"
            )
        self._spec = spec
        self._args = _DEFAULTS | spec.engine_args
        self._slots = asyncio.Semaphore(self._args["max_num_seqs"])
        self._aborted: set[ChunkId] = set()
        self._running: dict[ChunkId, int] = {}
        self._num_waiting = 0
        self._num_tokens = 0
        self._cached: dict[bytes, int] = {}
        self._prepared: tuple[int, bool] | None = None  # whether they are adapters
        self._weights = 0
        self._adapters = 0
        self._sleeping: set[str] = set()

    async def start(self) -> InstanceInfo:
        """See `Backend`."""
        if self._args["helper"]:
            context: Any = multiprocessing.get_context(self._args["helper"])
            context.Process(target=time.sleep, args=(_HELP_S,), daemon=True).start()
        await asyncio.sleep(self._args["start_s"])
        if self._args["fail_at_start"]:
            raise RuntimeError(self._args["fail_at_start"])
        return InstanceInfo(
            instance_id=InstanceId(self._spec.instance_id),
            num_kv_blocks=self._args["num_kv_blocks"],
            block_size=self._args["block_size"],
            max_num_seqs=self._args["max_num_seqs"],
            max_model_len=self._args["max_model_len"],
            vocab_size=self._args["vocab_size"],
            model="sim",
            device="sim",
            pid=os.getpid(),
        )

    async def run(self, chunk: Chunk, emit: Emit) -> ChunkEnd:
        """See `Backend`."""
        assert not self._sleeping, "wake it first"
        self._num_waiting += 1
        async with self._slots:
            self._num_waiting -= 1
            try:
                return await self._generate(chunk, emit)
            finally:
                self._running.pop(chunk.chunk_id, None)
                self._aborted.discard(chunk.chunk_id)

    async def _generate(self, chunk: Chunk, emit: Emit) -> ChunkEnd:
        context = array("i", chunk.prompt + chunk.generated)
        if array("i", chunk.prompt).tolist() == self._args["fatal_prompt"]:
            os._exit(13)
        emit(num_cached_tokens=self._find_cached(chunk, len(context)))
        seed = 0 if chunk.sampling["temperature"] == 0 else chunk.seed or 0
        for i in range(chunk.max_tokens):
            self._running[chunk.chunk_id] = len(context)
            await asyncio.sleep(self._args["step_s"])
            if chunk.chunk_id in self._aborted:
                return ChunkEnd(reason="aborted")
            self._count_token()
            token = self._next_token(context, seed)
            context.append(token)
            emit(tokens=[token], logprobs=[-(token % 7) / 8], text=_text(token))
            is_eos = token < self._args["num_eos_tokens"] and i >= chunk.min_tokens
            if is_eos and not chunk.sampling["ignore_eos"]:
                return ChunkEnd(reason="stop", stop_reason=token)
        self._cached[chunk.request_id.encode()] = len(context) - 1
        if len(self._cached) > self._args["num_kv_blocks"]:  # each holds a block
            del self._cached[next(iter(self._cached))]
        return ChunkEnd(reason="length")

    def _find_cached(self, chunk: Chunk, num_tokens: int) -> int:
        block = self._args["block_size"]
        held = self._cached.get(chunk.request_id.encode(), 0)
        return int(min(held, num_tokens - 1) // block * block)

    def _next_token(self, context: array[int], seed: int) -> int:
        value = seed ^ len(context) ^ self._weights ^ self._adapters
        for token in context[-4:]:
            value = (value * 6364136223846793005 + token + 1442695040888963407) % 2**64
        return (value >> 33) % int(self._args["vocab_size"])

    def _count_token(self) -> None:
        self._num_tokens += 1
        if self._num_tokens == self._args["die_after_tokens"]:
            os._exit(13)
        while 0 < self._args["hang_after_tokens"] <= self._num_tokens:
            os.read(0, 0)  # a busy hang: the loop never runs again

    async def abort(self, chunk_id: ChunkId) -> None:
        """See `Backend`."""
        if chunk_id in self._running:
            self._aborted.add(chunk_id)

    def load(self) -> InstanceLoad:
        """See `Backend`."""
        block = self._args["block_size"]
        used = sum(-(-n // block) for n in self._running.values())
        return InstanceLoad(
            num_running=len(self._running),
            num_waiting=self._num_waiting,
            kv_used=used / self._args["num_kv_blocks"],
        )

    async def attend(self) -> None:
        """See `Backend`."""

    async def describe_weights(self) -> ModelSpec:
        """See `Backend`."""
        shapes = self._args["weights"]
        specs = {name: TensorSpec("F32", tuple(s)) for name, s in shapes.items()}
        rank = self._args["max_lora_rank"]
        return ModelSpec(specs, dtype="F32", max_lora_rank=rank)

    async def prepare_weights(self, index: str, others: Sequence[str] = ()) -> None:
        """See `Backend`; those that follow have none."""
        del others
        self._fault("prepare")
        found = read_index(index)
        self._prepared = _checksum(found) << 32, found.lora_rank > 0

    async def commit_weights(self) -> None:
        """See `Backend`."""
        self._fault("commit")
        assert self._prepared is not None, "prepare first"
        assert "weights" not in self._sleeping, "wake them first"
        checksum, is_adapters = self._prepared
        self._prepared = None
        if is_adapters:
            self._adapters = checksum
        else:
            self._weights, self._adapters = checksum, 0
        self._cached.clear()

    async def discard_weights(self) -> None:
        """See `Backend`."""
        self._prepared = None

    async def transfer_weights(self, step: str, info: dict[str, Any]) -> Any:
        """See `Backend`; an update tells the weights' checksum, or a part of it."""
        config = self._args["weight_transfer_config"]
        if config is None:
            raise RuntimeError("it was started without a transfer of weights")
        self._fault(step)
        if step == "look":
            return {"backend": config["backend"], "num_workers": 1, "gpus": [""]}
        if step == "start":
            self._prepared = 0, False
        elif step == "update":
            assert self._prepared is not None, "start first"
            self._prepared = int(info["checksum"]) << 32, False
        elif step == "finish":
            assert self._prepared is not None, "start first"
            self._weights, self._adapters, self._prepared = self._prepared[0], 0, None
            self._cached.clear()
        elif step == "compare":
            return f"{self._weights:x}"
        return None

    async def sleep(self, level: int) -> None:
        """See `Backend`."""
        self._sleeping = {"weights", "kv_cache"}

    async def wake(self, tags: list[str] | None = None) -> None:
        """See `Backend`."""
        assert self._sleeping, "nobody told it to sleep"
        self._sleeping -= {"weights", "kv_cache"} if tags is None else set(tags)

    def _fault(self, step: str) -> None:
        identity, at, how = self._args["weights_fault"] or ("", "", "")
        if (self._spec.identity, step) == (identity, at):
            if how == "die":
                os._exit(13)
            raise RuntimeError(f"told to refuse to {step}")

    async def close(self) -> None:
        """See `Backend`."""


def follow(args: dict[str, Any]) -> None:
    """Be a part of a simulated engine that does nothing, for as long as any test."""
    del args
    time.sleep(_HELP_S)


def _checksum(index: Index) -> int:
    checksum = 0
    for tensor in index.tensors:
        data = Path(index.files[tensor.file]).read_bytes()
        end = tensor.offset + tensor.num_bytes
        checksum = zlib.crc32(data[tensor.offset : end], checksum)
    return checksum


def _text(token: int) -> str:
    return chr(0x4E00 + token)
