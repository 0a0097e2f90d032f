"""What an instance's process is told of itself, by the node that it runs on."""

from __future__ import annotations

import random
import secrets
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.instance.base import InstanceSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.config import EngineConfig
    from aseer.dgds.messages import DraftingSpec
    from aseer.node.base import Node
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.slot import Slot


class Specs:
    """Makes the specs of one engine's instances."""

    def __init__(
        self,
        config: EngineConfig,
        node: Node,
        drafting: DraftingSpec | None,
        kv_pools: KvPools | None,
    ) -> None:
        """`node` is this machine; the draft server is its own."""
        self._config = config
        self._node = node
        self._drafting = drafting
        self._kv_pools = kv_pools
        self._kv_namespace = kv_pools.namespace if kv_pools else secrets.token_hex(4)
        seed = secrets.randbits(31) if config.seed is None else config.seed
        self._seeds = random.Random(seed)

    def line_for(self, slot: Slot, told: Mapping[str, Any]) -> bytes:
        """The spec of the process that starts now, in JSON.

        Args:
            told: to its engine, besides.
        """
        launch, node = slot.launch, slot.node
        args: dict[str, Any] = {**launch.engine_args, **told}
        if launch.backend == "vllm":
            args["seed"] = self._seeds.getrandbits(31)
        if self._kv_pools is not None:
            args |= self._kv_pools.engine_args(node, slot.instance_id)
        spec = InstanceSpec(
            endpoint=node.endpoint,
            identity=slot.identity.decode(),
            instance_id=slot.instance_id,
            backend=launch.backend,
            report_interval_s=self._config.report_interval_s,
            engine_args=args,
            cores=launch.cores,
            drafting=self._drafting_on(node),
            kv_namespace=self._kv_namespace,
        )
        return msgspec.json.encode(spec)

    def cause_beside(self, slot: Slot) -> str:
        """What its KV pool says of its last error, to be added to another."""
        pools = self._kv_pools
        return "" if pools is None else pools.cause(slot.instance_id)

    def _drafting_on(self, node: Node) -> DraftingSpec | None:
        if self._drafting is None or node is self._node:
            return self._drafting
        return msgspec.structs.replace(self._drafting, endpoint=node.drafts)
