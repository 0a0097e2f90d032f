"""I2 over nodes: a request that moves between hosts samples what plain vLLM does.

The second host is another process on this machine; all that it shares with the first is
the loopback network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import aseer
from tests.e2e.test_exactness import CASES, PROMPTS, matches, plain_vllm
from tests.e2e.tiny import by_request, tiny_config
from tests.integration.nodes import Nodes, nodes_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Those that divide, and one that does not.
NAMES = ("plain", "ignore_eos", "min_tokens", "presence", "stop_token")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_in(tmp_path) as nodes:
        yield nodes


@pytest.mark.usefixtures("always_migrate")
def test_divided_and_migrating_between_nodes_equals_plain_vllm(
    nodes: Nodes, tmp_path: Path
) -> None:
    with plain_vllm(tmp_path) as generate:
        results = generate([(p, CASES[name]) for name in NAMES for p in PROMPTS])
    nodes.start("far", num_instances=1)
    config = tiny_config(
        num_instances=1,
        chunk_size=32,
        listen=nodes.address,
        min_nodes=1,
        key_file=nodes.key_file(),
    )
    groups = [
        aseer.Group(prompt, n=2, sampling=CASES[name], group_id=f"{name}-{i}")
        for name in NAMES
        for i, prompt in enumerate(PROMPTS)
    ]
    with aseer.Engine(config) as engine:
        assert [info.node for info in engine.instances] == ["", "far"]
        rollout = engine.rollout_sync(groups)
        responses = by_request(list(rollout))
    for n, name in enumerate(NAMES):
        for i in range(len(PROMPTS)):
            for k in range(2):
                matches(responses[f"{name}-{i}/{k}"], results[n * len(PROMPTS) + i])
    assert rollout.report is not None
    assert rollout.report.num_migrations > 20
    assert rollout.report.num_preemptions == 0
