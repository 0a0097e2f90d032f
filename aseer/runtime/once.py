"""`aseer.rollout`: a rollout on the engine that is open here, or on one of its own."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from aseer.errors import ConfigError, EngineClosedError
from aseer.runtime.engine import Engine, current_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aseer.config import EngineConfig, PolicyName
    from aseer.groups import Groups
    from aseer.types import Response


async def rollout(
    groups: Groups,
    *,
    engine: Engine | None = None,
    config: EngineConfig | None = None,
    policy: PolicyName | None = None,
    chunk_size: int | None = None,
    journal: str | None = None,
) -> AsyncIterator[Response]:
    """Sample every group's responses on the engine that is open here; see
    `Engine.rollout`.

    Args:
        groups: see `Engine.rollout`.
        engine: the engine to use; None = the one whose context this code runs in.
        config: settings of an engine that is opened for this call alone.
        policy: replaces the engine's policy.
        chunk_size: replaces the engine's chunk size; 0 = requests are not divided.
        journal: see `Engine.rollout`.
    Raises:
        ConfigError: both `engine` and `config` are given.
        EngineClosedError: neither is given and no engine is open here.
    """
    if engine is not None and config is not None:
        raise ConfigError("give engine= or config=, not both")
    async with AsyncExitStack() as own:
        if config is not None:
            engine = await own.enter_async_context(Engine(config))
        engine = engine or current_engine.get()
        if engine is None:
            raise EngineClosedError(
                "no engine is open here; call this inside `async with "
                "aseer.Engine(...)`, or give engine= or config="
            )
        responses = engine.rollout(
            groups, policy=policy, chunk_size=chunk_size, journal=journal
        )
        async for response in responses:
            yield response
