"""Mooncake Store on this machine: a master, and processes that stand for nodes.

Each node has memory of its own. What an engine stores goes to one of them, as the
master decides, and every engine reads from all, over TCP. Needs Mooncake's package, and
libibverbs even where there is no RDMA.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_HOST = "127.0.0.1"


@contextmanager
def mooncake_nodes(
    folder: Path, *, num_nodes: int = 2, node_mb: int = 128, buffer_mb: int = 64
) -> Iterator[dict[str, Any]]:
    """Start them; gives the settings of an `aseer.EngineConfig` that uses them.

    Raises:
        ImportError: Mooncake, or a library that it needs, is not installed.
        TimeoutError: a process does not listen; its log is in `folder`.
    """
    import mooncake.store

    programs = Path(mooncake.store.__file__).parent
    with ExitStack() as stack:

        def start(name: str, port: int, *args: str) -> None:
            """Run one of Mooncake's programs until the end."""
            here = folder / f"{name}-{port}"
            here.mkdir(parents=True)
            log = stack.enter_context((here / "log").open("wb"))
            process = subprocess.Popen(
                [str(programs / name), *args], cwd=here, stdout=log, stderr=log
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            _wait_for(port)

        master = f"{_HOST}:{(port := _free_port())}"
        start(
            "mooncake_master",
            port,
            *("-rpc_port", str(port), "-rpc_address", _HOST),
            *("-metrics_host", _HOST, "-metrics_port", str(_free_port())),
            *("-default_kv_lease_ttl", "5000"),
        )
        for _ in range(num_nodes):
            port = _free_port()
            start(
                "mooncake_client",
                port,
                *("-host", _HOST, "-port", str(port), "-threads", "1"),
                *("-global_segment_size", f"{node_mb} MB"),
                *("-local_buffer_size", f"{buffer_mb} MB"),
                *("-metadata_server", "P2PHANDSHAKE", "-protocol", "tcp"),
                *("-master_server_address", master),
            )
        settings = folder / "mooncake.json"
        settings.write_text(
            json.dumps(
                {
                    "mode": "standalone-store",
                    "metadata_server": "P2PHANDSHAKE",
                    "master_server_address": master,
                    "protocol": "tcp",
                    "device_name": "",
                    "global_segment_size": 0,
                    "local_buffer_size": f"{buffer_mb}MB",
                }
            )
        )
        yield {
            "kv_pool": "external",
            "kv_transfer_config": {
                "kv_connector": "MooncakeStoreConnector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "save_decode_cache": True,
                    "load_async": True,
                },
            },
            "env": {"MOONCAKE_CONFIG_PATH": str(settings), "VLLM_HOST_IP": _HOST},
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((_HOST, port), 1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing listens at {_HOST}:{port}") from None
            time.sleep(0.1)
        else:
            return
