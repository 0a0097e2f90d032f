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
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from aseer.errors import ConfigError
from aseer.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from aseer.runtime.loop_thread import LoopThread
    from aseer.types import InstanceId, InstanceLoad

# A scrape gives up after this time, which is far below Prometheus' default of 10 s: the
# engine's loop answers within milliseconds, or is in trouble.
_ANSWER_S = 2.0

Kind = Literal["counter", "gauge"]
#: Name, kind, label ("" = none) and meaning of every metric; counters are told with
#: `_total` behind.
METRICS: tuple[tuple[str, Kind, str, str], ...] = (
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
    ("aseer_recomputed_tokens", "counter", "", "Tokens whose KV was computed again."),
)


@dataclass(kw_only=True)
class Figures:
    """An engine at one moment.

    Attributes:
        loads: of the instances that are up. nodes: the names of the hosts that they run
            on, this one's "local".
        restarts: of every instance.
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

    def values(self) -> dict[str, dict[str, float]]:
        """By metric, by label."""
        loads = self.loads.items()
        named: dict[str, dict[str, float]] = {
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


Values = dict[str, dict[str, float]]
"""By a sample's name, by its label's value."""


def values_in(text: str) -> Values:
    """What an engine answers, as numbers."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = next(iter(sample.labels.values()), "")
            found.setdefault(sample.name, {})[label] = sample.value
    return found


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


def check_metrics_library(who: str = "metrics_address") -> None:
    """See that metrics can be served, and read.

    Args:
        who: needs them, for the error.
    Raises:
        ConfigError: the library for it is not installed.
    """
    if find_spec("prometheus_client") is None:
        raise ConfigError(
            f"{who} needs the package prometheus-client, which is not installed: "
            "pip install 'aseer[metrics]'"
        )


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
    server = MetricsServer(address, thread, read)
    try:
        yield server.url
    finally:
        server.close()


class MetricsServer:
    """Answers `GET /metrics`, in threads of its own."""

    def __init__(
        self, address: str, thread: LoopThread, read: Callable[[], Figures]
    ) -> None:
        """Begin to listen.

        Args:
            address: host and port; of an IPv6 address in brackets.
            thread: whose loop figures are read on, by `read`.
        Raises:
            ConfigError: nothing can listen there.
        """
        from prometheus_client import CollectorRegistry, start_http_server

        self._thread = thread
        self._read = read
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            self._server, self._serving = start_http_server(
                int(port), host, registry=registry
            )
        except OSError as error:
            raise ConfigError(
                f"metrics_address={address!r} cannot be listened at: {error}; give "
                "another port, or 0 for any that is free"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"

    def collect(self) -> Iterator[Any]:
        """See `prometheus_client.registry.Collector`."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            InfoMetricFamily,
        )

        values = self._ask().values()
        yield InfoMetricFamily("aseer", "The library.", {"version": __version__})
        for name, kind, label, meaning in METRICS:
            made = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            family = made(name, meaning, labels=[label] if label else [])
            for of, value in sorted(values[name].items()):
                family.add_metric([of] if label else [], value)
            yield family

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._serving.join()

    def _ask(self) -> Figures:
        async def read() -> Figures:
            return self._read()

        return self._thread.submit(read).result(_ANSWER_S)
