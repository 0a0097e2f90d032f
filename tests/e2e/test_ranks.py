"""An engine of several workers (tensor parallel) keeps what one of one worker keeps.

Of a mixture of experts each worker has some experts whole (expert parallel), which is
refused on a CPU and here made possible (`expert_parallel.py`). References are undivided
runs of the same engine, and what transformers generates.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import aseer
from aseer.runtime import launch
from tests.e2e.families import family_model, greedy
from tests.e2e.tiny import by_request, same, tiny_config, undivided

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow  # it starts six worker processes on two cores

# What each family's engine is told besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {
        "enable_expert_parallel": True,
        "worker_extension_cls": "tests.e2e.expert_parallel.Extension",
    },
}
# Sums over workers, and of drafted tokens, are rounded in another order.
ROUNDING = 5e-5


def groups_of(
    num: int, max_tokens: int, n: int = 3, seed: int = 5
) -> list[aseer.Group]:
    rng = random.Random(seed)
    sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens}
    return [
        aseer.Group(
            [rng.randrange(3, 90) for _ in range(rng.randrange(20, 80))],
            n=n,
            group_id=f"g{i}",
            sampling=sampling,
        )
        for i in range(num)
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> Iterator[aseer.Engine]:
    config = tiny_config(
        model=family_model(request.param),
        num_instances=1,
        gpus_per_instance=2,
        max_num_seqs=4,  # so that siblings follow one another, and draft
        chunk_size=64,
        speculation="dgds",
        engine_args=FAMILIES[request.param],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "check_experts", lambda _: None)
        with aseer.Engine(config) as engine:
            yield engine


def workers_of(engine: aseer.Engine) -> list[psutil.Process]:
    """The engine's worker processes, by the names that vLLM gives them."""
    (instance,) = engine.instances
    found = psutil.Process(instance.pid).children(recursive=True)
    return [p for p in found if "Worker_" in " ".join(p.cmdline())]


def equals_transformers(engine: aseer.Engine, seed: int) -> None:
    model = family_model(family_of(engine), seed)
    groups = groups_of(3, 24, n=1)
    responses = by_request(list(engine.rollout_sync(groups)))
    expected = greedy(model, [list(group.prompt) for group in groups], 24)
    for group, (tokens, logprobs) in zip(groups, expected, strict=True):
        response = responses[f"{group.group_id}/0"]
        assert response.token_ids == tokens
        assert response.logprobs == pytest.approx(logprobs, abs=1e-4)


def family_of(engine: aseer.Engine) -> str:
    return str(engine.config.model).split("-")[-2]


def test_divided_requests_are_answered_as_undivided_ones(engine: aseer.Engine) -> None:
    groups = groups_of(3, 260)
    expected = undivided(engine, groups)
    rollout = engine.rollout_sync(groups)
    found = by_request(list(rollout))
    same(found, expected, rounding=ROUNDING)
    assert min(r.metrics.num_chunks for r in found.values()) >= 3
    assert rollout.report.num_recomputed_tokens == 0
    assert sum(rollout.report.speculation.accepted) > 10
    equals_transformers(engine, seed=0)


def test_new_weights_reach_every_worker(engine: aseer.Engine) -> None:
    for seed in (1, 0):
        engine.update_weights_sync(family_model(family_of(engine), seed))
        equals_transformers(engine, seed)


def test_the_death_of_a_worker_is_that_of_its_engine_and_costs_no_response(
    engine: aseer.Engine,
) -> None:
    engine.update_weights_sync(family_model(family_of(engine), 1))
    groups = groups_of(4, 300, n=2)
    expected = by_request(list(engine.rollout_sync(groups)))
    workers = workers_of(engine)
    assert len(workers) == 2, workers
    (before,) = engine.instances
    rollout = engine.rollout_sync(groups)
    found = {}
    for response in rollout:
        if not found:
            workers[1].kill()
        found[response.request_id] = response
    assert rollout.report.num_retries > 0
    same(found, expected, rounding=ROUNDING)
    (after,) = engine.instances
    assert after.pid != before.pid
    assert not any(worker.is_running() for worker in workers)
    equals_transformers(engine, seed=1)
