"""The KV pool of a node: its servers, kept up, and what is to be freed in them.

A pool is never needed: whatever happens to a server costs recomputation. One that
exits, or gives no answer in time, is killed and started again, at the same port, after
a pause that doubles while servers are lost in quick succession; its engines find it
there by themselves. An engine that starts while its server is down runs without a pool
until it is started again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.errors import AseerError
from aseer.instance.cleanup import SHARED_MEMORY, kill_group
from aseer.instance.launch import free_memory_bytes
from aseer.kv.messages import Counts, Free, Poll, ServerSpec
from aseer.kv.settings import (
    QUIET_LMCACHE,
    SHM_PREFIX,
    Memory,
    cache_salt,
    plan_pool,
    server_args,
    transfer_config,
)

if TYPE_CHECKING:
    from aseer.config import EngineConfig
    from aseer.instance.launch import Launch
    from aseer.kv.settings import PoolPlan
    from aseer.types import InstanceInfo

_log = logging.getLogger("aseer")

COMMAND = (sys.executable, "-m", "aseer.kv.server")
_POLL_INTERVAL_S = 0.5
_ANSWER_TIMEOUTS = 2  # of the pool's `timeout_s`, until a server is taken for dead
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 8.0
_LOG_TAIL_LINES = 5
_ENV = {"OMP_NUM_THREADS": "1", **QUIET_LMCACHE}


class PoolServerError(AseerError):
    """A pool server does not serve."""


class KvPool:
    """The pool servers of a node."""

    def __init__(
        self, plan: PoolPlan, config: EngineConfig, num_instances: int, log_dir: Path
    ) -> None:
        """Prepare; nothing is started yet."""
        self._plan = plan
        self._world_size = config.gpus_per_instance
        self._num_instances = num_instances
        self.namespace = secrets.token_hex(4)
        """Of the keys: KV of other runs is never found, even in a shared tier."""
        self._servers = [
            _Server(plan, i, config.start_timeout_s, log_dir / f"kv-pool-{i}.log")
            for i in range(plan.num_servers)
        ]

    @property
    def granularity(self) -> int:
        """Where chunks are to end, in tokens; a multiple of the engines' block size."""
        return self._plan.chunk_tokens

    @property
    def pids(self) -> list[int]:
        """Of the servers that are up."""
        return [s.pid for s in self._servers if s.pid is not None]

    @property
    def num_restarts(self) -> int:
        """Times a server was started again."""
        return sum(s.num_restarts for s in self._servers)

    @property
    def counts(self) -> Counts:
        """What the servers did, over all their lives, and hold, as last heard."""
        total = Counts()
        for server in self._servers:
            total = _sum(total, _sum(server.past, server.counts))
        return total

    async def start(self) -> None:
        """Start the servers and wait until each serves, or failed to.

        One that failed is tried again while the engines run.
        """
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.try_to_start())

    async def supervise(self) -> None:
        """Ask after the servers, and start dead ones again, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.keep_up())

    async def stop(self, grace_s: float) -> None:
        """End the servers: SIGTERM, after `grace_s` SIGKILL. May be called again."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.end(grace_s))

    def server_of(self, instance_id: int) -> int:
        """Index of an instance's server; instances of one find each other's KV."""
        return instance_id * len(self._servers) // self._num_instances

    def engine_args(self, instance_id: int) -> dict[str, Any]:
        """What an engine that starts now is told; nothing if its server is down."""
        if not self._servers:
            return {}  # the user's own connector
        server = self._servers[self.server_of(instance_id)]
        if server.pid is None:
            _log.warning("instance %d starts without the KV pool", instance_id)
            return {}
        return {"kv_transfer_config": transfer_config(self._plan, server.port)}

    def free(
        self, info: InstanceInfo, weight_version: int, tokens: bytes, start: int
    ) -> None:
        """Nobody will ask for the KV of these tokens again, from `start` on.

        Args:
            info: of any engine of the pool's.
            tokens: int32; a prompt, or a prompt and what was generated.
        """
        salt = cache_salt(self.namespace, info, weight_version)
        what = Free(info.model, self._world_size, salt, tokens, start)
        for server in self._servers:
            server.free(what)

    async def clear_dram(self) -> None:
        """Drop from DRAM whatever is not being read or written; the disk keeps it."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.clear_dram())

    async def drop_older(self, version: int) -> None:
        """Free all KV of weight versions below `version`, and wait until it is gone.

        It cannot be found any more in any case: the version is in every key. What a
        server is just reading or writing goes some polls later; a server that does not
        answer is killed, and what it holds goes with it.
        """
        async with asyncio.TaskGroup() as tasks:
            for server in self._servers:
                tasks.create_task(server.drop_below(version))


class _Server:
    """A place for a server's process, over all its incarnations."""

    def __init__(
        self, plan: PoolPlan, index: int, start_timeout_s: float, log_path: Path
    ) -> None:
        self._plan = plan
        self._name = f"aseer-{os.getpid()}-{secrets.token_hex(3)}-{index}"
        self._start_timeout_s = start_timeout_s
        self._answer_timeout_s = _ANSWER_TIMEOUTS * plan.timeout_s
        self._log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        self._is_up = False
        self._up_since = 0.0
        self._to_free: list[Free] = []
        self._drop_below: int | None = None
        self._clear_dram = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self.port = _free_port()
        self.counts = self.past = Counts()
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """None while it does not serve."""
        return self._process.pid if self._process and self._is_up else None

    def free(self, what: Free) -> None:
        """With the next poll."""
        if self._is_up:
            self._to_free.append(what)

    async def drop_below(self, version: int) -> None:
        """Now."""
        self._drop_below = max(version, self._drop_below or 0)
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
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_INTERVAL_S):
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
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await process.wait()
        await self._bury()

    async def _start(self) -> None:
        plan = self._plan
        disk_dir = plan.disk_dir and Path(plan.disk_dir) / self._name
        spec = ServerSpec(
            args=server_args(plan, self.port, self._name, disk_dir or Path()),
            shm_name=self._name,
            disk_dir=str(disk_dir) if disk_dir else None,
        )
        with self._log_path.open("ab") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **_ENV},
                start_new_session=True,
            )
        self._tell(spec)
        self.counts = await self._hear(self._start_timeout_s)
        self._is_up = True
        self._up_since = time.monotonic()
        _log.info("the KV pool's server is up (pid %d)", process.pid)

    async def _poll(self) -> None:
        poll = Poll(
            free=self._to_free,
            drop_below=self._drop_below,
            clear_dram=self._clear_dram,
        )
        self._to_free = []
        self._clear_dram = False
        self._tell(poll)
        self.counts = await self._hear(self._answer_timeout_s)
        if poll.drop_below == self._drop_below:
            self._drop_below = None
        self._idle.set()

    def _tell(self, message: ServerSpec | Poll) -> None:
        """Write a line.

        Raises:
            PoolServerError: nobody reads it.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
        except (OSError, RuntimeError) as error:  # uvloop's, for a pipe that is closed
            raise PoolServerError(f"it takes no messages: {error}") from None

    async def _hear(self, timeout_s: float) -> Counts:
        """The next answer.

        Raises:
            PoolServerError: there is none.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise PoolServerError(f"no answer within {timeout_s:g} s") from None
        if not line:
            raise PoolServerError(f"it exited; its log ends with:\n{self._log_tail()}")
        return msgspec.json.decode(line, type=Counts)

    async def _bury(self) -> None:
        """Nothing of the process remains; whoever waits for it does so in vain.

        If it is cancelled, it may be called again.
        """
        self._is_up = False
        process = self._process
        if process is not None:
            await asyncio.to_thread(kill_group, process.pid)
            await process.wait()
            assert process.stdin is not None
            process.stdin.close()
            with suppress(OSError, RuntimeError):
                await process.stdin.wait_closed()
            self._process = None
        (SHARED_MEMORY / f"{SHM_PREFIX}{self._name}").unlink(missing_ok=True)
        if self._plan.disk_dir is not None:
            directory = Path(self._plan.disk_dir) / self._name
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        held = {"resident": 0, "capacity": 0, "disk_resident": 0}
        self.past = msgspec.structs.replace(_sum(self.past, self.counts), **held)
        self.counts = Counts()
        self._to_free = []
        self._drop_below = None
        self._clear_dram = False
        self._idle.set()

    def _log_tail(self) -> str:
        with suppress(OSError):
            lines = self._log_path.read_text(errors="replace").splitlines()
            return "\n".join(lines[-_LOG_TAIL_LINES:])
        return ""


def plan_kv_pool(config: EngineConfig, launches: list[Launch]) -> PoolPlan | None:
    """The pool that an engine has; None, and a line in the log that says why, if none.

    Raises:
        ConfigError: one was asked for that cannot be had.
    """
    if launches[0].backend != "vllm":
        return None
    plan, why = plan_pool(
        config,
        len(launches),
        launches[0].engine_args.get("block_size"),
        _memory(),
        on_cpu="VLLM_CPU_OMP_THREADS_BIND" in launches[0].env,
        is_installed=importlib.util.find_spec("lmcache") is not None,
    )
    if plan is None:
        _log.info("no KV pool: %s", why)
        return None
    if not plan.num_servers:
        _log.info("KV pool: %s", why)
        return plan
    disk = f" and {plan.disk_bytes / 1e9:.2f} GB of disk" if plan.disk_dir else ""
    _log.info("KV pool: %d server(s) with %s%s each", plan.num_servers, why, disk)
    return plan


def _memory() -> Memory:
    return Memory(
        free_bytes=free_memory_bytes(),
        shm_free_bytes=shutil.disk_usage(SHARED_MEMORY).free,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _sum(a: Counts, b: Counts) -> Counts:
    names = set(Counts.__struct_fields__) - {"per_chunk"}
    sums = {name: getattr(a, name) + getattr(b, name) for name in names}
    return Counts(per_chunk=max(a.per_chunk, b.per_chunk), **sums)
