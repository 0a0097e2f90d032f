"""Engines that share out a model's experts keep what one engine alone keeps.

Attention and KV are each engine's own, the experts of every layer all engines' (DP and
EP, the layout in which large mixtures are served). vLLM cannot do that on CPUs, which
is refused, and here made possible (`expert_parallel.py`). References are what
transformers generates, and undivided runs of the same engines.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import psutil
import pytest

import aseer
from aseer.runtime import launch
from tests.e2e.families import family_model, greedy
from tests.e2e.test_ranks import groups_of as any_groups
from tests.e2e.tiny import by_request, same, tiny_config, undivided

if TYPE_CHECKING:
    from collections.abc import Iterator

# Four processes with vLLM start on two cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAMILY = "qwen3_moe"
# Sums over experts of two engines are rounded in another order than those of one.
ROUNDING = 5e-5


groups_of = partial(any_groups, seed=7)


@pytest.fixture(scope="module")
def engine() -> Iterator[aseer.Engine]:
    config = tiny_config(
        model=family_model(FAMILY),
        num_instances=2,
        data_parallel_size=2,
        max_num_seqs=4,
        chunk_size=32,
        engine_args={
            "enable_expert_parallel": True,
            "worker_extension_cls": "tests.e2e.expert_parallel.Extension",
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "check_experts", lambda _: None)
        with aseer.Engine(config) as engine:
            yield engine


def below(engine: aseer.Engine) -> list[psutil.Process]:
    """All processes of the engines."""
    return [
        process
        for info in engine.instances
        for process in (
            psutil.Process(info.pid),
            *psutil.Process(info.pid).children(recursive=True),
        )
    ]


def equals_transformers(engine: aseer.Engine, seed: int) -> None:
    groups = groups_of(4, 24, n=1)
    responses = by_request(list(engine.rollout_sync(groups)))
    prompts = [list(group.prompt) for group in groups]
    expected = greedy(family_model(FAMILY, seed), prompts, 24)
    for group, (tokens, logprobs) in zip(groups, expected, strict=True):
        response = responses[f"{group.group_id}/0"]
        assert response.token_ids == tokens
        assert response.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_each_engine_has_half_of_the_experts(engine: aseer.Engine) -> None:
    assert len(engine.instances) == 2
    names = [" ".join(process.cmdline()) for process in below(engine)]
    assert sum("EngineCore_DP" in name for name in names) == 2, names
    assert sum("_EP" in name for name in names) == 2, names


def test_divided_and_moving_requests_are_answered_as_undivided_ones(
    engine: aseer.Engine,
) -> None:
    groups = groups_of(3, 120, n=2)
    expected = undivided(engine, groups)
    rollout = engine.rollout_sync(groups)
    found = by_request(list(rollout))
    same(found, expected, rounding=ROUNDING)
    assert min(r.metrics.num_chunks for r in found.values()) >= 3
    instances = {i for r in found.values() for i in r.metrics.instances}
    assert len(instances) == 2, "both have had requests"
    equals_transformers(engine, seed=0)


def test_one_works_while_the_other_has_nothing_to_do(engine: aseer.Engine) -> None:
    """Its experts are needed, so that it takes steps as well, without requests."""
    (group,) = groups_of(1, 40, n=1)
    (response,) = engine.rollout_sync([group])
    prompts = [list(group.prompt)]
    ((tokens, _),) = greedy(family_model(FAMILY, 0), prompts, 40)
    assert response.token_ids == tokens


def test_new_weights_reach_all_experts(engine: aseer.Engine) -> None:
    for seed in (1, 0):
        engine.update_weights_sync(family_model(FAMILY, seed))
        equals_transformers(engine, seed)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_is_that_of_both_and_costs_no_response(
    engine: aseer.Engine, victim: int
) -> None:
    engine.update_weights_sync(family_model(FAMILY, 1))
    groups = groups_of(3, 150, n=2)
    expected = by_request(list(engine.rollout_sync(groups)))
    before = below(engine)
    pids = {info.instance_id: info.pid for info in engine.instances}
    rollout = engine.rollout_sync(groups)
    found = {}
    for response in rollout:
        if not found:
            psutil.Process(pids[victim]).kill()
        found[response.request_id] = response
    assert rollout.report.num_retries > 0
    same(found, expected, rounding=ROUNDING)
    assert {i.instance_id for i in engine.instances} == pids.keys()
    assert not {info.pid for info in engine.instances} & set(pids.values())
    assert not any(process.is_running() for process in before)
    equals_transformers(engine, seed=1)
