"""The contract between an instance process and the engine inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from aseer.dgds.messages import DraftingSpec
from aseer.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.types import Chunk, ChunkEnd, ChunkId, InstanceInfo, InstanceLoad
    from aseer.weights.checks import ModelSpec


class EngineDied(EngineError):
    """The engine inside an instance is dead; the process must go."""


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance process is told on its standard input, as one line of JSON.

    Attributes:
        endpoint: of the controller's ROUTER.
        identity: under which this incarnation speaks.
        backend: "vllm" or "sim".
        engine_args: of the backend's engine.
        follows: whether it only has workers of an engine whose leader, another
            instance process, is on another node; it then says nothing.
        cores: to stay on; empty = any.
        drafting: for an engine that drafts by group.
        kv_namespace: of the run, in the keys of KV.
    """

    endpoint: str
    identity: str
    instance_id: int
    backend: str
    report_interval_s: float
    engine_args: dict[str, Any]
    follows: bool = False
    cores: tuple[int, ...] = ()
    drafting: DraftingSpec | None = None
    kv_namespace: str = ""


class Emit(Protocol):
    """Where a running chunk's output goes; see `ChunkProgress` for the arguments."""

    def __call__(
        self,
        *,
        tokens: list[int] | None = None,
        logprobs: list[float] | None = None,
        text: str = "",
        num_cached_tokens: int | None = None,
    ) -> None: ...


class Backend(Protocol):
    """An engine that runs chunks."""

    async def start(self) -> InstanceInfo:
        """Bring the engine up."""
        ...

    async def run(self, chunk: Chunk, emit: Emit) -> ChunkEnd:
        """Run one chunk to its end, emitting output as it comes.

        A chunk that the engine refuses ends as an `error`; cancellation aborts it.

        Raises:
            EngineDied: the engine cannot go on.
        """
        ...

    async def abort(self, chunk_id: ChunkId) -> None:
        """Make a running chunk end as `aborted`, soon; unknown ids are ignored."""
        ...

    def load(self) -> InstanceLoad:
        """How busy the engine is."""
        ...

    async def attend(self) -> None:
        """Do what the engine needs done while it runs; may return at once."""
        ...

    async def describe_weights(self) -> ModelSpec:
        """What the model's checkpoint holds, by name; what updates must bring."""
        ...

    async def prepare_weights(self, index: str, others: Sequence[str] = ()) -> None:
        """Open new weights (an `Index` at that path); nothing changes.

        Args:
            others: where the nodes of those that follow have it, in their order.
        """
        ...

    async def commit_weights(self) -> None:
        """Switch to what was prepared; nothing of the old weights can be read after."""
        ...

    async def discard_weights(self) -> None:
        """Forget what was prepared."""
        ...

    async def transfer_weights(self, step: str, info: dict[str, Any]) -> Any:
        """Take a step of a transfer straight from a trainer's GPUs; what comes of it.

        Args:
            step: "look", "init", "start", "update", "finish" or "compare"; see
                `aseer.instance.vllm.transfer`.
            info: what the step is told, as plain data.
        """
        ...

    async def sleep(self, level: int) -> None:
        """Release the device's memory; see `Engine.sleep`."""
        ...

    async def wake(self, tags: list[str] | None = None) -> None:
        """Take the memory back, or of the kinds named; see `Engine.wake`."""
        ...

    async def close(self) -> None:
        """Take the engine down."""
        ...
