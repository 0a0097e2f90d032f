"""Child processes of a process that others have plans for, too.

uvloop hears of a child's end by SIGCHLD. From their first worker on PyTorch's data
loaders handle that signal themselves, and uvloop then waits forever. So a thread waits
for each child.

A trainer started by torchrun or its like is told by its environment which of several
workers it is. A child that took that for itself would wait for workers that are none of
its own: told of an agent's store, PyTorch does not even open one. Nor does a child take
over how the trainer's PyTorch allocates device memory.

And a child imports what its parent would, in the parent's order: neither a `queue.py`
that happens to lie in the working directory, nor less than what lies beside the script.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WORKERS_ONLY = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*"
    # How PyTorch allocates device memory is tuned for the trainer. vLLM refuses to
    # start with `expandable_segments:True` beside a KV connector.
    r"|PYTORCH_(CUDA_|HIP_)?ALLOC_CONF"
)


def module_command(name: str) -> tuple[str, ...]:
    """What runs a module in a child, whatever lies in the working directory."""
    return (sys.executable, "-P", "-m", name)


def inherited(environ: Mapping[str, str], path: Sequence[str]) -> dict[str, str]:
    """An environment for children.

    Args:
        environ: ours, of which is left out what is meant for this process alone.
        path: where we import from, first to last.
    """
    kept = {k: v for k, v in environ.items() if not _WORKERS_ONLY.fullmatch(k)}
    folders = [folder or str(Path.cwd()) for folder in path]
    return {**kept, "PYTHONPATH": os.pathsep.join(folders)}


class Child:
    """A process with a session of its own; make it with `start`."""

    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader  # of one that answers
    _answers: asyncio.BaseTransport | None = None

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self.pid = process.pid
        name = f"aseer-wait-{process.pid}"
        threading.Thread(target=self._watch, name=name, daemon=True).start()

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        log: IO[bytes],
        *,
        answers: bool = False,
    ) -> Child:
        """Start a process that reads what it is told.

        Args:
            env: added to what it inherits.
            log: gets what it prints; if it `answers`, only its errors.
        """
        child = cls(
            subprocess.Popen(  # noqa: ASYNC220 - as short as any loop's own
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else log,
                stderr=log,
                env={**inherited(os.environ, sys.path), **env},
                start_new_session=True,
            )
        )
        try:
            await child._connect()
        except BaseException:
            child._process.kill()  # nobody would know of it
            raise
        return child

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Wait for its end; the exit status."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._process.terminate()

    async def close(self) -> None:
        """Close the pipes to it."""
        if self._answers is not None:
            self._answers.close()
        self.stdin.close()
        with suppress(OSError, RuntimeError):
            await self.stdin.wait_closed()

    async def _connect(self) -> None:
        loop = self._loop
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()),
            self._process.stdin,
        )
        self.stdin = asyncio.StreamWriter(transport, protocol, None, loop)
        if self._process.stdout is not None:
            self.stdout = reader = asyncio.StreamReader()
            self._answers, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
            )

    def _watch(self) -> None:
        status = self._process.wait()
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._ended.set_result, status)
