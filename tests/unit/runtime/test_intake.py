"""Groups on their way: what was offered in time is added, and nothing after."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aseer.runtime.intake import Intake
from tests.unit.builders import task_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.types import Task


class Taking:
    """An intake on a loop whose turns a test takes."""

    def __init__(self, *, by_one: bool = False) -> None:
        self.turns: deque[Callable[[], object]] = deque()
        self.is_running = True
        self.added: list[list[str]] = []
        self.num_arrived = 0
        in_parts = (lambda tasks: ([task] for task in tasks)) if by_one else None
        self.intake = Intake(self._post, self._add, in_parts, self._arrive)

    @property
    def state(self) -> tuple[bool, bool]:
        """Whether it is open, and over."""
        return self.intake.is_open, self.intake.is_over

    def turn(self) -> None:
        self.turns.popleft()()

    def _post(self, function: Callable[[], object]) -> bool:
        self.turns.append(function)
        return self.is_running

    def _add(self, tasks: list[Task]) -> None:
        self.added.append([task.group_id for task in tasks])

    def _arrive(self) -> None:
        self.num_arrived += 1


def test_what_is_offered_before_the_close_is_added_after_it() -> None:
    taking = Taking()
    assert taking.intake.offer([task_of("a"), task_of("b")])
    taking.intake.close()
    assert not taking.intake.offer([task_of("c")])
    assert taking.state == (False, False)
    taking.turn()
    assert taking.added == [["a", "b"]]
    assert taking.state == (False, True)
    assert not taking.turns


def test_parts_are_added_in_a_turn_each_and_more_is_coming_until_the_last() -> None:
    taking = Taking(by_one=True)
    taking.intake.offer([task_of("a"), task_of("b")])
    taking.intake.close()
    for added in ([["a"]], [["a"], ["b"]]):
        taking.turn()
        assert taking.added == added
        assert not taking.intake.is_over
    taking.turn()
    assert (taking.intake.is_over, taking.num_arrived) == (True, 1)


def test_what_a_loop_that_has_ended_cannot_take_is_refused() -> None:
    taking = Taking()
    taking.is_running = False
    assert not taking.intake.offer([task_of("a")])
    taking.intake.close()
    assert taking.state == (False, True)
