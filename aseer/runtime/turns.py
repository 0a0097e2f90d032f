"""How long threads of this process wait for each other's turn in Python.

Python lets a thread that computes run for `sys.getswitchinterval()`, 5 ms, before it
must hand over to one that waits. The engine's thread gives its turn away with each
message that it sends or receives. While the trainer's own thread computes in Python,
say rewards, it therefore gets through some hundred messages a second; and whoever waits
for the engine's thread waits for 5 ms as well. With turns of 1 ms both wait less, and
threads change places a thousand times a second at most, which costs little.
`bench/bench_busy_trainer.py` measures it.

The setting is the whole process's. It is made while an engine is open, and a shorter
one of the user's is left alone.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TURN_S = 0.001


class _Turns:
    """The process's setting, and for how many threads it is ours."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_users = 0
        self.before_s = 0.0


_turns = _Turns()


@contextmanager
def short_turns() -> Iterator[None]:
    """Meanwhile threads have turns of at most `TURN_S`; from any thread, nested too."""
    with _turns.lock:
        if not _turns.num_users:
            _turns.before_s = sys.getswitchinterval()
            sys.setswitchinterval(min(TURN_S, _turns.before_s))
        _turns.num_users += 1
    try:
        yield
    finally:
        with _turns.lock:
            _turns.num_users -= 1
            # What the user has set meanwhile stays.
            if not _turns.num_users and sys.getswitchinterval() == TURN_S:
                sys.setswitchinterval(_turns.before_s)
