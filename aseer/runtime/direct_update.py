"""A weight update that goes straight from a trainer's GPUs; on the engine's thread.

There is nothing to prepare: from the moment that vLLM begins, an instance has neither
the old weights nor the new ones until the last tensor has come. So an update that fails
after its beginning fails for all: every instance is started again, with the weights
that it had. Nobody keeps a copy of what was sent, so an instance that dies after such
an update waits for the next one (`aseer.weights.current.TrainersWeights`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from aseer.errors import EngineError, WeightUpdateError
from aseer.weights.carriers import Peer
from aseer.weights.direct import WAYS

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping
    from concurrent.futures import Future

    from aseer.runtime.instances import InstancePool
    from aseer.runtime.loop_thread import LoopThread
    from aseer.types import InstanceId


def check_are_here(
    pool: InstancePool, members: Iterable[InstanceId], transfer: str
) -> None:
    """See that instances are on this machine.

    Raises:
        WeightUpdateError: one is not.
    """
    if pool.are_elsewhere(members):
        raise WeightUpdateError(
            f"transfer={transfer!r} reaches the engines of this machine, and some are "
            "on other hosts; use transfer='host'"
        )


class DirectUpdate:
    """One update over its instances: each call is made at all of them at once."""

    def __init__(
        self, pool: InstancePool, members: Iterable[InstanceId], transfer: str
    ) -> None:
        self.transfer = transfer
        self.is_sent = False
        self._pool = pool
        self._members = sorted(members)
        self._identities = {i: pool.identity_of(i) for i in self._members}
        self._peers: list[Peer] = []
        self._has_begun = self._is_over = False
        self.num_tensors = self.num_bytes = 0
        self.prepare_s = self.switch_s = 0.0
        self._since = 0.0

    @property
    def holders(self) -> frozenset[bytes]:
        """Identities of the processes that have the weights, once they are sent."""
        return frozenset(self._identities.values())

    async def look(self) -> list[Peer]:
        """The instances, and where they are.

        Raises:
            WeightUpdateError: one cannot take weights in this way.
        """
        self._since = time.monotonic()
        check_are_here(self._pool, self._members, self.transfer)
        backend = WAYS[self.transfer].backend
        found = await self._ask("look", {"backend": backend})
        for instance_id, told in found.items():
            if told["backend"] != backend:
                raise WeightUpdateError(
                    f"instance {instance_id} was started for transfers by "
                    f"{told['backend']!r}, and transfer={self.transfer!r} needs "
                    f"{backend!r} in engine_args['weight_transfer_config']"
                )
        self._peers = [
            Peer(int(i), told["num_workers"], tuple(filter(None, told["gpus"])))
            for i, told in found.items()
        ]
        return self._peers

    async def init(self, info: Mapping[str, Any]) -> None:
        """Have all get ready; each is told where its workers come in a group of all."""
        told: dict[int, dict[str, Any]] = {}
        rank = info.get("rank_offset", 0)
        for peer in self._peers:
            own = {"rank_offset": rank} if "rank_offset" in info else {}
            told[peer.instance_id] = {**info, **own}
            rank += peer.num_workers
        await self._ask("init", told=told)

    async def start(self) -> None:
        """From here on all have the new weights in the end, or are started again."""
        self._has_begun = True
        began = time.monotonic()
        self.prepare_s, self._since = began - self._since, began
        await self._ask("start", {})

    async def update(self, info: dict[str, Any]) -> None:
        """Have all load what is told there."""
        await self._ask("update", info)
        self.num_tensors += len(info["names"])
        self.num_bytes += sum(info["tensor_sizes"])

    async def finish(self) -> None:
        """All is sent, and what the old weights made is forgotten."""
        await self._ask("finish", {})
        self.is_sent = True
        self.switch_s = time.monotonic() - self._since

    async def compare(self) -> None:
        """See that all have the same weights, as far as vLLM can tell.

        Raises:
            WeightUpdateError: they have not.
        """
        sums = await self._ask("compare", {})
        if len(set(sums.values())) > 1:
            raise WeightUpdateError(
                "the engines' weights differ from one another after the transfer: "
                + ", ".join(f"instance {i} has {s:.12}" for i, s in sums.items())
            )

    def fail(self, why: str) -> None:
        """Start those again that have neither the old weights nor the new ones."""
        if self._has_begun and not self._is_over:
            for instance_id, identity in self._identities.items():
                if self._pool.identity_of(instance_id) == identity:
                    self._pool.replace(instance_id, why)
        self._is_over = True

    async def _ask(
        self,
        step: str,
        info: Mapping[str, Any] | None = None,
        told: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> dict[InstanceId, Any]:
        """Have all take a step; what each answers.

        Raises:
            WeightUpdateError: one failed, was lost or was started again meanwhile.
        """
        if self._is_over:
            raise WeightUpdateError("the weight update is over")
        for instance_id, identity in self._identities.items():
            if self._pool.identity_of(instance_id) != identity:
                raise WeightUpdateError(f"instance {instance_id} was lost meanwhile")
        asked = {
            i: self._pool.ask(
                i, "transfer_weights", step=step, info=info if told is None else told[i]
            )
            for i in self._members
        }
        if not asked:
            raise WeightUpdateError("no instance is up")
        # The first that fails ends the wait: in a group of all the others may wait for
        # it for ever.
        await asyncio.wait(asked.values(), return_when=asyncio.FIRST_EXCEPTION)
        for instance_id, answer in asked.items():
            error = answer.exception() if answer.done() else None
            if error is not None:
                raise WeightUpdateError(
                    f"instance {instance_id} failed at {step!r} of the transfer: "
                    f"{error}"
                ) from error
        return {i: answer.result() for i, answer in asked.items()}


class EnginesThere:
    """`Engines` for the thread that sends: the calls run on the engine's thread."""

    def __init__(self, thread: LoopThread, update: DirectUpdate) -> None:
        self._thread = thread
        self._update = update

    def look(self) -> list[Peer]:
        """See `Engines`."""
        return self._thread.submit(self._update.look).result()

    def init(self, info: dict[str, Any]) -> Future[None]:
        """See `Engines`."""
        return self._submit(self._update.init(info))

    def start(self) -> Future[None]:
        """See `Engines`."""
        return self._submit(self._update.start())

    def update(self, info: dict[str, Any]) -> Future[None]:
        """See `Engines`."""
        return self._submit(self._update.update(info))

    def finish(self) -> Future[None]:
        """See `Engines`."""
        return self._submit(self._update.finish())

    def _submit(self, call: Coroutine[Any, Any, None]) -> Future[None]:
        try:
            return self._thread.submit(lambda: call)
        except EngineError:
            call.close()
            raise
