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
