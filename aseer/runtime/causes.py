"""Why an instance did not start, or died, in the words that users read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.errors import InstanceStartError
from aseer.node.process import describe_exit

if TYPE_CHECKING:
    from aseer.node.base import Process
    from aseer.runtime.slot import Slot


def start_error(
    slot: Slot, process: Process, what: str, beside: str = ""
) -> InstanceStartError:
    """Of an instance that did not come up.

    Args:
        what: happened. beside: what its KV pool says of it.
    """
    own = _own_cause(slot, process) or slot.killed_because or process.cause()
    cause = f"; cause: {own}" if own else ""
    if own and "LMCache" in own:
        cause += beside
    return InstanceStartError(
        f"instance {slot.instance_id} ({slot.launch.share}) {what}{cause}\n"
        f"last lines of its log:\n{process.log_tail()}"
    )


def death(slot: Slot, process: Process, status: int | None, hint: str) -> str:
    """Why an instance is gone, and where to read on.

    Args:
        status: that its process exited with; None = it was killed, and lives on.
        hint: how the log is kept.
    """
    why = _own_cause(slot, process) or slot.killed_because
    if not why:
        why = "it does not end" if status is None else how_it_ended(process, status)
    return f"{why} (its log: {slot.log}{hint})"


def how_it_ended(process: Process, status: int) -> str:
    """The exit status of a process, or of its part that ended first, in words."""
    return process.part + describe_exit(status)


def _own_cause(slot: Slot, process: Process) -> str | None:
    """What the instance said of its end, from its log if it only points there."""
    own = slot.failure
    if own is not None and "root cause" in own:
        own = process.cause() or own
    return own
