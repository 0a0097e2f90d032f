"""A pool server's process, from the controller's side, over all its incarnations."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import AseerError
from aseer.kv.frees import FreeQueue
from aseer.kv.messages import (
    FROM_SERVER,
    Free,
    PeerSpec,
    Poll,
    PoolCounts,
    Prefetch,
    Pull,
    Pulled,
    ServerSpec,
)
from aseer.kv.settings import QUIET_LMCACHE, SHM_PREFIX, server_args
from aseer.node.children import Child, in_thread
from aseer.node.cleanup import SHARED_MEMORY
from aseer.node.interpreter import this_interpreter
from aseer.node.machine import GPU_VARIABLES
from aseer.watch import waking_timeout

if TYPE_CHECKING:
    from aseer.kv.settings import PoolPlan
    from aseer.node.interpreter import Interpreter
    from aseer.node.leftovers import Leftovers

_log = logging.getLogger("aseer")

#: What a server's process runs.
MODULE: tuple[str, ...] = ("aseer.kv.server",)
_POLL_INTERVAL_S = 0.5
_PULL_INTERVAL_S = 0.01  # while a request waits for KV of another node
_ANSWER_TIMEOUTS = 2  # of the pool's `timeout_s`, until a server is taken for dead
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 8.0
_LOG_TAIL_LINES = 5
# Told in one poll. A server begins four loads at once and leaves the rest alone.
_MAX_PREFETCHES = 8
# It sees no device: engines bring their KV to it, and it would take some of a GPU's
# memory, the trainer's as like as not, for nothing.
_ENV = {"OMP_NUM_THREADS": "1", **dict.fromkeys(GPU_VARIABLES, ""), **QUIET_LMCACHE}


class PoolServerError(AseerError):
    """A pool server does not serve."""


class ServerProcess:
    """A place for a server's process, over all its incarnations."""

    def __init__(
        self,
        plan: PoolPlan,
        index: int,
        log_path: Path,
        leftovers: Leftovers,
        interpreter: Interpreter | None = None,
    ) -> None:
        self._plan = plan
        self._interpreter = interpreter or this_interpreter()
        self._environment = {**self._interpreter.environment(), **_ENV}
        self._name = f"aseer-{os.getpid()}-{secrets.token_hex(3)}-{index}"
        self._memory = SHARED_MEMORY / f"{SHM_PREFIX}{self._name}"
        self._disk_dir = (
            Path(plan.disk_dir).resolve() / self._name if plan.disk_dir else None
        )
        self._leftovers = leftovers
        self._answer_timeout_s = _ANSWER_TIMEOUTS * plan.timeout_s
        self.log_path = log_path
        self._process: Child | None = None
        self._is_up = False
        self.is_expected = False
        """Whether it serves, or is about to for the first time."""
        self._up_since = 0.0
        self._to_free = FreeQueue()
        self._to_prefetch: deque[Prefetch] = deque(maxlen=_MAX_PREFETCHES)
        self._to_pull: list[Pull] = []
        self._pulls: dict[int, asyncio.Future[Pulled]] = {}
        self.peers: PeerSpec | None = None
        """How it talks to servers of other nodes; for those that start from now on."""
        self.address = ""
        """Where they find it; "" = nowhere."""
        self._drop_below: int | None = None
        self._clear_dram = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self.port = _free_port()
        self.counts = self.past = PoolCounts()
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """None while it does not serve."""
        return self._process.pid if self._process and self._is_up else None

    def free(self, what: Free) -> None:
        """With the next poll."""
        if self._is_up:
            self._to_free.add(what)

    def prefetch(self, what: Prefetch) -> None:
        """With the next poll; of many those that were asked for last."""
        if self._is_up:
            self._to_prefetch.append(what)

    def pull(self, order: Pull) -> asyncio.Future[Pulled]:
        """Take KV from another server, now."""
        done: asyncio.Future[Pulled] = asyncio.get_running_loop().create_future()
        if self._is_up:
            self._pulls[order.pull] = done
            self._to_pull.append(order)
            self._wake.set()
        else:
            done.set_result(Pulled(order.pull, error="the server there is down"))
        return done

    def drop_below_soon(self, version: int) -> None:
        """With the next poll, which is now."""
        if self._is_up:
            self._drop_below = max(version, self._drop_below or 0)
            self._wake.set()

    async def drop_below(self, version: int) -> None:
        """Now."""
        self.drop_below_soon(version)
        await self._done()

    async def clear_dram(self) -> None:
        """Now."""
        self._clear_dram = True
        await self._done()

    async def _done(self) -> None:
        """Wait until what is wanted was answered, or the server is down."""
        self._wake.set()
        while self._is_up and (self._clear_dram or self._drop_below is not None):
            self._idle.clear()
            await self._idle.wait()

    async def try_to_start(self) -> None:
        """Start a process and wait until it serves; if it does not, say so."""
        try:
            await self._start()
        except (PoolServerError, OSError) as error:
            _log.warning("the KV pool's server did not start: %s", error)
            await self._bury()

    async def keep_up(self) -> None:
        """Poll the process; start it again whenever it is down."""
        pause_s = _FIRST_PAUSE_S
        while True:
            if not self._is_up:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                await self.try_to_start()
                self.num_restarts += self._is_up
                continue
            interval_s = _PULL_INTERVAL_S if self._pulls else _POLL_INTERVAL_S
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._poll()
            except (PoolServerError, OSError) as error:
                _log.warning("the KV pool's server is lost: %s", error)
                await self._bury()
                if time.monotonic() - self._up_since > _LONGEST_PAUSE_S:
                    pause_s = _FIRST_PAUSE_S

    async def end(self, grace_s: float) -> None:
        """Give it `grace_s` to exit, then kill it; either way nothing of it remains."""
        process = self._process
        if process is not None and process.returncode is None and grace_s > 0:
            process.terminate()
            await process.end(grace_s)
        await self._bury()

    async def _start(self) -> None:
        disk_dir = self._disk_dir
        spec = ServerSpec(
            args=server_args(self._plan, self.port, self._name, disk_dir or Path()),
            shm_name=self._name,
            disk_dir=str(disk_dir) if disk_dir else None,
            peers=self.peers,
        )
        self._leftovers.add(self._memory)
        if disk_dir is not None:
            self._leftovers.add(disk_dir)
        self._process = process = await Child.start(
            self._interpreter.command(*MODULE),
            self._environment,
            self.log_path,
            self._leftovers,
            answers=True,
        )
        self._tell(spec)
        self.counts = await self._hear(self._plan.start_timeout_s)
        self._is_up = self.is_expected = True
        self._up_since = time.monotonic()
        _log.info("the KV pool's server is up (pid %d)", process.pid)

    async def _poll(self) -> None:
        poll = Poll(
            free=self._to_free.take(),
            prefetch=list(self._to_prefetch),
            pull=self._to_pull,
            drop_below=self._drop_below,
            clear_dram=self._clear_dram,
        )
        self._to_prefetch.clear()
        self._to_pull = []
        self._clear_dram = False
        self._tell(poll)
        self.counts = await self._hear(self._answer_timeout_s)
        if poll.drop_below == self._drop_below:
            self._drop_below = None
        self._idle.set()

    def _tell(self, message: ServerSpec | Poll) -> None:
        """Write a line.

        Raises:
            OSError: nobody reads it.
        """
        assert self._process is not None
        self._process.tell(msgspec.json.encode(message) + b"\n")

    async def _hear(self, timeout_s: float) -> PoolCounts:
        """The next answer.

        Raises:
            PoolServerError: there is none.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with waking_timeout(timeout_s):
                while line := await self._process.stdout.readline():
                    message = FROM_SERVER.decode(line)
                    if isinstance(message, PoolCounts):
                        return message
                    if isinstance(message, Pulled):
                        self._pulls_over(message)
                    else:
                        self.address = message.address
        except TimeoutError:
            raise PoolServerError(f"no answer within {timeout_s:g} s") from None
        except (ValueError, msgspec.MsgspecError) as error:  # of a line without an end
            raise PoolServerError(f"it gave no answer but this: {error}") from None
        tail = self._process.log.tail(_LOG_TAIL_LINES)
        raise PoolServerError(f"it exited; its log ends with:\n{tail}")

    def _pulls_over(self, *pulled: Pulled) -> None:
        for each in pulled:
            done = self._pulls.pop(each.pull, None)
            if done is not None and not done.done():
                done.set_result(each)

    async def _bury(self) -> None:
        """Nothing of the process remains; whoever waits for it does so in vain.

        If it is cancelled, it may be called again.
        """
        self._is_up = self.is_expected = False
        self._to_free.clear()
        self._to_prefetch.clear()
        self._to_pull.clear()
        self._pulls_over(*(Pulled(p, error="the server is lost") for p in self._pulls))
        self.address = ""
        self._drop_below = None
        self._clear_dram = False
        self._idle.set()  # at once: to remove a large directory takes its time
        process = self._process
        if process is not None:
            await process.end()
            self._process = None
        with suppress(OSError):
            self._memory.unlink(missing_ok=True)
        if self._disk_dir is not None:
            await in_thread(shutil.rmtree, self._disk_dir, ignore_errors=True)
        self.past = sum_counts(self.past, ended_counts(self.counts))
        self.counts = PoolCounts()


def sum_counts(a: PoolCounts, b: PoolCounts) -> PoolCounts:
    """Of two servers, or of two lives of one."""
    names = set(PoolCounts.__struct_fields__) - {"per_chunk"}
    sums = {name: getattr(a, name) + getattr(b, name) for name in names}
    return PoolCounts(per_chunk=max(a.per_chunk, b.per_chunk), **sums)


def ended_counts(counts: PoolCounts) -> PoolCounts:
    """What is left of them once a server is gone, with all that it held."""
    return msgspec.structs.replace(counts, resident=0, capacity=0, disk_resident=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
