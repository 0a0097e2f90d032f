"""Weights of simulated engines, and what engines that have them generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.sims import content, groups_of
from tests.lazy import Lazy

if TYPE_CHECKING:
    import aseer

torch = Lazy("torch")
#: Of the model's tensors, as `engine_args={"weights": ...}` gives them to engines.
SHAPES = {"a": [4, 3], "b": [5]}


def weights(value: float) -> dict[str, torch.Tensor]:
    """All of a model's tensors, full of one value."""
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


async def roll(engine: aseer.Engine) -> dict[str, object]:
    """A whole rollout's content, which is decided by the engine's weights."""
    responses = [r async for r in engine.rollout(groups_of(6))]
    assert {r.weight_version for r in responses} == {engine.weight_version}
    assert {r.finish_reason for r in responses} <= {"stop", "length"}
    return content(responses)
