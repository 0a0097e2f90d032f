"""New weights leave nothing in an engine that the old ones computed."""

from __future__ import annotations

import pytest

from aseer.errors import EngineError
from aseer.instance.vllm import caches
from aseer.instance.vllm.caches import empty_caches


class EngineWithImages:
    """Records what is emptied; its blocks are in use for so many tries."""

    def __init__(self, num_busy: int = 0) -> None:
        self.emptied: list[str] = []
        self._num_busy = num_busy

    async def reset_encoder_cache(self) -> None:
        self.emptied.append("embeddings")

    async def reset_prefix_cache(self) -> bool:
        self._num_busy -= 1
        if self._num_busy < 0:
            self.emptied.append("kv")
        return self._num_busy < 0


class EngineWithoutEncoderCache:
    """As vLLM's engines were before they kept embeddings."""

    def __init__(self) -> None:
        self.is_emptied = False

    async def reset_prefix_cache(self) -> bool:
        self.is_emptied = True
        return True


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_INTERVAL_S", 0.0)


async def test_embeddings_of_images_go_with_the_kv() -> None:
    engine = EngineWithImages()
    await empty_caches(engine)
    assert sorted(engine.emptied) == ["embeddings", "kv"]


async def test_an_engine_that_keeps_no_embeddings_is_emptied_too() -> None:
    engine = EngineWithoutEncoderCache()
    await empty_caches(engine)
    assert engine.is_emptied


async def test_blocks_that_are_still_stored_are_waited_for() -> None:
    engine = EngineWithImages(num_busy=3)
    await empty_caches(engine)
    assert engine.emptied[-1] == "kv"


async def test_blocks_that_stay_in_use_are_an_error() -> None:
    with pytest.raises(EngineError, match="blocks are in use"):
        await empty_caches(EngineWithImages(num_busy=1 << 30))
