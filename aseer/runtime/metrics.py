"""An engine's figures over HTTP, in Prometheus' format, for whoever watches a cluster.

Figures are read on the engine's thread when somebody asks for them, so nothing is
counted twice and nothing is counted for nobody. `METRICS` has every name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aseer.errors import ConfigError
from aseer.node.metrics import Metric, MetricsServer, Values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from aseer.runtime.loop_thread import LoopThread
    from aseer.types import InstanceId, InstanceLoad

# A scrape gives up after this time, which is far below Prometheus' default of 10 s: the
# engine's loop answers within milliseconds, or is in trouble.
_ANSWER_S = 2.0

METRICS: tuple[Metric, ...] = (
    ("aseer_instances", "gauge", "", "Instances that are up."),
    ("aseer_node_instances", "gauge", "node", "Of these, by host."),
    ("aseer_instance_running", "gauge", "instance", "Requests that its engine runs."),
    ("aseer_instance_waiting", "gauge", "instance", "Requests placed there that wait."),
    ("aseer_instance_kv_used_ratio", "gauge", "instance", "Share of KV blocks in use."),
    ("aseer_instance_restarts", "counter", "instance", "Times it was started again."),
    ("aseer_weight_version", "gauge", "", "Version of the weights."),
    ("aseer_unfinished_requests", "gauge", "", "Of the rollout in progress."),
    ("aseer_waiting_requests", "gauge", "", "Of these, those that do not run."),
    ("aseer_rollouts", "counter", "", "Rollouts that were begun."),
    ("aseer_responses", "counter", "finish_reason", "Requests that are over."),
    ("aseer_replayed_responses", "counter", "", "Of these, those out of a journal."),
    ("aseer_output_tokens", "counter", "", "Tokens that were generated."),
    ("aseer_chunks", "counter", "", "Dispatches of requests to instances."),
    ("aseer_migrations", "counter", "", "Chunks on another instance than before."),
    ("aseer_node_migrations", "counter", "", "Of these, chunks on another host."),
    ("aseer_recomputed_tokens", "counter", "", "Tokens whose KV was computed again."),
)


@dataclass(kw_only=True)
class Figures:
    """An engine at one moment.

    Attributes:
        loads: of the instances that are up. nodes: the names of the hosts that they run
            on, this one's "local".
        restarts: of every instance that is up or may be; a node's go with the node.
        responses: by finish reason, over the engine's life, as `counts`.
        counts: by the names of counters without labels.
    """

    weight_version: int = 0
    loads: Mapping[InstanceId, InstanceLoad] = field(default_factory=dict)
    nodes: Sequence[str] = ()
    restarts: Mapping[InstanceId, int] = field(default_factory=dict)
    num_unfinished: int = 0
    num_waiting: int = 0
    responses: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def values(self) -> Values:
        """By metric, by label."""
        loads = self.loads.items()
        named: Values = {
            "aseer_instances": {"": len(self.loads)},
            "aseer_node_instances": dict(Counter(self.nodes)),
            "aseer_instance_running": {str(i): x.num_running for i, x in loads},
            "aseer_instance_waiting": {str(i): x.num_waiting for i, x in loads},
            "aseer_instance_kv_used_ratio": {str(i): x.kv_used for i, x in loads},
            "aseer_instance_restarts": {str(i): n for i, n in self.restarts.items()},
            "aseer_weight_version": {"": self.weight_version},
            "aseer_unfinished_requests": {"": self.num_unfinished},
            "aseer_waiting_requests": {"": self.num_waiting},
            "aseer_responses": dict(self.responses),
        }
        return named | {
            name: {"": self.counts[name]} for name, *_ in METRICS if name not in named
        }


def note_url(path: Path, url: str) -> None:
    """Add the address of the metrics to the file that tells where a controller is.

    Raises:
        ConfigError: the file cannot be written.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        facts = json.loads(path.read_text()) | {"metrics": url}
        new.write_text(json.dumps(facts) + "\n")
        new.replace(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"controller_file cannot be written: {error}") from error


@contextmanager
def metrics_of(
    address: str | None, thread: LoopThread, read: Callable[[], Figures]
) -> Iterator[str | None]:
    """Serve metrics inside the block, if an address is given; the URL, if so.

    Raises:
        ConfigError: nothing can listen there.
    """
    if address is None:
        yield None
        return

    async def read_there() -> Figures:
        return read()

    def values() -> Values:
        return thread.submit(read_there).result(_ANSWER_S).values()

    server = MetricsServer(address, METRICS, values)
    try:
        yield server.url
    finally:
        server.close()
