"""One instance's process: started, watched, ended together with all it started.

The process leads a session and process group of its own, so that Ctrl-C in a terminal
reaches only the controller, and one signal reaches every process of the engine.
"""

from __future__ import annotations

import asyncio
import re
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from aseer.children import Child
from aseer.instance.cleanup import (
    kill_group,
    remove_shared_memory,
    shared_memory_of,
    signal_group,
)
from aseer.instance.launch import COMMAND
from aseer.watch import waking_timeout

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from aseer.instance.base import InstanceSpec

_LOG_TAIL_LINES = 15
# What vLLM says after the real cause, and what follows from a death rather than causing
# it.
_NOT_A_CAUSE = (
    "Engine core initialization failed",
    "EngineDeadError",
    "died unexpectedly",
)
_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)): ?(.*)")


class InstanceProcess:
    """A running instance process; make it with `start`."""

    def __init__(self, process: Child, log_path: Path, log_start: int) -> None:
        self._process = process
        self._log_path = log_path
        self._log_start = log_start  # before it is what earlier processes wrote
        self._shared_memory: set[Path] = set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(
        cls, spec: InstanceSpec, env: Mapping[str, str], log_path: Path
    ) -> InstanceProcess:
        """Start the process and hand it its spec."""
        with log_path.open("ab") as log:
            log_start = log.tell()
            process = await Child.start(COMMAND, env, log)
        process.stdin.write(msgspec.json.encode(spec) + b"\n")
        return cls(process, log_path, log_start)

    async def wait(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        return await self._process.wait()

    async def end(self, grace_s: float) -> None:
        """Give it `grace_s` to exit, then kill it; either way nothing of it remains."""
        if self._process.returncode is None and grace_s > 0:
            await self.note_shared_memory()
            with suppress(TimeoutError):
                async with waking_timeout(grace_s):
                    await self._process.wait()
        await self.note_shared_memory()
        await asyncio.to_thread(kill_group, self._process.pid)
        await self._process.wait()
        await asyncio.to_thread(remove_shared_memory, self._shared_memory)
        await self._process.close()

    def kill(self) -> None:
        """Kill the whole process group, dead leader or not; `wait` tells when."""
        signal_group(self._process.pid)

    async def note_shared_memory(self) -> None:
        """Remember what its processes have mapped, in case they cannot remove it."""
        found = await asyncio.to_thread(shared_memory_of, self._process.pid)
        self._shared_memory |= found

    def log_tail(self) -> str:
        """The last lines of its log."""
        lines = self._log().splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def cause(self) -> str | None:
        """The error its log gives for its death, if it gives one."""
        return cause_from_log(self._log())

    def _log(self) -> str:
        try:
            with self._log_path.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode(errors="replace")
        except OSError:
            return ""


def cause_from_log(text: str) -> str | None:
    """The last error in a log that is a cause and not a consequence."""
    cause = None
    for line in text.splitlines():
        match = _ERROR_LINE.search(line)
        if match and not any(text in line for text in _NOT_A_CAUSE):
            cause = f"{match[1]}: {match[2]}".rstrip(": ")
    return cause


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
