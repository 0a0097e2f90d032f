"""Figures over HTTP, in Prometheus' format: an engine's, or those of a node's agent."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from aseer.errors import ConfigError
from aseer.node.cleanup import SHARED_MEMORY
from aseer.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Metric = tuple[str, Literal["counter", "gauge"], str, str]
"""Name, kind, label ("" = none) and meaning; counters are told with `_total` behind."""

Values = dict[str, dict[str, float]]
"""By a metric's name, by its label's value."""

AGENT_METRICS: tuple[Metric, ...] = (
    ("aseer_agent_joined", "gauge", "", "1 while a controller has the node."),
    ("aseer_agent_sessions", "counter", "", "Times that a controller took the node."),
    ("aseer_agent_instances", "gauge", "", "Processes of instances that run here."),
    ("aseer_agent_starts", "counter", "", "Processes of instances that were started."),
    ("aseer_agent_deaths", "counter", "", "Of these, those that were not told to end."),
    ("aseer_agent_fetched_bytes", "counter", "", "Of weights that were fetched."),
    ("aseer_agent_given_bytes", "counter", "", "Of weights, to other nodes."),
    ("aseer_agent_shared_memory_free_bytes", "gauge", "", "Left of /dev/shm."),
)


@dataclass
class AgentFigures:
    """What an agent has and did; the fields are `AGENT_METRICS` by their names."""

    joined: int = 0
    sessions: int = 0
    instances: int = 0
    starts: int = 0
    deaths: int = 0
    fetched_bytes: int = 0
    given_bytes: int = 0

    def values(self) -> Values:
        """By metric; from any thread."""
        named = {f"aseer_agent_{name}": {"": num} for name, num in vars(self).items()}
        try:
            free = shutil.disk_usage(SHARED_MEMORY).free
        except OSError:
            free = 0
        return named | {"aseer_agent_shared_memory_free_bytes": {"": free}}


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


def values_in(text: str) -> Values:
    """What a `MetricsServer` answers, as numbers."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = next(iter(sample.labels.values()), "")
            found.setdefault(sample.name, {})[label] = sample.value
    return found


class MetricsServer:
    """Answers `GET /metrics`, in threads of its own."""

    def __init__(
        self, address: str, metrics: Sequence[Metric], read: Callable[[], Values]
    ) -> None:
        """Begin to listen.

        Args:
            address: host and port; of an IPv6 address in brackets.
            metrics: what there is; `read` gives the values of all, on any thread.
        Raises:
            ConfigError: nothing can listen there.
        """
        from prometheus_client import CollectorRegistry, start_http_server

        self._metrics = metrics
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

        values = self._read()
        yield InfoMetricFamily("aseer", "The library.", {"version": __version__})
        for name, kind, label, meaning in self._metrics:
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
