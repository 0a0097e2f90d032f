"""The KV pools of nodes under real engines, on hosts that are namespaces.

Requests move after each chunk. What the reference is, and when a rollout counts as
equal to it, is in `cluster_kv_trainer`.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from aseer.node.leftovers import sweep
from tests.e2e.tiny import tiny_model
from tests.integration.hosts import hosts
from tests.integration.nodes import TrainerProcess, nodes_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.hosts import Hosts
    from tests.integration.nodes import NodeProcess

pytest.importorskip("lmcache")
# Engines start, whose processes take minutes to import vLLM on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ADDRESS = "tcp://10.77.0.1:5557"
CHUNK = 64


@contextmanager
def cluster(
    folder: Path, num_here: int, num_there: int
) -> Iterator[tuple[TrainerProcess, Hosts, NodeProcess]]:
    """A trainer's host and another, with so many engines."""
    first, *_, last = *sorted(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    cores = {0: f"{first},{last}", 1: str(first), 2: f"{first},{last}"}
    with hosts(2) as there, nodes_in(folder) as nodes:
        settings: dict[str, Any] = {
            "model": str(tiny_model()),
            "num_instances": num_here,
            "chunk_size": CHUNK,
            "listen": ADDRESS,
            "min_nodes": 1,
            "node_timeout_s": 20.0,
            "start_timeout_s": 900.0,
            "kv_pool": {
                "mode": "lmcache",
                "chunk_tokens": CHUNK,
                "dram_bytes": 256 << 20,
            },
        }
        trainer = TrainerProcess(
            "tests.e2e.cluster_kv_trainer",
            (*there[1].prefix, "taskset", "-c", cores[num_here]),
            **settings,
        )
        try:
            cores_there = str(last) if num_there == 1 else cores[2]
            far = nodes.start(
                "far",
                where=("--controller", ADDRESS),
                prefix=(*there[2].prefix, "taskset", "-c", cores_there),
                num_instances=num_there,
            )
            trainer.until_open()
            yield trainer, there, far
        finally:
            trainer.kill()
            nodes.end()
            sweep()


def kill_server(node: NodeProcess) -> None:
    """The server of a node's KV pool, which is started again."""
    below = psutil.Process(node.pid).children(recursive=True)
    (server,) = [p for p in below if "aseer.kv.server" in p.cmdline()]
    server.kill()


def test_a_request_that_moves_between_nodes_computes_one_token(tmp_path):
    with cluster(tmp_path, 1, 1) as (trainer, there, far):
        found = trainer.roll()
        assert found["nodes"] == ["", "far"]
        assert found["is_exact"]
        assert found["num_node_migrations"] > 20
        assert found["num_recomputed_tokens"] == 0
        kv = found["kv"]
        assert kv["num_moves_found"] > 20
        assert kv["num_moves_recomputed"] == 0
        assert kv["pulled_bytes"] > 0

        # A server that dies, and a network that is cut, cost computing, and no more.
        found = trainer.roll(lambda: kill_server(far))
        assert found["nodes"] == ["", "far"]
        assert found["num_retries"] == 0

        def cut() -> None:
            there.cut(2)
            time.sleep(5.0)
            there.heal(2)

        found = trainer.roll(cut)
        assert found["nodes"] == ["", "far"]
        assert found["num_retries"] == 0
        assert trainer.close() == 0


def test_a_request_that_moves_within_a_node_computes_one_token(tmp_path):
    with cluster(tmp_path, 0, 2) as (trainer, *_):
        found = trainer.roll()
        assert found["nodes"] == ["far"]
        assert found["is_exact"]
        assert found["num_migrations"] > 20
        assert found["num_node_migrations"] == 0
        assert found["num_recomputed_tokens"] == 0
        kv = found["kv"]
        assert kv["num_moves_found"] > 20
        assert kv["num_moves_recomputed"] == 0
        assert kv["stored_bytes"] > 0
        assert kv["capacity_bytes"] == 256 << 20
        assert trainer.close() == 0
