"""What `Engine` does about weights: updates in one call, or begun here, sent elsewhere.

A base class, since these methods share nothing with rollouts but the way to the host.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from aseer.runtime.steps import drive, drive_blocking, result_of
from aseer.runtime.weight_update import (
    begin_steps,
    check_target,
    finish_steps,
    update_steps,
)
from aseer.weights.sending import check_source

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aseer.inputs.calls import Transfer
    from aseer.report import WeightUpdateReport
    from aseer.runtime.host import Host
    from aseer.runtime.loop_thread import LoopThread
    from aseer.runtime.weights import Pause
    from aseer.weights.sending import WeightSource
    from aseer.weights.target import WeightTarget

#: A sharded trainer of hundreds of billions of parameters gathers and writes them in
#: minutes. Until then no rollout begins, so whoever died is not waited for longer.
UPDATE_TIMEOUT_S = 600.0


class TakesWeights(ABC):
    """The part of `Engine` that changes its weights."""

    @abstractmethod
    def _open(self) -> tuple[LoopThread, Host]:
        """The engine's thread and what lives there.

        Raises:
            EngineError: the engine is not open.
        """

    async def update_weights(
        self,
        source: WeightSource,
        *,
        version: int | None = None,
        pause: Pause | None = None,
        transfer: Transfer = "auto",
        verify: bool = False,
    ) -> WeightUpdateReport:
        """Give every instance new weights, or none of them.

        Names, shapes, dtypes and values are checked against the checkpoint that the
        engine was started from before anything changes. Tensors are written once into
        memory that all instances share; they stay there for instances that must be
        started again. Nothing made with the old weights is read after: prefix caches
        are emptied, and drafts dropped as `SpeculationConfig` says.

        Args:
            source: a checkpoint's directory (safetensors; it must stay as it is while
                the engine uses it), a `state_dict`, an `nn.Module`, or an iterable or
                async iterable of (name, tensor), which is taken in the calling thread
                and never held as a whole. Names are those of the checkpoint, with or
                without what DDP, FSDP and torch.compile put before them; of the two of
                a tied embedding and output layer one is enough. DTensors are gathered,
                adapters of a `peft.PeftModel` are merged in copies of its layers, or
                with `EngineConfig.max_lora_rank` sent alone.
            version: the number that responses carry from then on, greater than the
                current one; None = the current one plus 1.
            pause: what to do about a rollout in progress: "wait" for its end, or
                "abort" it, so that its unfinished responses come as `aborted`. None = a
                rollout in progress is an error.
            transfer: how tensors go. "host": through memory that instances share, from
                wherever they are. "ipc" and "nccl": straight from the GPUs of a trainer
                that shares them with the engines, or has others; the engines must be
                started for it (docs/training.md), the source must be a module or a
                `state_dict`, and an instance that dies later has no work until the next
                update, since no copy is kept. The calling thread is busy until engines
                have the weights, also in asyncio code. "auto": straight where the
                engines were started for it and the tensors are on GPUs, else "host".
            verify: after "ipc" or "nccl", have vLLM (0.32 or newer) compare the
                engines' weights with one another, which takes a second or so a GB.
        Raises:
            WeightUpdateError: every instance has the weights it had before.
            RolloutInProgressError: a rollout is in progress, and `pause` is None; or
                with "wait" it takes its groups as the caller reads it.
            EngineClosedError: the engine is not open.
        """
        thread, host = self._open()
        check_source(source, awaits=True)
        asker = asyncio.current_task()
        steps = update_steps(
            thread, host, source, version, pause, asker, transfer, verify=verify
        )
        return await drive(steps)

    def update_weights_sync(
        self,
        source: WeightSource,
        *,
        version: int | None = None,
        pause: Pause | None = None,
        transfer: Transfer = "auto",
        verify: bool = False,
    ) -> WeightUpdateReport:
        """As `update_weights`, for code without an event loop.

        Raises:
            WeightUpdateError: as for `update_weights`; also for an async iterable.
        """
        thread, host = self._open()
        check_source(source, awaits=False)
        asker = threading.current_thread()
        steps = update_steps(
            thread, host, source, version, pause, asker, transfer, verify=verify
        )
        return drive_blocking(steps)

    async def begin_update(
        self,
        *,
        version: int | None = None,
        pause: Pause | None = None,
        timeout_s: float = UPDATE_TIMEOUT_S,
        transfer: Transfer = "auto",
    ) -> WeightTarget:
        """Begin a weight update whose tensors come from other processes.

            target = await engine.begin_update()
            ...                              # in any process of this machine:
            target.send(policy.named_parameters())
            ...                              # here again, once that has returned:
            await engine.finish_update(target)

        The tensors are written by the process that has them, and do not pass through
        this one. Until the update is finished or abandoned no rollout begins.

        Args:
            version: as for `update_weights`, as is `pause`.
            timeout_s: until `finish_update` is called. After that the update is
                abandoned, so that a sender which died stops nothing.
            transfer: as for `update_weights`, but that "auto" is "host" here. With
                "ipc" or "nccl" every process of the trainer, which are one
                torch.distributed group, calls the target's `send` with its part of the
                same model; the one that has the engine is one of them.
        Returns:
            What sends the weights. It can be pickled.

        Raises:
            ConfigError: a setting that cannot work.
            WeightUpdateError: the version is not a later one, or there is no place.
            RolloutInProgressError: a rollout is in progress, and `pause` is None.
            EngineClosedError: the engine is not open.
        """
        thread, host = self._open()
        asker = asyncio.current_task()
        steps = begin_steps(thread, host, version, pause, timeout_s, asker, transfer)
        return await drive(steps)

    def begin_update_sync(
        self,
        *,
        version: int | None = None,
        pause: Pause | None = None,
        timeout_s: float = UPDATE_TIMEOUT_S,
        transfer: Transfer = "auto",
    ) -> WeightTarget:
        """As `begin_update`, for code without an event loop."""
        thread, host = self._open()
        asker = threading.current_thread()
        steps = begin_steps(thread, host, version, pause, timeout_s, asker, transfer)
        return drive_blocking(steps)

    async def finish_update(self, target: WeightTarget) -> WeightUpdateReport:
        """Give every instance the weights that were sent, or none of them.

        However this ends, the update is over.

        Raises:
            WeightUpdateError: nothing was sent, or not all, or the update is over;
                every instance has the weights it had before.
            EngineClosedError: the engine is not open.
        """
        return await drive(finish_steps(*self._open(), target))

    def finish_update_sync(self, target: WeightTarget) -> WeightUpdateReport:
        """As `finish_update`, for code without an event loop."""
        return drive_blocking(finish_steps(*self._open(), target))

    async def abandon_update(self, target: WeightTarget) -> None:
        """End an update with the weights that the engine has; if over, it stays so.

        A process that still sends is told so by an error.
        """
        check_target(target)
        thread, host = self._open()
        await result_of(thread, thread.submit(_abandoning(host, target)))

    def abandon_update_sync(self, target: WeightTarget) -> None:
        """As `abandon_update`, for code without an event loop."""
        check_target(target)
        thread, host = self._open()
        thread.submit(_abandoning(host, target)).result()

    @property
    def weight_version(self) -> int:
        """The version of the weights that every instance has; 0 = the checkpoint's."""
        return self._open()[1].weights.version


def _abandoning(
    host: Host, target: WeightTarget
) -> Callable[[], Coroutine[None, None, None]]:
    async def abandon() -> None:
        host.updates.abandon_open(target)

    return abandon
