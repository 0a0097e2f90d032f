"""Groups on their way into a rollout: offered from any thread, added on the loop.

What was offered before the intake closed is added, whatever happens.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from aseer.types import Task


class Intake:
    """Whether groups are still taken, and those that have not arrived yet."""

    def __init__(
        self,
        post: Callable[[Callable[[], object]], bool],
        add: Callable[[list[Task]], object],
        in_parts: Callable[[list[Task]], Iterator[list[Task]]] | None,
        on_arrived: Callable[[], object],
    ) -> None:
        """Start open.

        Args:
            post: does something on the loop, soon; False if the loop has ended.
            add: takes groups, on the loop.
            in_parts: cuts groups that were offered together into parts, which are added
                in a turn of the loop each; None = they are one part.
            on_arrived: called once parts that were offered together are all added.
        """
        self._post = post
        self._add = add
        self._in_parts = in_parts
        self._on_arrived = on_arrived
        self._lock = threading.RLock()  # an iterator's end may come in between
        self._is_open = True
        self._num_coming = 0

    @property
    def is_open(self) -> bool:
        """Whether more groups are taken."""
        return self._is_open

    @property
    def is_over(self) -> bool:
        """Whether no group will come any more."""
        return not (self._is_open or self._num_coming)

    def close(self) -> None:
        """Take no more; from any thread."""
        with self._lock:
            self._is_open = False

    def offer(self, tasks: list[Task]) -> bool:
        """Hand groups over, from any thread; False if no more are taken."""
        with self._lock:
            if not self._is_open:
                return False
            self._num_coming += 1
        if self._post(lambda: self._begin(tasks)):
            return True
        self._count(-1)
        return False

    def _begin(self, tasks: list[Task]) -> None:
        parts = iter([tasks]) if self._in_parts is None else self._in_parts(tasks)
        self._add_next(parts)

    def _add_next(self, parts: Iterator[list[Task]]) -> None:
        """Add what was offered, a part in each turn of the loop."""
        self._count(-1)
        part = next(parts, None)
        if part is None:
            self._on_arrived()
            return
        if self._in_parts is not None:
            self._count(1)
            self._post(lambda: self._add_next(parts))
        self._add(part)

    def _count(self, num: int) -> None:
        with self._lock:
            self._num_coming += num


def seeded(task: Task, seeds: Random) -> Task:
    """The group with a seed, if its requests start over where an instance is lost.

    With other random numbers short responses would be the likelier ones, as they have
    two chances to end before the instance does.
    """
    if task.seed is not None or task.undivided_because is None:
        return task
    return replace(task, seed=seeds.getrandbits(63))
