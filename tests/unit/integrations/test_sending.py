"""Weights of a sharded trainer: one process sends, and all gather to the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aseer.errors import WeightUpdateError
from aseer.integrations.sending import send_weights
from tests.unit.integrations.actors import Actor, Call

NAMES = ["a", "b", "c"]


class Gathering:
    """What a rank's iterator yields, and how far all ranks have come with it."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def pairs(self) -> Any:
        for name in NAMES:
            self.taken.append(name)
            yield name, object()

    async def pairs_async(self) -> Any:
        for pair in self.pairs():
            await asyncio.sleep(0)
            yield pair


@pytest.fixture(params=["pairs", "pairs_async"])
def gathering(request):
    gathering = Gathering()
    return gathering, getattr(gathering, request.param)()


async def test_the_sender_updates_the_engine_with_all_tensors(gathering):
    (rank, weights), actor = gathering, Actor()
    await send_weights(weights, actor, 3, "more")
    assert actor.target.sent == rank.taken == NAMES
    assert actor.told == [("finish_update", actor.target, 3, "more")]


async def test_others_take_the_same_tensors_and_send_none(gathering):
    rank, weights = gathering
    await send_weights(weights, None, 3)
    assert rank.taken == NAMES


async def test_an_update_that_is_refused_is_abandoned_and_gathered_to_its_end(
    gathering,
):
    (rank, weights), actor = gathering, Actor(refuses=True)
    with pytest.raises(WeightUpdateError, match="no such tensor"):
        await send_weights(weights, actor)
    assert actor.told == [("abandon_update", actor.target)]
    assert rank.taken == NAMES


async def test_an_update_that_does_not_begin_is_gathered_to_its_end(gathering):
    (rank, weights), actor = gathering, Actor()

    def refuse() -> None:
        raise WeightUpdateError("another update is in progress")

    actor.begin_update = Call(refuse)
    with pytest.raises(WeightUpdateError, match="another update"):
        await send_weights(weights, actor)
    assert (actor.told, rank.taken) == ([], NAMES)
