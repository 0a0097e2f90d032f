"""Weights that come straight from a trainer's GPUs, through vLLM's public calls.

A transfer's steps, in their order: "look", "init", "start", "update" (as often as there
are buffers), "finish", and perhaps "compare". Only from "start" on anything changes.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)

from aseer.errors import EngineError
from aseer.instance.vllm.caches import empty_caches
from aseer.instance.vllm.weights import refuse_lost_weights

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_CONFIG_ARG = "weight_transfer_config"
# What vLLM calls its transfer engines, and what ours are called that derive of them
# (`aseer.instance.vllm.receivers`).
OURS = {"ipc": "aseer-ipc", "nccl": "aseer-nccl"}
_RECEIVERS = "aseer.instance.vllm.receivers"
_CLASSES = {"aseer-ipc": "IpcReceiver", "aseer-nccl": "NcclReceiver"}


def offer_receivers() -> None:
    """Let vLLM find our transfer engines by their names, once they are asked for."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, class_name in _CLASSES.items():
        with suppress(ValueError):  # it was offered before in this process
            WeightTransferEngineFactory.register_engine(name, _RECEIVERS, class_name)


def with_our_receivers(args: dict[str, Any]) -> dict[str, Any]:
    """An engine's arguments, with our transfer engines in place of vLLM's."""
    config = args.get(_CONFIG_ARG)
    if not config:
        return args
    backend = config.get("backend", "nccl")
    return args | {_CONFIG_ARG: {**config, "backend": OURS.get(backend, backend)}}


class Transfer:
    """The steps of a transfer at one engine (vLLM's AsyncLLM)."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def do(self, step: str, info: dict[str, Any]) -> Any:
        """Do a step; see the module.

        Raises:
            EngineError: there is no such step, or the engine was started without
                transfers.
        """
        steps: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "look": self._look,
            "init": self._init,
            "start": self._start,
            "update": self._update,
            "finish": self._finish,
            "compare": self._compare,
        }
        if step not in steps:
            raise EngineError(f"a weight transfer has no step {step!r}")
        return await steps[step](info)

    async def _look(self, info: dict[str, Any]) -> dict[str, Any]:
        """Which transfer engine there is, and on which GPUs its workers are."""
        config = self._engine.vllm_config.weight_transfer_config
        if config is None:
            wanted = info["backend"]
            raise EngineError(
                f"it was started without vLLM's transfer of weights; set EngineConfig("
                f"engine_args={{'weight_transfer_config': {{'backend': {wanted!r}}}}}),"
                " or use transfer='host'"
            )
        refuse_lost_weights(self._engine.vllm_config)
        names = {ours: theirs for theirs, ours in OURS.items()}
        gpus = await self._engine.collective_rpc("aseer_gpu")
        backend = names.get(config.backend, config.backend)
        return {"backend": backend, "num_workers": len(gpus), "gpus": gpus}

    async def _init(self, info: dict[str, Any]) -> None:
        request = WeightTransferInitRequest(init_info=info)
        await self._engine.init_weight_transfer_engine(request)

    async def _start(self, _: dict[str, Any]) -> None:
        await self._engine.collective_rpc("aseer_begin_transfer")
        await self._engine.start_weight_update()

    async def _update(self, info: dict[str, Any]) -> None:
        request = WeightTransferUpdateRequest(update_info=info)
        await self._engine.update_weights(request)

    async def _finish(self, _: dict[str, Any]) -> None:
        await self._engine.finish_weight_update()
        await self._engine.collective_rpc("aseer_end_transfer")
        await empty_caches(self._engine)

    async def _compare(self, _: dict[str, Any]) -> str:
        """What tells the engine's weights from others; empty if vLLM cannot say it."""
        compute = getattr(self._engine, "compute_weight_checksums", None)
        if compute is None:
            return ""
        sums = sorted(pair for worker in await compute() for pair in worker.items())
        return hashlib.sha256(repr(sums).encode()).hexdigest()
