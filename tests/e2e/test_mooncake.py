"""KV between two nodes: Mooncake Store, by vLLM's own connector, over TCP.

Two store processes stand for two nodes, each with its own memory and directory.
"""

from __future__ import annotations

import pytest

import aseer
from bench.mooncake_nodes import mooncake_nodes
from tests.e2e.test_kv_pool import groups_of, same, undivided
from tests.e2e.tiny import tiny_config

# Its library needs libibverbs even where there is no RDMA.
pytest.importorskip("mooncake.store", exc_type=ImportError)
pytestmark = pytest.mark.timeout(600)


@pytest.mark.usefixtures("always_migrate")
def test_a_request_moves_between_engines_of_two_nodes(tmp_path):
    groups = groups_of(4, 600, seed=5)
    with mooncake_nodes(tmp_path) as settings:
        settings["kv_pool"] = aseer.KvPoolConfig(mode="external", chunk_tokens=64)
        config = tiny_config(num_instances=2, chunk_size=64, **settings)
        with aseer.Engine(config) as engine:
            expected = undivided(engine, groups)
            rollout = engine.rollout_sync(groups)
            responses = {r.request_id: r for r in rollout}
    same(responses, expected)
    report = rollout.report
    assert report.num_migrations > 20
    assert report.kv.num_moves_found > report.kv.num_moves_recomputed
    assert report.num_cached_tokens > 4 * report.num_recomputed_tokens
