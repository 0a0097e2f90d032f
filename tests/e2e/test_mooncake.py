"""KV between two nodes: Mooncake Store, by vLLM's own connector, over TCP.

Two store processes stand for two nodes, each with its own memory and directory. An
engine's KV goes to one or the other, as the master decides, and every engine reads from
both. Needs Mooncake, and libibverbs even where there is no RDMA.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aseer
from tests.e2e.test_kv_pool import groups_of, same, undivided
from tests.e2e.tiny import tiny_config

if TYPE_CHECKING:
    from collections.abc import Iterator

mooncake = pytest.importorskip("mooncake.store", exc_type=ImportError)
pytestmark = pytest.mark.timeout(600)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def master(tmp_path: Path) -> Iterator[str]:
    """The address of a master with two nodes."""
    programs = Path(mooncake.__file__).parent
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:

        def start(name: str, *args: str) -> None:
            folder = tmp_path / f"{name}-{free_port()}"
            folder.mkdir()
            log = stack.enter_context((folder / "log").open("wb"))
            process = subprocess.Popen(
                [str(programs / name), *args], cwd=folder, stdout=log, stderr=log
            )
            stack.callback(process.wait)
            stack.callback(process.kill)

        start(
            "mooncake_master",
            *("-rpc_port", address.rpartition(":")[2], "-rpc_address", "127.0.0.1"),
            *("-metrics_host", "127.0.0.1", "-metrics_port", str(free_port())),
            *("-default_kv_lease_ttl", "5000"),
        )
        wait_for(address)
        for _ in range(2):
            start(
                "mooncake_client",
                *("-host", "127.0.0.1", "-port", str(port := free_port())),
                *("-global_segment_size", "128 MB", "-local_buffer_size", "64 MB"),
                *("-metadata_server", "P2PHANDSHAKE"),
                *("-master_server_address", address, "-protocol", "tcp"),
                *("-threads", "1"),
            )
            wait_for(f"127.0.0.1:{port}")
        yield address


def wait_for(address: str, timeout_s: float = 30.0) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at {address}"
            time.sleep(0.1)
        else:
            return


@pytest.mark.usefixtures("always_migrate")
def test_a_request_moves_between_engines_of_two_nodes(master, tmp_path):
    settings = tmp_path / "mooncake.json"
    settings.write_text(
        json.dumps(
            {
                "mode": "standalone-store",
                "metadata_server": "P2PHANDSHAKE",
                "master_server_address": master,
                "protocol": "tcp",
                "device_name": "",
                "global_segment_size": 0,
                "local_buffer_size": "64MB",
            }
        )
    )
    config = tiny_config(
        num_instances=2,
        chunk_size=64,
        kv_transfer_config={
            "kv_connector": "MooncakeStoreConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"save_decode_cache": True},
        },
        env={"MOONCAKE_CONFIG_PATH": str(settings), "VLLM_HOST_IP": "127.0.0.1"},
    )
    groups = groups_of(4, 600, seed=5)
    with aseer.Engine(config) as engine:
        expected = undivided(engine, groups)
        rollout = engine.rollout_sync(groups)
        responses = {r.request_id: r for r in rollout}
        same(responses, expected)
        report = rollout.report
        assert report.kv is None, "no pool of ours beside it"
        assert report.num_migrations > 20
        assert report.num_cached_tokens > 4 * report.num_recomputed_tokens
