"""An engine dies amid a rollout (I1, I2)."""

from __future__ import annotations

import psutil

import aseer
from tests.e2e.tiny import by_request, same

GREEDY = {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True}


def test_a_killed_engine_core_costs_no_response_and_changes_nothing(engine):
    groups = [
        aseer.Group([5, 6, 7 + i], n=2, sampling=GREEDY, group_id=f"g{i}")
        for i in range(8)
    ]
    quick = aseer.Group([1], n=1, sampling=GREEDY | {"max_tokens": 2}, group_id="quick")
    reference = by_request(list(engine.rollout_sync(groups, chunk_size=0)))
    victim = psutil.Process(engine.instances[1].pid)
    rollout = engine.rollout_sync([*groups, quick])
    responses = []
    for response in rollout:
        responses.append(response)
        if response.group_id == "quick":
            core = next(
                p
                for p in victim.children(recursive=True)
                if "EngineCore" in " ".join(p.cmdline())
            )
            core.kill()
    assert rollout.report.num_retries > 0
    assert len(list(engine.rollout_sync(groups))) == 16
    found = by_request([r for r in responses if r.group_id != "quick"])
    same(found, reference)
