"""Child processes of a process that others have plans for, too.

uvloop hears of a child's end by SIGCHLD. From their first worker on PyTorch's data
loaders handle that signal themselves, and uvloop then waits forever. So a thread waits
for each child.

A trainer started by torchrun or its like is told by its environment which of several
workers it is. A child that took that for itself would wait for workers that are none of
its own: told of an agent's store, PyTorch does not even open one. Nor does a child take
over how the trainer's PyTorch allocates device memory.

A child imports what its parent would, in the parent's order: neither a `queue.py` that
happens to lie in the working directory, nor less than what lies beside the script.

Each child leads a session and process group of its own, so that Ctrl-C in a terminal
reaches only its parent, and one signal reaches every process below it. While the child
is not `end`ed its id stays its own, so that no other group is ever signalled. It hangs
on its parent by a lifeline (`aseer.node.lifeline`), however its parent dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from aseer.node.cleanup import (
    kill_group,
    remove_shared_memory,
    shared_memory_of,
    signal_group,
    state_of,
)
from aseer.node.forks import forget, keep_from_forks
from aseer.node.lifeline import Lifeline
from aseer.node.logs import Log
from aseer.watch import wait_awake, waking_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aseer.node.leftovers import Leftovers

_log = logging.getLogger("aseer")

P = ParamSpec("P")
T = TypeVar("T")

# From SIGKILL to a process's end. To take hundreds of gigabytes from one, and GPUs,
# lasts tens of seconds; one that a driver or a file system holds up may never end.
LONGEST_DEATH_S = 60.0
# After this time whoever waits for the end is told that it is still waited for.
_LONG_DEATH_S = 5.0

_WORKERS_ONLY = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*"
    # Of a trainer that has vLLM of its own, spread over its processes.
    r"|VLLM_DP_(SIZE|RANK|RANK_LOCAL|MASTER_IP|MASTER_PORT)"
    # How PyTorch allocates device memory is tuned for the trainer. vLLM refuses to
    # start with `expandable_segments:True` beside a KV connector.
    r"|PYTORCH_(CUDA_|HIP_)?ALLOC_CONF"
)


def inherited(environ: Mapping[str, str], path: Sequence[str]) -> dict[str, str]:
    """An environment for children.

    Args:
        environ: ours, of which is left out what is meant for this process alone.
        path: where we import from, first to last.
    """
    kept = {k: v for k, v in environ.items() if not _WORKERS_ONLY.fullmatch(k)}
    here = ""
    with suppress(OSError):  # the working directory was removed
        here = str(Path.cwd())
    # Python itself passes over what is no text, such as a Path.
    folders = [folder or here for folder in path if isinstance(folder, str)]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


class Child:
    """A process that reads what it is told; make it with `start`, `end` it once."""

    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader  # of one that answers
    _answers: asyncio.BaseTransport | None = None

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        log: Log,
        leftovers: Leftovers,
    ) -> None:
        self._process = process
        self.log = log
        self._leftovers = leftovers
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._shared_memory: set[Path] = set()
        self._is_over = False
        self.pid = process.pid
        pipes = [pipe for pipe in (process.stdin, process.stdout) if pipe is not None]
        self._kept = [keep_from_forks(pipe.fileno()) for pipe in pipes]

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        log_path: Path,
        leftovers: Leftovers,
        *,
        answers: bool = False,
    ) -> Child:
        """Start a process.

        Args:
            env: the whole environment, but for what lifelines add.
            log_path: gets what it prints; if it `answers`, only its errors.
            leftovers: of the engine that it belongs to.
        Raises:
            OSError: there is no room for it, or no log; nothing of it remains.
        """
        lifeline = Lifeline.to_this_process(leftovers.run_dir).environment()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(  # noqa: ASYNC220 - as short as any loop's own
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else log,
                stderr=log,
                env={**env, **lifeline},
                start_new_session=True,
            )
        child = cls(process, Log(log_path, log_start), leftovers)
        try:
            await child._connect()
        except BaseException as error:
            child._abandon()
            if isinstance(error, RuntimeError):  # Python's, where no thread can be had
                raise OSError(str(error)) from error
            raise
        return child

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Wait for its end; the exit status."""
        return await asyncio.shield(self._ended)

    def tell(self, message: bytes) -> None:
        """Write to its standard input.

        Raises:
            OSError: nobody reads it.
        """
        try:
            self.stdin.write(message)
        except RuntimeError as error:  # uvloop's, for a pipe that is closed
            raise OSError(f"it takes no messages: {error}") from None

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        if not self._is_over:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill its process group, dead leader or not; `wait` tells when."""
        if not self._is_over:
            signal_group(self.pid)

    async def end(self, grace_s: float = 0.0) -> None:
        """Give it `grace_s` to exit, then kill it; either way nothing of it remains.

        May be called again, also if it was cancelled. A process that cannot be killed
        is let be after `LONGEST_DEATH_S`, and `wait` says then that it was.
        """
        if self._is_over:
            return
        if self.returncode is None and grace_s > 0:
            await self.note_shared_memory()
            with suppress(TimeoutError):
                async with waking_timeout(grace_s):
                    await self.wait()
        await self.note_shared_memory()
        await in_thread(kill_group, self.pid)
        await self._wait_for_death()
        self._is_over = True
        if not self._ended.done():
            self._let_be()
            return
        self._process.wait()  # it has ended: from here on its id may be another's
        await in_thread(remove_shared_memory, self._shared_memory)
        self._close_pipes()
        with suppress(OSError, RuntimeError):
            await self.stdin.wait_closed()

    async def note_shared_memory(self) -> None:
        """Remember what its processes have mapped, in case they cannot remove it."""
        self._shared_memory |= await in_thread(shared_memory_of, self.pid)
        self._leftovers.add_shared_memory(self._shared_memory)

    async def _connect(self) -> None:
        loop = self._loop
        name = f"aseer-wait-{self.pid}"
        threading.Thread(target=self._watch, name=name, daemon=True).start()
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

    def _abandon(self) -> None:
        """Leave nothing of a process that did not even start; nobody knows of it."""
        self._is_over = True
        signal_group(self.pid)
        self._process.wait()
        self._close_pipes()

    async def _wait_for_death(self) -> None:
        await wait_awake(self._ended, min(_LONG_DEATH_S, LONGEST_DEATH_S))
        if self._ended.done():
            return
        _log.warning(
            "process %d was killed and has not ended yet (state %s); it is waited for, "
            "up to %g s",
            self.pid,
            state_of(self.pid),
            LONGEST_DEATH_S,
        )
        await wait_awake(self._ended, LONGEST_DEATH_S)

    def _let_be(self) -> None:
        """Give up a process that was killed and lives on."""
        _log.error(
            "process %d was killed and lives on (state %s); it is waited for no more, "
            "and what it has stays taken until it ends",
            self.pid,
            state_of(self.pid),
        )
        self._ended.set_result(-signal.SIGKILL)
        self._close_pipes()

    def _note_end(self, status: int) -> None:
        if self._ended.done():  # it was let be: nobody else takes its status
            self._process.wait()
        else:
            self._ended.set_result(status)

    def _close_pipes(self) -> None:
        for entry in self._kept:
            forget(entry)
        if self._answers is not None:
            self._answers.close()
        elif self._process.stdout is not None:
            self._process.stdout.close()
        if hasattr(self, "stdin"):
            self.stdin.close()
        elif self._process.stdin is not None:
            self._process.stdin.close()

    def _watch(self) -> None:
        """Tell the loop of its end; until `end` it stays a zombie, with its id."""
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None  # since it waits
            by_signal = ended.si_code != os.CLD_EXITED
            status = -ended.si_status if by_signal else ended.si_status
        except OSError:  # somebody else has taken its status
            status = self._process.wait()
        try:
            self._loop.call_soon_threadsafe(self._note_end, status)
        except RuntimeError:  # the loop is closed, and nobody else takes its status
            self._process.wait()


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a thread of its own; in this one if none can be had.

    While the interpreter exits there are no new threads, and none of the loop's own
    executor, which must not exist then: to close it takes a thread, too.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(settle_with: Callable[[Any], None], outcome: object) -> None:
        if not done.done():  # whoever waited may have been cancelled
            settle_with(outcome)

    def run() -> None:
        try:
            settled = partial(settle, done.set_result, function(*args, **kwargs))
        except BaseException as error:
            settled = partial(settle, done.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(settled)

    try:
        threading.Thread(target=run, name="aseer-aside", daemon=True).start()
    except RuntimeError:
        run()
    return await done
