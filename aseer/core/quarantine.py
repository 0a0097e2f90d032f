"""Requests whose engines died under them: tried a few at a time. Pure.

An engine that dies takes all its requests with it, and nothing tells which of them, if
any, was the cause. So a request that was lost waits here for its *trial*: it runs like
any other, and is cleared as soon as it has made a token, since what kills an engine
mostly does so at once. Trials begin with one request; each time all that are on trial
are cleared, twice as many go next, so that after an engine that died for a cause of its
own all go on within seconds. If an engine dies with requests on trial, those are tried
one by one, first of all. An engine that dies with a single one on trial died of that
one, as far as can be known: that one alone is blamed. So a request that kills every
engine ends after a few deaths, and its neighbours do not.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.core.request import Request
    from aseer.types import GroupId


class Quarantine:
    """Requests that wait for their trial, and those that are on trial."""

    def __init__(self) -> None:
        self._held: deque[Request] = deque()
        self._on_trial: dict[Request, int] = {}  # tokens when the trial began
        self._num_at_once = 1
        self._num_alone = 0  # of those held that are to be tried one by one

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request: Request) -> bool:
        return request in self._held

    def lose(self, lost: Iterable[Request]) -> list[Request]:
        """An engine died with these; those of them that were on trial."""
        self._clear()
        suspects = [r for r in lost if self._on_trial.pop(r, None) is not None]
        if suspects:
            self._num_at_once = 1
        return suspects

    def hold(self, request: Request, *, was_on_trial: bool) -> None:
        """Keep a request that was lost until its trial."""
        if was_on_trial:
            self._held.appendleft(request)
            self._num_alone += 1
        else:
            self._held.append(request)

    def next_trials(self) -> list[Request]:
        """The requests that are to go on now; none while some are on trial."""
        if not (self._on_trial or self._held):  # nearly always
            self._num_alone, self._num_at_once = 0, 1
            return []
        self._clear()
        if self._on_trial:
            return []
        num = 1 if self._num_alone else self._num_at_once
        trials = [self._held.popleft() for _ in range(min(num, len(self._held)))]
        self._num_alone = max(0, self._num_alone - num)
        self._num_at_once = 1 if self._num_alone or not trials else 2 * num
        self._on_trial = {r: r.num_generated for r in trials}
        return trials

    def is_due(self) -> bool:
        """Whether `next_trials` has something to say."""
        if self._on_trial:
            self._clear()
        return bool(self._held) and not self._on_trial

    def remove_group(self, group_id: GroupId) -> None:
        """A group is over: none of its requests go on."""
        if self._held:
            self._held = deque(r for r in self._held if r.group.group_id != group_id)
            self._num_alone = min(self._num_alone, len(self._held))

    def _clear(self) -> None:
        """Let those go that have shown that they kill nothing, or are over."""
        self._on_trial = {
            request: num
            for request, num in self._on_trial.items()
            if request.num_generated == num and not request.state.is_finished
        }
