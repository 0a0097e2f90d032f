"""Whole engines without processes and sockets, each on its thread.

The instances are those of `tests.unit.runtime.machine`; what a test does to them it
does on the engine's thread (`Sim.do`).
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aseer
from tests.unit.runtime.machine import Machine, quick

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import pytest

    from aseer.transport.memory import MemoryRouter

# What a test waits for comes at once, or never.
SOON_S = 10.0


class Sim:
    """Engines' machine; one engine at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        quick(monkeypatch)
        self.machine: Machine
        self.prepare: Callable[[Machine], None] = lambda machine: None
        self.is_up = threading.Event()
        monkeypatch.setattr("aseer.runtime.serving.bind_router", self._router)
        monkeypatch.setattr("aseer.node.local.InstanceProcess.start", self._start)

    @asynccontextmanager
    async def _router(self, *where: object) -> AsyncIterator[MemoryRouter[Any]]:
        async with asyncio.TaskGroup() as tasks:
            self.machine = machine = Machine(tasks)
            self.prepare(machine)
            self.is_up.set()
            yield machine.router
            for process in machine.processes.values():
                process.kill()

    async def _start(self, *args: Any) -> Any:
        return await self.machine.start(*args)

    def engine(self, *, engine_args: dict[str, Any] | None = None, **settings: Any):
        """Two instances that report at once."""
        defaults: dict[str, Any] = {
            "model": "sim",
            "device": "sim",
            "num_instances": 2,
            "chunk_size": 16,
            "report_interval_s": 0.005,
            "shutdown_timeout_s": 5.0,
        }
        args = {"num_kv_blocks": 256, "step_s": 0.0, **(engine_args or {})}
        return aseer.Engine(aseer.EngineConfig(**defaults | settings, engine_args=args))

    def do(self, engine: aseer.Engine, what: Callable[[], object]) -> Any:
        """Do something on the engine's thread, and wait for it."""

        async def done() -> Any:
            result = what()
            return await result if asyncio.iscoroutine(result) else result

        assert engine._opening._thread is not None
        return engine._opening._thread.submit(done).result(SOON_S)

    def kill(self, engine: aseer.Engine, identity: str) -> None:
        self.do(engine, lambda: self.machine.processes[identity].kill())

    def until_asked(self, engine: aseer.Engine, identity: str, what: str) -> None:
        self.do(engine, lambda: self.machine.until_asked(identity, what))


def groups_of(num: int, n: int = 2, **sampling: Any) -> list[aseer.Group]:
    settings = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True} | sampling
    return [
        aseer.Group([5, 6, 7 + i], n=n, sampling=settings, group_id=f"g{i}")
        for i in range(num)
    ]


#: Groups that run until they are ended.
ENDLESS = {"max_tokens": 4000}
