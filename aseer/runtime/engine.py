"""The engine: vLLM instances that stay up between rollouts, and the way to them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Self

from aseer.compat.versions import check_vllm
from aseer.config import EngineConfig, check_policy, is_speculating
from aseer.errors import ConfigError
from aseer.groups import GroupResolver
from aseer.inputs.calls import check_chunk_size, check_sleep_level, check_wake_tags
from aseer.inputs.fields import seconds
from aseer.inputs.tokenizer import HuggingFaceTokenizer
from aseer.models.traits import read_traits
from aseer.node.interpreter import interpreter_at
from aseer.node.machine import this_machine
from aseer.node.metrics import check_metrics_library
from aseer.node.network import reachable
from aseer.runtime.desk import JOIN_S, Desk
from aseer.runtime.group_source import GroupSource, OpenSource
from aseer.runtime.journal import journal_path
from aseer.runtime.launch import plan_instances
from aseer.runtime.listening import listening
from aseer.runtime.opening import Opening
from aseer.runtime.rollout import Rollout, SyncRollout
from aseer.runtime.steps import result_of
from aseer.runtime.takes_weights import TakesWeights
from aseer.runtime.work import Work

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from aseer.config import PolicyName
    from aseer.groups import Group, Groups
    from aseer.node.machine import Launch
    from aseer.runtime.host import Host
    from aseer.runtime.loop_thread import LoopThread
    from aseer.types import InstanceInfo

current_engine: contextvars.ContextVar[Engine | None] = contextvars.ContextVar(
    "aseer_engine", default=None
)


class Engine(TakesWeights):
    """vLLM instances on this machine, ready to run rollouts.

    Use it as a context manager, `async with` in asyncio code or `with` anywhere else;
    either way the work happens on a thread of its own, so that code that blocks its own
    loop does not stall the engines. Leaving the context ends every process it started.

        async with aseer.Engine(aseer.EngineConfig(model="Qwen/Qwen3-8B")) as engine:
            async with engine.rollout(groups) as rollout:
                async for response in rollout:
                    ...
    """

    def __init__(self, config: EngineConfig) -> None:
        """Plan the instances; no process is started yet.

        Raises:
            ConfigError: this machine does not have what the settings ask for, or the
                model's settings did not come from the Hugging Face hub in time.
        """
        if not isinstance(config, EngineConfig):
            raise ConfigError(
                f"Engine takes an aseer.EngineConfig, not {type(config).__name__}; for "
                "example Engine(EngineConfig(model=...))"
            )
        if config.metrics_address is not None:
            check_metrics_library()
        self.config = config
        python = interpreter_at(None if config.python is None else str(config.python))
        traits = None
        if config.device != "sim":
            args = config.engine_args
            revision, token = args.get("revision"), args.get("hf_token")
            traits = read_traits(config.model, revision, token=token)
        self._launches: list[Launch] = []
        if config.num_instances != 0 and config.nodes is None:
            machine = this_machine(python.packages)
            self._launches = plan_instances(config, machine, traits, python)
            if self._launches[0].backend == "vllm":
                check_vllm(python.packages)
        self._opening = Opening(config, self._launches, listening(config, traits))
        self._tokenizer = HuggingFaceTokenizer(config)
        self._tokens: list[contextvars.Token[Engine | None]] = []

    # Opening and closing

    async def __aenter__(self) -> Self:
        started = self._opening.begin()
        try:
            await asyncio.wrap_future(started)
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
        started = self._opening.begin()
        try:
            started.result()
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
        await self._opening.aclose()

    def close(self) -> None:
        """End every process of the engine and wait for it. May be called again.

        Raises:
            EngineError: the engine did not end in time.
        """
        self._opening.close()

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
        journal: str | None = None,
    ) -> Rollout:
        """Sample every group's responses.

            async with engine.rollout(groups) as rollout:
                async for response in rollout:
                    ...

        The rollout begins when the block is entered. Leaving the block, however that
        happens, aborts what still runs, and waits until the engines have stopped it.
        Without the block, `async for response in engine.rollout(groups)` begins it with
        the first response, and ends it once nothing holds the loop's iterator.

        Args:
            groups: an iterable or async iterable of `Group`. A list is checked at once,
                and scheduled as a whole. From an iterator, groups are taken while the
                rollout runs, so that more can be added as results come in. Texts and
                chats are encoded in the calling thread; the first one takes some time,
                since it loads the model's tokenizer.
            policy: replaces the engine's policy for this rollout.
            chunk_size: replaces the engine's chunk size for this rollout; 0 = requests
                are not divided. The engine's own decided whether there is a KV pool.
            journal: name of the rollout in `EngineConfig.journal_dir`. Everything is
                written there, so that the same rollout, begun again under this name
                after this process has died, yields what was finished at once and goes
                on with the rest. The groups and the model must be the same; what other
                weights generated is generated anew.
        Raises:
            ConfigError: a group of the list cannot run; when the rollout begins, that
                its journal is another rollout's or cannot be used.
            EngineClosedError: the engine is not open.
        """
        return Rollout(self._work_on(groups, policy, chunk_size, journal))

    def rollout_sync(
        self,
        groups: Iterable[Group],
        *,
        policy: PolicyName | None = None,
        chunk_size: int | None = None,
        journal: str | None = None,
    ) -> SyncRollout:
        """As `rollout`, for code without an event loop: iterate it with `for`.

        Raises:
            ConfigError: as for `rollout`; also for an async iterator of groups.
        """
        if isinstance(groups, AsyncIterable):
            raise ConfigError(
                "rollout_sync takes a list or an iterator of groups; an async iterator "
                "needs `async for` over Engine.rollout"
            )
        return SyncRollout(self._work_on(groups, policy, chunk_size, journal))

    def open_rollout(
        self,
        *,
        policy: PolicyName | None = None,
        chunk_size: int | None = None,
        join_s: float = JOIN_S,
    ) -> Desk:
        """Begin a rollout that takes single requests, for agent loops and servers.

            async with engine.open_rollout() as desk:
                response = await desk.submit(prompt, group="question 7", n=8)

        Args:
            policy: instead of the engine's.
            chunk_size: instead of the engine's; 0 = undivided.
            join_s: seconds in which requests that belong together become one group.
        Raises:
            ConfigError: a setting that cannot work.
            EngineClosedError: the engine is not open.
        """
        join_s = seconds("join_s", join_s, or_zero=True)
        chosen = None if policy is None else check_policy(policy)
        source = OpenSource(self._resolver(chosen))
        return Desk(self._work(source, chosen, chunk_size), source, join_s)

    async def abort_rollout(self) -> None:
        """End the rollout in progress early, whoever reads it, if there is one.

        For code that cannot reach the loop that reads the rollout. The loop gets the
        unfinished responses as `aborted`, and no further groups are taken. Returns once
        the engines have stopped the rollout's work.

        Raises:
            EngineError: the engine is not open, or has failed.
        """
        thread, host = self._open()
        asker = asyncio.current_task()
        await result_of(thread, thread.submit(lambda: host.rollouts.abort(asker)))

    def abort_rollout_sync(self) -> None:
        """As `abort_rollout`, for code without an event loop."""
        thread, host = self._open()
        thread.submit(lambda: host.rollouts.abort(None)).result()

    async def sleep(self, level: int = 1) -> None:
        """Release the devices' memory for a trainer on the same GPUs, until `wake`.

        Needs `EngineConfig(engine_args={"enable_sleep_mode": True})`. An engine that is
        asleep already stays as it is.

        Args:
            level: 1 keeps the weights in the host's memory; 2 drops them, so that no
                rollout begins before `update_weights`. Both drop the KV cache.

        Raises:
            ConfigError: there is no such level.
            EngineError: an instance cannot sleep; engines on CPUs never can.
            RolloutInProgressError: a rollout is in progress.
        """
        level = check_sleep_level(level)
        thread, host = self._open()
        asker = asyncio.current_task()
        await result_of(thread, thread.submit(lambda: host.sleep(level, asker)))

    async def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take back the memory that `sleep` released; an engine that is awake stays so.

        A trainer on the same GPUs that needs memory while it sends new weights wakes
        ["weights"], calls `update_weights`, frees what it has, and wakes ["kv_cache"].
        In between there are weight updates and no rollouts, and no instance that died
        is started again. A call waits for an update in progress.

        Args:
            tags: what to take back: "weights", "kv_cache"; None = all.
        Raises:
            ConfigError: there is no such tag.
            EngineError: no instance could wake, or weights are asleep and only
                "kv_cache" is named.
        """
        checked = check_wake_tags(tags)
        thread, host = self._open()
        await result_of(thread, thread.submit(lambda: host.wake(checked)))

    @property
    def instances(self) -> list[InstanceInfo]:
        """Limits and facts of each instance that is up, by its id."""
        return [info for _, info in sorted(self._open()[1].infos.items())]

    @property
    def address(self) -> str | None:
        """Where nodes on other hosts can join; None if they cannot."""
        cluster = self._open()[1].cluster
        return None if cluster is None else reachable(cluster.address)

    @property
    def log_paths(self) -> list[Path]:
        """Paths of the log files of this machine's instances."""
        return self._open()[1].log_paths

    @property
    def metrics_url(self) -> str | None:
        """Where the engine's figures are for Prometheus; None = nowhere."""
        return self._open()[1].metrics_url

    @property
    def run_dir(self) -> Path:
        """The directory of the engine's sockets, removed when the engine closes."""
        return self._open()[1].folders.run

    def _open(self) -> tuple[LoopThread, Host]:
        return self._opening.current()

    @property
    def _host(self) -> Host:
        return self._open()[1]

    def _resolver(self, policy: PolicyName | None) -> GroupResolver:
        config = self.config
        return GroupResolver(
            self._host.limits,
            self._tokenizer,
            config.sampling,
            speculating=is_speculating(config),
            needs_lengths=(policy or config.policy) == "longest-first",
            image_store=self._host.image_store,
        )

    def _work_on(
        self,
        groups: Groups,
        policy: PolicyName | None,
        chunk_size: int | None,
        journal: str | None,
    ) -> Work:
        config = self.config
        chosen = None if policy is None else check_policy(policy)
        path = None if journal is None else journal_path(config.journal_dir, journal)
        source = GroupSource(
            self._resolver(chosen),
            groups,
            config.max_pending_requests,
            has_journal=path is not None,
        )
        return self._work(source, chosen, chunk_size, path)

    def _work(
        self,
        source: GroupSource,
        policy: PolicyName | None,
        chunk_size: int | None,
        journal: Path | None = None,
    ) -> Work:
        """What a rollout is made of, in any form."""
        thread, host = self._open()
        config = self.config
        size = config.chunk_size if chunk_size is None else chunk_size
        return Work(
            thread=thread,
            host=host,
            source=source,
            policy=config.policy if policy is None else policy,
            chunk_size=check_chunk_size(size),
            journal=journal,
        )
