"""The nodes of an engine: what goes wrong with one is that one's alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aseer.errors import EngineError, InstanceStartError
from aseer.node.remote import RemoteNode
from aseer.runtime.cluster import Cluster
from tests.unit.node.test_fetching import JOIN
from tests.unit.runtime.machine import config_of


@pytest.mark.parametrize(
    "error", [InstanceStartError("no memory"), RuntimeError("a fault of ours")]
)
async def test_a_node_whose_work_fails_is_lost_and_the_others_go_on(
    error: Exception,
) -> None:
    async def attend(node: object, launches: object) -> None:
        raise ExceptionGroup("of its instances", [error])

    router: Any = SimpleNamespace(endpoint="tcp://127.0.0.1:1")
    cluster = Cluster(config_of(), None, router)
    pool: Any = SimpleNamespace(attend=attend)
    cluster._pool = pool
    node = RemoteNode(JOIN, lambda data: None)
    await cluster._attend(7, node, [])
    assert node.lost_because is not None
    assert str(error) in node.lost_because
    assert isinstance(cluster._failure, EngineError)
