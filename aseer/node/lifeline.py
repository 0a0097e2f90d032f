"""How a process that we started hears that its controller is gone, and ends.

A pipe alone does not tell: a process that the controller has forked, such as a data
loader's worker, holds the pipe's other end for as long as it lives. So each process
watches the controller itself. Nor is it enough that one process of an engine does:
whoever kills the controller may kill its children with it, and only them. So every
process that `multiprocessing` starts below ours watches, too, whether it is spawned or
forked, and whichever of them hears first ends them all.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aseer.node import leftovers
from aseer.node.cleanup import remove_shared_memory, shared_memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

VARIABLE = "ASEER_LIFELINE"
_POLL_S = 1.0  # where the kernel does not tell of a process's end
# From when a process that ends closes its pipes to when it has ended: milliseconds.
_EXIT_S = 1.0

_log = logging.getLogger("aseer.node.lifeline")


class Lifeline(msgspec.Struct, frozen=True, kw_only=True):
    """Who must live for a process to go on, told it by its environment.

    Attributes:
        pid, started_at: of the controller; the id alone may be another's later.
        run_dir: of its engine, with the list of what is to be removed.
    """

    pid: int
    started_at: int
    run_dir: str

    @classmethod
    def to_this_process(cls, run_dir: Path) -> Lifeline:
        """For the children of this process."""
        pid = os.getpid()
        return cls(pid=pid, started_at=_started_at(pid), run_dir=str(run_dir))

    @classmethod
    def of_this_process(cls, environ: Mapping[str, str] = os.environ) -> Lifeline:
        """The one that this process hangs on.

        Raises:
            KeyError: none was given.
        """
        return msgspec.json.decode(environ[VARIABLE], type=cls)

    def environment(self) -> dict[str, str]:
        """What a child's environment says of it."""
        return {VARIABLE: msgspec.json.encode(self).decode()}

    def is_intact(self) -> bool:
        """Whether the controller lives."""
        return _started_at(self.pid) == self.started_at


def watch(
    lifeline: Lifeline, end: Callable[[], object], pipe: int | None = None
) -> None:
    """Call `end` from a thread of its own once the controller is gone.

    Args:
        pipe: to be read by the thread alone; its end is the controller's, too.
    """

    def run() -> None:
        try:
            _wait(lifeline, pipe)
        except Exception:
            _log.exception("the controller's end is looked for in another way")
            while lifeline.is_intact():
                time.sleep(_POLL_S)
        end()

    threading.Thread(target=run, name="lifeline", daemon=True).start()


def watch_in_children(lifeline: Lifeline) -> None:
    """Have every process that this one forks watch, too, and end with its group."""
    os.register_at_fork(
        after_in_child=lambda: watch(lifeline, lambda: end_group(lifeline))
    )


def watch_below(lifeline: Lifeline) -> None:
    """Watch in this process, which `multiprocessing` spawned below one of ours."""
    try:
        leftovers.hold(Path(lifeline.run_dir))
    except OSError:
        end_group(lifeline)
    watch(lifeline, lambda: end_group(lifeline))
    watch_in_children(lifeline)


def end_group(lifeline: Lifeline) -> None:
    """End every process of this one's group, and remove what the engine leaves.

    At once, since an engine without a controller has nothing that is worth an orderly
    end. Other processes of the engine may be doing the same. A controller that has only
    closed the pipe may go on; what it has is not touched.
    """
    _log.error("the controller is gone; process %d ends", os.getpid())
    group = os.getpgrp()
    remove_shared_memory(shared_memory_of(group), group=group)
    deadline = time.monotonic() + _EXIT_S
    while lifeline.is_intact() and time.monotonic() < deadline:
        time.sleep(_EXIT_S / 100)
    if not lifeline.is_intact():
        leftovers.remove(Path(lifeline.run_dir), group=group)
    os.killpg(group, signal.SIGKILL)


@contextmanager
def opened(lifeline: Lifeline) -> Iterator[int | None]:
    """The controller's process as a descriptor that is ready once it has ended; None if
    the system has none, or the process has ended.
    """
    process: int | None = None
    # Forbidden, not known to this Python, or gone.
    with suppress(OSError, AttributeError):
        process = os.pidfd_open(lifeline.pid)
    try:
        yield process
    finally:
        if process is not None:
            os.close(process)


def _wait(lifeline: Lifeline, pipe: int | None) -> None:
    """Return when the controller is gone."""
    poller = select.poll()
    with opened(lifeline) as process:
        if process is not None:
            poller.register(process, select.POLLIN)
        if pipe is not None:
            poller.register(pipe, select.POLLIN)
        timeout_ms = None if process is not None else 1000 * _POLL_S
        # Asked after the process was opened: that one is then the controller.
        while lifeline.is_intact():
            for ready, _ in poller.poll(timeout_ms):
                if ready == process or not os.read(ready, 4096):
                    return


def _started_at(pid: int) -> int:
    """When a process started, in ticks since the machine did; 0 if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])
