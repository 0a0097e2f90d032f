"""`aseer.rollout`: which engine it samples on, and who closes that."""

from __future__ import annotations

from typing import Any

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError, EngineClosedError
from aseer.runtime import once
from aseer.runtime.engine import current_engine
from aseer.runtime.once import rollout

CONFIG = EngineConfig(model="m")


class Engine:
    """Yields what it is asked, and says whether it is open."""

    made: list[Engine]

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config, self.is_open = config, config is None
        self.made.append(self)

    async def __aenter__(self) -> Engine:
        self.is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_open = False

    async def rollout(self, groups: Any, **asked: Any) -> Any:
        assert self.is_open
        for group in groups:
            yield group, asked


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    monkeypatch.setattr(once, "Engine", Engine)
    Engine.made = []
    return Engine.made


async def all_of(responses: Any) -> list[Any]:
    return [response async for response in responses]


async def test_the_engine_that_is_given_or_else_is_open_here_samples(engines):
    given, here = Engine(), Engine()
    asked: Any = {"policy": "fcfs", "chunk_size": 0, "journal": "j"}
    token = current_engine.set(here)  # type: ignore[arg-type]
    try:
        assert await all_of(rollout(["a", "b"], **asked)) == [
            ("a", asked),
            ("b", asked),
        ]
        here.is_open = False  # so that it would refuse
        (found,) = await all_of(rollout(["a"], engine=given))
        assert found == ("a", dict.fromkeys(asked))
    finally:
        current_engine.reset(token)
    assert given.is_open


async def test_an_engine_of_its_own_is_open_as_long_as_the_rollout(engines):
    responses = rollout(["a", "b"], config=CONFIG)
    async for _ in responses:
        (own,) = engines
        assert (own.config, own.is_open) == (CONFIG, True)
    assert not own.is_open
    responses = rollout(["a", "b"], config=CONFIG)
    await anext(responses)
    await responses.aclose()  # its reader leaves early
    assert not engines[1].is_open


async def test_without_an_engine_or_with_two_nothing_is_sampled(engines):
    with pytest.raises(EngineClosedError, match="no engine is open here"):
        await all_of(rollout(["a"]))
    with pytest.raises(ConfigError, match="engine= or config=, not both"):
        await all_of(rollout(["a"], engine=Engine(), config=CONFIG))  # type: ignore[arg-type]
    assert [engine.config for engine in engines] == [None]
