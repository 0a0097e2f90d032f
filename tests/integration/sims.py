"""Settings of simulated engines: real processes and sockets, no model."""

from __future__ import annotations

from typing import Any

import aseer


def config_of(
    *, engine_args: dict[str, Any] | None = None, **settings: Any
) -> aseer.EngineConfig:
    """Two simulated instances with small KV, quick to notice faults."""
    defaults: dict[str, Any] = {
        "model": "sim",
        "device": "sim",
        "num_instances": 2,
        "chunk_size": 64,
        "report_interval_s": 0.02,
        "start_timeout_s": 30.0,
        "shutdown_timeout_s": 5.0,
    }
    sim = {"num_kv_blocks": 256, "step_s": 0.001, **(engine_args or {})}
    return aseer.EngineConfig(**defaults | settings, engine_args=sim)


def groups_of(num: int, n: int = 4, **sampling: Any) -> list[aseer.Group]:
    """Groups with different prompts, greedy unless told otherwise."""
    settings = {"temperature": 0.0, "max_tokens": 200} | sampling
    return [
        aseer.Group([5, 6, 7 + i], n=n, sampling=settings, group_id=f"g{i}")
        for i in range(num)
    ]


def content(responses: list[aseer.Response]) -> dict[str, object]:
    return {r.request_id: (r.token_ids, r.logprobs, r.text) for r in responses}
