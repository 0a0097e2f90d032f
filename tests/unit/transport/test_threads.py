"""What fails in a thread is tried again, ever more rarely, and said once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from aseer.transport.threads import run_again

if TYPE_CHECKING:
    import pytest


class Stop(threading.Event):
    """Keeps how long was waited for it, and waits for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        return self.is_set()


def test_pauses_grow_and_the_log_does_not(caplog: pytest.LogCaptureFixture) -> None:
    stop = Stop()

    def serve() -> None:
        if len(stop.pauses) < 9:
            raise OSError("in use")

    run_again(serve, stop, "the server", "drafts are stale")
    assert stop.pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    (record,) = caplog.records
    told = "the server failed and is tried again; meanwhile drafts are stale"
    assert record.getMessage() == told


def test_nothing_is_tried_again_that_is_to_stop() -> None:
    stop = Stop()
    tries = []

    def serve() -> None:
        tries.append(1)
        stop.set()
        raise OSError

    run_again(serve, stop, "the server", "")
    assert len(tries) == 1
