"""What tests on real engines share."""

from __future__ import annotations

from typing import Any

import pytest

from aseer import scheduler


@pytest.fixture
def always_migrate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every chunk to another engine than the one that holds its KV."""

    def elsewhere(holders: Any, room: Any) -> Any:
        home = max(holders.tokens, key=holders.tokens.get, default=-1)
        others = [i for i in room.alive_ids() if room.is_selected(i) and i != home]
        return min(others, key=room.num_running, default=room.least_loaded())

    monkeypatch.setattr(scheduler, "place_by_affinity", elsewhere)


@pytest.fixture
def engines_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Place chunks on the engines one after another, wherever their KV is."""
    last = -1

    def next_one(holders: Any, room: Any) -> Any:
        nonlocal last
        chosen = [i for i in room.alive_ids() if room.is_selected(i)]
        last = next((i for i in chosen if i > last), chosen[0])
        return last

    monkeypatch.setattr(scheduler, "place_by_affinity", next_one)
