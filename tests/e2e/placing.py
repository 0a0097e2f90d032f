"""Placements that no policy would choose, for requests to move as often as they can."""

from __future__ import annotations

from typing import Any


def elsewhere(holders: Any, room: Any, nodes: Any = ()) -> Any:
    """Another engine than the one that holds the request's KV; for `scheduler`."""
    del nodes
    home = max(holders.tokens, key=holders.tokens.get, default=-1)
    others = [i for i in room.alive_ids() if room.is_selected(i) and i != home]
    return min(others, key=room.num_running, default=room.least_loaded())
