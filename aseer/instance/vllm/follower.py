"""The workers of an engine that spans nodes, on a node that does not lead it.

vLLM's engine runs on the first node; on each of the others there are workers alone,
which it reaches over the network, as `vllm serve --headless` has them.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from aseer.instance.vllm.arguments import USAGE, engine_args_of, with_our_defaults


def follow(args: dict[str, Any]) -> None:
    """Start workers, and wait until one has died.

    Args:
        args: of the engine, but for `node_rank` and what depends on the node.
    Raises:
        Exception: they did not come up.
    """
    config = engine_args_of(with_our_defaults(args)).create_engine_config(
        usage_context=USAGE, headless=True
    )
    executor = MultiprocExecutor(config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)
