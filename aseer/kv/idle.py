"""The connector of an engine whose KV its pool cannot hold: it does nothing.

vLLM makes its connectors when the model is loaded, and one that cannot be made ends the
engine. So an engine that finds its KV unfit runs on as if it had no pool, and says why.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

_log = logging.getLogger("aseer.kv")


class IdleConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # untyped
    """Neither stores nor loads.

    Attributes:
        why_no_pool: in words.
    """

    def __init__(
        self, vllm_config: Any, role: Any, kv_cache_config: Any, why: str
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.why_no_pool = why
        _log.warning("this engine runs without its KV pool: %s", why)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # In the workers

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_for_save(self) -> None: ...

    # In the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, *args: Any, **kwargs: Any) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(
        self, request: Any, block_ids: Any
    ) -> tuple[bool, None]:
        return False, None
