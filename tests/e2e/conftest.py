"""What tests on real engines share."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import pytest

from aseer import scheduler
from tests.e2e.placing import elsewhere
from tests.e2e.vision import TORCHVISION

with suppress(ImportError):
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a bar starts a thread that never ends

# Here, since transformers looks once whether torchvision is there.
if TORCHVISION.is_dir():
    sys.path.append(str(TORCHVISION))


@pytest.fixture
def always_migrate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every chunk to another engine than the one that holds its KV."""
    monkeypatch.setattr(scheduler, "place_by_affinity", elsewhere)


@pytest.fixture
def engines_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Place chunks on the engines one after another, wherever their KV is."""
    last = -1

    def next_one(holders: Any, room: Any, nodes: Any = ()) -> Any:
        nonlocal last
        chosen = [i for i in room.alive_ids() if room.is_selected(i)]
        last = next((i for i in chosen if i > last), chosen[0])
        return last

    monkeypatch.setattr(scheduler, "place_by_affinity", next_one)
