"""`aseer status`: what an engine is doing, read off its metrics."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.errors import ConfigError, EngineError
from aseer.node.metrics import check_metrics_library, values_in

if TYPE_CHECKING:
    import argparse

    from aseer.node.metrics import Values

_ANSWER_S = 10.0


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `status` and its arguments."""
    parser = subparsers.add_parser(
        "status",
        parents=[common],
        help="show what an engine is doing",
        description=(
            "Show an engine's hosts, instances, weights and rollout. The engine needs "
            'EngineConfig(metrics_address="127.0.0.1:9464").'
        ),
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("url", nargs="?", metavar="URL", help="its Engine.metrics_url")
    where.add_argument(
        "--controller-file", type=Path, metavar="FILE", help="the engine's own"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask the engine, and say what it answers.

    Raises:
        ConfigError: nothing says where its metrics are.
        EngineError: nothing answers there.
    """
    check_metrics_library("aseer status")
    url = args.url or _url_in(args.controller_file)
    if "://" not in url:
        url = f"http://{url}"
    if not url.rstrip("/").endswith("/metrics"):
        url = f"{url.rstrip('/')}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        raise EngineError(f"no engine answers at {url}: {error}") from error
    values = values_in(text)
    if "aseer_instances" not in values:
        raise EngineError(f"what answers at {url} is no engine of aseer's")
    print("\n".join(lines_of(values)))
    return 0


def lines_of(values: Values) -> list[str]:
    """What metrics say, in lines."""

    def one(name: str) -> int:
        return int(values.get(name, {}).get("", 0))

    hosts = values.get("aseer_node_instances", {})
    shown = ", ".join(f"{num:.0f} on {host}" for host, num in sorted(hosts.items()))
    unfinished, waiting = (
        one("aseer_unfinished_requests"),
        one("aseer_waiting_requests"),
    )
    lines = [
        f"instances: {one('aseer_instances')}" + (f" ({shown})" if shown else ""),
        f"weights: version {one('aseer_weight_version')}",
        f"rollout: {unfinished:,} requests unfinished, {waiting:,} of them do not run",
        f"since the start: {one('aseer_rollouts_total'):,} rollouts, "
        f"{sum(values.get('aseer_responses_total', {}).values()):,.0f} responses, "
        f"{one('aseer_output_tokens_total'):,} tokens",
    ]
    rows = [("instance", "running", "waiting", "KV in use", "restarts")]
    restarts = values.get("aseer_instance_restarts_total", {})
    waits = values.get("aseer_instance_waiting", {})
    kv_used = values.get("aseer_instance_kv_used_ratio", {})
    running = values.get("aseer_instance_running", {})
    for name in sorted(running, key=int):
        kv = f"{kv_used.get(name, 0.0):.0%}"
        counts = (running[name], waits.get(name, 0), restarts.get(name, 0))
        first, second, third = (f"{count:,.0f}" for count in counts)
        rows.append((name, first, second, kv, third))
    return lines + ["  ".join(f"{cell:>9}" for cell in row) for row in rows]


def _url_in(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        url = found.get("metrics")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no controller's file: {error}") from error
    if not isinstance(url, str):
        raise ConfigError(
            f"{path} does not say where the engine's metrics are: it has no "
            "metrics_address; give EngineConfig one"
        )
    return url
