"""Weights of a sharded trainer, to the engine's actor; called in all of its processes.

One process sends. The others take the same tensors from their iterators, since
gathering one needs all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

#: The trainer's rank that writes the weights.
SENDER = 0


async def send_weights(
    weights: Iterator[tuple[str, Any]] | AsyncIterator[tuple[str, Any]],
    actor: Any | None,
    *told: Any,
) -> None:
    """Update the engine's weights, or help to.

    Args:
        weights: (name, tensor), the same in all processes; taken to its end whatever
            happens, because ranks that gather a tensor wait for all others.
        actor: a Ray handle of an `EngineActor` in the process that sends, on the
            machine of the engine; None in the others.
        told: more arguments of its `finish_update`.
    Raises:
        WeightUpdateError: the engine keeps the weights it has.
    """
    source = weights if hasattr(weights, "__aiter__") else iter(weights)
    try:
        if actor is not None:
            await _send(source, actor, told)
    finally:
        await _exhaust(source)


async def _send(weights: Any, actor: Any, told: tuple[Any, ...]) -> None:
    target = await actor.begin_update.remote()
    try:
        await target.send_async(_kept(weights))
    except BaseException:
        await actor.abandon_update.remote(target)
        raise
    await actor.finish_update.remote(target, *told)


async def _kept(weights: Any) -> AsyncIterator[tuple[str, Any]]:
    """The pairs of an iterator that goes on when whoever takes them gives up."""
    if hasattr(weights, "__aiter__"):
        async for pair in weights:
            yield pair
    else:
        for pair in weights:
            yield pair


async def _exhaust(weights: Any) -> None:
    if hasattr(weights, "__aiter__"):
        async for _ in weights:
            pass
    else:
        for _ in weights:
            pass
