"""A TCP proxy between two ends on this machine, which can be cut, or slowed down."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Proxy:
    """Carries bytes to `port` on this machine; make it with `proxy_to`."""

    def __init__(self, port: int, tasks: asyncio.TaskGroup) -> None:
        self._port = port
        self._tasks = tasks
        self._streams: set[asyncio.StreamWriter] = set()
        self._carriers: set[asyncio.Task[None]] = set()
        self._goes = asyncio.Event()
        self._goes.set()
        self._bytes_per_s = math.inf
        self.endpoint = ""
        self.num_connections = 0

    def reset(self) -> None:
        """End all connections; both ends notice, and new ones are taken."""
        for stream in self._streams:
            stream.transport.abort()

    def cut(self) -> None:
        """Bytes get stuck on their way, and nobody is told, until `heal`."""
        self._goes.clear()

    def slow_down(self, bytes_per_s: float) -> None:
        """No more than that come through in each direction, until `heal`."""
        self._bytes_per_s = bytes_per_s

    def heal(self) -> None:
        """Bytes come through again; after a cut, over new connections only."""
        if not self._goes.is_set():
            self.reset()
        self._goes.set()
        self._bytes_per_s = math.inf

    def close(self) -> None:
        self.reset()
        for carrier in self._carriers:
            carrier.cancel()

    async def take(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.num_connections += 1
        self._streams.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        self._streams.add(back)
        for source, target in ((reader, back), (there, writer)):
            carrier = self._tasks.create_task(self._carry(source, target))
            self._carriers.add(carrier)
            carrier.add_done_callback(self._carriers.discard)

    async def _carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._goes.wait()
                await asyncio.sleep(len(data) / self._bytes_per_s)
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.transport.abort()
            self._streams.discard(target)


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[Proxy]:
    async with asyncio.TaskGroup() as tasks:
        proxy = Proxy(port, tasks)
        server = await asyncio.start_server(proxy.take, "127.0.0.1", 0)
        proxy.endpoint = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield proxy
        finally:
            server.close()
            proxy.close()
            await asyncio.sleep(0)
