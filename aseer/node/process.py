"""One instance's process, and why it ended."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from aseer.errors import InstanceStartError, describe
from aseer.node.children import Child
from aseer.node.logs import cause_from_log

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from aseer.node.interpreter import Interpreter
    from aseer.node.leftovers import Leftovers

_LOG_TAIL_LINES = 15

#: What an instance process runs, and the module's arguments.
MODULE: tuple[str, ...] = ("aseer.instance.main",)


class InstanceProcess:
    """A running instance process; make it with `start`."""

    part = ""

    def __init__(self, child: Child) -> None:
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    @classmethod
    async def start(
        cls,
        name: str,
        line: bytes,
        env: Mapping[str, str],
        log_path: Path,
        leftovers: Leftovers,
        interpreter: Interpreter,
    ) -> InstanceProcess:
        """Start the process and hand it its spec.

        Args:
            name: of the instance. line: its spec, in JSON.
            env: the whole environment.
            interpreter: that it runs on.
        Raises:
            InstanceStartError: the system has no room for it; nothing of it remains.
        """
        try:
            child = await Child.start(
                interpreter.command(*MODULE), env, log_path, leftovers
            )
            try:
                child.tell(line + b"\n")
            except BaseException:
                await child.end()
                raise
        except OSError as error:
            raise InstanceStartError(
                f"the process of {name} cannot be started: {describe(error)}; look at "
                "the limits on processes, memory and open files, and whether "
                f"{log_path} can be written"
            ) from error
        return cls(child)

    async def wait(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        return await self._child.wait()

    async def end(self, grace_s: float) -> None:
        """See `Child.end`."""
        await self._child.end(grace_s)

    def kill(self) -> None:
        """See `Child.kill`."""
        self._child.kill()

    async def note_shared_memory(self) -> None:
        """See `Child.note_shared_memory`."""
        await self._child.note_shared_memory()

    def log_tail(self) -> str:
        """The last lines of its log."""
        return self._child.log.tail(_LOG_TAIL_LINES)

    def cause(self) -> str | None:
        """The error its log gives for its death, if it gives one."""
        return cause_from_log(self._child.log.text())


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # one of those that have no name, for real time
        name = f"signal {-status}"
    hint = " (was the machine short of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
