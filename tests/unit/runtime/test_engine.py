"""An engine that cannot be opened leaves nothing, and can be opened again."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aseer.config import EngineConfig
from aseer.errors import EngineClosedError, EngineError
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


@pytest.mark.usefixtures("no_threads")
def test_an_engine_whose_thread_cannot_start_leaves_nothing_behind() -> None:
    engine = Engine(EngineConfig(model="sim", device="sim"))
    before = set(Path(tempfile.gettempdir()).iterdir())
    for _ in range(2):  # it is not taken for open
        with pytest.raises(EngineError, match="can't start new thread"):
            engine.__enter__()
        with pytest.raises(EngineClosedError, match="not open"):
            engine.rollout([])
    assert set(Path(tempfile.gettempdir()).iterdir()) == before
    engine.close()
