"""Whether an engine has any instance left, or gets one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aseer.config import takes_nodes

if TYPE_CHECKING:
    from aseer.config import EngineConfig
    from aseer.runtime.instances import PoolOwner
    from aseer.runtime.slot import Slots

_log = logging.getLogger("aseer")


class Exhaustion:
    """Tells the instances' owner that none is left, once that is sure."""

    def __init__(self, config: EngineConfig, slots: Slots, owner: PoolOwner) -> None:
        """`slots` are all places for instances, as they come and go."""
        self._timeout_s = config.start_timeout_s
        self._slots = slots
        self._owner = owner
        self._since: float | None = None
        self._may_grow = takes_nodes(config)

    def is_final(self) -> bool:
        """Whether no instance will be up again, whoever comes."""
        return self._is_there and not self._may_grow

    @property
    def _is_there(self) -> bool:
        """Whether no instance will be up again, unless a node joins."""
        return all(slot.is_given_up for slot in self._slots.values())

    def tell(self, why: str) -> None:
        """Tell the owner: it is final."""
        self._owner.instances_exhausted(f"every instance is lost and {why}")

    def look(self, now: float) -> None:
        """Tell the owner when no instance is left, and no node has come for as long as
        one may take.
        """
        if not (self._may_grow and self._is_there):
            self._since = None
        elif self._since is None:
            self._since = now
            _log.warning("no instance is left; waiting for a node to join")
        elif now - self._since > self._timeout_s:
            self._since = float("inf")  # it is told once
            limit = f"start_timeout_s={self._timeout_s:g}"
            self.tell(f"no node has joined for {limit}")
