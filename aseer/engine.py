"""The engine: vLLM instances that stay up between rollouts, and the way to them."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import time
import weakref
from collections.abc import AsyncIterable
from functools import partial
from typing import TYPE_CHECKING, Self

from aseer.config import (
    EngineConfig,
    check_chunk_size,
    check_pause,
    check_policy,
    check_speculation,
)
from aseer.errors import ConfigError, EngineClosedError, EngineError
from aseer.groups import GroupResolver
from aseer.host import Host
from aseer.instance.launch import plan_instances, this_machine
from aseer.instance.versions import check_vllm
from aseer.report import WeightUpdateReport
from aseer.rollout import Groups, Rollout, SyncRollout
from aseer.tokenizer import HuggingFaceTokenizer
from aseer.weights.sending import check_source, send, send_async

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from aseer.config import PolicyName
    from aseer.groups import Group
    from aseer.types import InstanceInfo
    from aseer.weights.files import Index
    from aseer.weights.keeper import Pause, Plan, SwitchTimes
    from aseer.weights.sending import WeightSource

current_engine: contextvars.ContextVar[Engine | None] = contextvars.ContextVar(
    "aseer_engine", default=None
)
_JOIN_MARGIN_S = 10.0


class Engine:
    """vLLM instances on this machine, ready to run rollouts.

    Use it as a context manager, `async with` in asyncio code or `with` anywhere else;
    either way the work happens on a thread of its own, so that code that blocks its own
    loop does not stall the engines. Leaving the context ends every process it started.

        async with aseer.Engine(aseer.EngineConfig(model="Qwen/Qwen3-8B")) as engine:
            async for response in engine.rollout(groups):
                ...
    """

    def __init__(self, config: EngineConfig) -> None:
        """Prepare; nothing is started yet.

        Raises:
            ConfigError: this machine has not what the settings ask for.
        """
        if not isinstance(config, EngineConfig):
            raise ConfigError(
                f"Engine takes an aseer.EngineConfig, not {type(config).__name__}; for "
                "example Engine(EngineConfig(model=...))"
            )
        self.config = config
        self._launches = plan_instances(config, this_machine())
        if self._launches[0].backend == "vllm":
            check_vllm()
        self._host: Host | None = None
        self._tokenizer = HuggingFaceTokenizer(config)
        self._tokens: list[contextvars.Token[Engine | None]] = []
        self._at_exit = partial(_close_at_exit, weakref.ref(self))

    # Opening and closing

    async def __aenter__(self) -> Self:
        host = self._begin()
        try:
            await asyncio.wrap_future(host.started)
        except BaseException:
            await self.aclose()
            raise
        self._tokens.append(current_engine.set(self))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave_context()
        await self.aclose()

    def __enter__(self) -> Self:
        host = self._begin()
        try:
            host.started.result()
        except BaseException:
            self.close()
            raise
        self._tokens.append(current_engine.set(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave_context()
        self.close()

    async def aclose(self) -> None:
        """End every process of the engine and wait for it. May be called again."""
        host = self._host
        if host is not None:
            host.request_stop()
            # The end has its own deadline; being cancelled must not leave it half done.
            closing = asyncio.get_running_loop().run_in_executor(None, self.close)
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                await closing
                raise

    def close(self) -> None:
        """End every process of the engine and wait for it. May be called again.

        Raises:
            EngineError: it did not end in time.
        """
        host = self._host
        if host is None:
            return
        host.request_stop()
        deadline_s = 2 * self.config.shutdown_timeout_s + _JOIN_MARGIN_S
        if not host.join(deadline_s):
            raise EngineError(f"the engine's thread did not end in {deadline_s:g} s")
        self._host = None
        atexit.unregister(self._at_exit)

    def _begin(self) -> Host:
        if self._host is not None:
            raise EngineError("the engine is open already")
        self._host = host = Host(self.config, self._launches)
        host.start()
        atexit.register(self._at_exit)
        return host

    def _leave_context(self) -> None:
        if self._tokens:
            try:
                current_engine.reset(self._tokens.pop())
            except ValueError:  # entered in another task: that context is gone
                pass

    # Using it

    def rollout(
        self,
        groups: Groups,
        *,
        policy: PolicyName | None = None,
        chunk_size: int | None = None,
    ) -> Rollout:
        """Sample every group's responses; iterate the result with `async for`.

        Args:
            groups: an iterable or async iterable of `Group`. A list is checked at once,
                and scheduled as a whole. From an iterator groups are taken while the
                rollout runs, so that more can be added as results come in. Texts and
                chats are encoded in the calling thread; the first one takes some time,
                since it loads the model's tokenizer.
            policy: instead of the engine's.
            chunk_size: instead of the engine's, which decided whether there is a KV
                pool; 0 = undivided.
        Raises:
            ConfigError: a group of a list that cannot run.
            EngineClosedError: the engine is not open.
        """
        return Rollout(*self._parts(groups, policy, chunk_size))

    def rollout_sync(
        self,
        groups: Iterable[Group],
        *,
        policy: PolicyName | None = None,
        chunk_size: int | None = None,
    ) -> SyncRollout:
        """As `rollout`, for code without an event loop: iterate it with `for`.

        Raises:
            ConfigError: as there; or an async iterator of groups.
        """
        if isinstance(groups, AsyncIterable):
            raise ConfigError(
                "rollout_sync takes a list or an iterator of groups; an async iterator "
                "needs `async for` over Engine.rollout"
            )
        return SyncRollout(*self._parts(groups, policy, chunk_size))

    async def update_weights(
        self,
        source: WeightSource,
        *,
        version: int | None = None,
        pause: Pause | None = None,
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
                adapters of a `peft.PeftModel` are merged in copies of its layers.
            version: that responses carry from then on, greater than now; None = one
                more.
            pause: what to do about a rollout in progress: "wait" for its end, or
                "abort" it, so that its unfinished responses come as `aborted`.
        Raises:
            WeightUpdateError: every instance has the weights it had before.
            RolloutInProgressError: a rollout is in progress, and `pause` is None.
            EngineClosedError: the engine is not open.
        """
        host = self._open_host()
        check_pause(pause)
        check_source(source, awaits=True)
        beginning = host.submit(host.begin_weight_update(version, pause))
        try:
            plan = await asyncio.shield(asyncio.wrap_future(beginning))
        except asyncio.CancelledError:
            beginning.add_done_callback(host.abandon_weight_update)
            raise
        try:
            started = time.monotonic()
            index = await send_async(source, plan.model, plan.directory)
            send_s = time.monotonic() - started
        except BaseException:
            host.post(lambda: host.weights.abandon(plan))
            raise
        # It goes on to its end whoever is cancelled: half an update cannot be left.
        switching = host.submit(host.switch_weights(plan))
        times = await asyncio.shield(asyncio.wrap_future(switching))
        return _update_report(plan, index, send_s, times)

    def update_weights_sync(
        self,
        source: WeightSource,
        *,
        version: int | None = None,
        pause: Pause | None = None,
    ) -> WeightUpdateReport:
        """As `update_weights`, for code without an event loop.

        Raises:
            WeightUpdateError: as there; or an async iterable.
        """
        host = self._open_host()
        check_pause(pause)
        check_source(source, awaits=False)
        plan = host.submit(host.begin_weight_update(version, pause)).result()
        try:
            started = time.monotonic()
            index = send(source, plan.model, plan.directory)
            send_s = time.monotonic() - started
        except BaseException:
            host.post(lambda: host.weights.abandon(plan))
            raise
        times = host.submit(host.switch_weights(plan)).result()
        return _update_report(plan, index, send_s, times)

    async def sleep(self, level: int = 1) -> None:
        """Release the devices' memory for a trainer on the same GPUs, until `wake`.

        Needs `EngineConfig(engine_args={"enable_sleep_mode": True})`.

        Args:
            level: 1 keeps the weights in the host's memory; 2 drops them, so that
                `update_weights` must follow `wake`. Both drop the KV cache.
        Raises:
            EngineError: an instance cannot; engines on CPUs never can.
            RolloutInProgressError: a rollout is in progress.
        """
        host = self._open_host()
        await asyncio.wrap_future(host.submit(host.sleep(level)))

    async def wake(self) -> None:
        """Take the memory back that `sleep` released.

        Raises:
            EngineError: an instance cannot.
        """
        host = self._open_host()
        await asyncio.wrap_future(host.submit(host.wake()))

    @property
    def weight_version(self) -> int:
        """Of the weights that every instance has; 0 = those it was started with."""
        return self._open_host().weights.version

    @property
    def instances(self) -> list[InstanceInfo]:
        """What the instances that are up said of themselves."""
        return [info for _, info in sorted(self._open_host().infos.items())]

    @property
    def log_paths(self) -> list[Path]:
        """Log files of the instances."""
        return self._open_host().log_paths

    @property
    def run_dir(self) -> Path:
        """Directory of the control socket; it goes when the engine closes."""
        return self._open_host().run_dir

    def _open_host(self) -> Host:
        host = self._host
        if host is None or not host.started.done() or host.ended.is_set():
            raise EngineClosedError(
                "the engine is not open; use it as a context manager, such as "
                "`async with aseer.Engine(config) as engine:`"
            )
        return host

    def _parts(
        self, groups: Groups, policy: PolicyName | None, chunk_size: int | None
    ) -> tuple[Host, GroupResolver, Groups, PolicyName, int, int]:
        """What a rollout is made of."""
        host, config = self._open_host(), self.config
        chosen = config.policy if policy is None else check_policy(policy)
        size = config.chunk_size if chunk_size is None else chunk_size
        resolver = GroupResolver(
            host.limits,
            self._tokenizer,
            config.sampling,
            speculating=check_speculation(config.speculation).method != "off",
            needs_lengths=chosen == "longest-first",
        )
        pending = config.max_pending_requests
        return host, resolver, groups, chosen, check_chunk_size(size), pending


def _update_report(
    plan: Plan, index: Index, send_s: float, times: SwitchTimes
) -> WeightUpdateReport:
    return WeightUpdateReport(
        version=plan.version,
        num_tensors=len(index.tensors),
        num_bytes=index.num_bytes,
        send_s=send_s,
        prepare_s=times.prepare_s,
        switch_s=times.switch_s,
    )


def _close_at_exit(reference: weakref.ref[Engine]) -> None:
    engine = reference()
    if engine is not None:
        engine.close()
