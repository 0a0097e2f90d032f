"""What of a pool server gives KV to those of other nodes, and takes theirs.

It has a thread and a loop of its own: what engines of this node store and load does not
wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING

from aseer.errors import describe
from aseer.kv.links import MAX_PULLS
from aseer.kv.peers import FROM_TARGET, MAX_QUEUED, Source, connect_to, pull
from aseer.transport.tcp import bind_tcp

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.kv.messages import PeerSpec, Pull, Pulled
    from aseer.kv.peers import Store

_log = logging.getLogger("aseer.kv")


class Exchange:
    """Gives and takes while its `run` does, which is on one loop to its end."""

    def __init__(
        self,
        spec: PeerSpec,
        store: Store,
        tokens_each: int,
        tell: Callable[[Pulled], None],
    ) -> None:
        """Neither listen nor take anything yet.

        Args:
            tokens_each: of a piece.
            tell: is told on the loop's thread how each pull ended.
        """
        self._spec = spec
        self._store = store
        self._tokens_each = tokens_each
        self._tell = tell
        self._loop: asyncio.AbstractEventLoop
        self._turns: asyncio.Semaphore
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_ready = threading.Event()
        self.address = ""
        """Where others find it; "" = nowhere."""

    def start(self) -> None:
        """Run in a thread of its own, and return once it listens, or cannot.

        The thread ends with the process.
        """
        run = partial(asyncio.run, self.run())
        threading.Thread(target=run, name="exchange", daemon=True).start()
        self._is_ready.wait()

    def pull(self, order: Pull) -> None:
        """Begin to take; from any thread, once it is started."""
        self._loop.call_soon_threadsafe(self._begin, order)

    def _begin(self, order: Pull) -> None:
        task = self._loop.create_task(self._pull(order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pull(self, order: Pull) -> None:
        connect = partial(connect_to, self._spec.keys)
        done = await pull(self._store, order, connect, self._turns, self._tokens_each)
        if done.error:
            _log.warning("KV was not pulled from %s: %s", order.source, done.error)
        self._tell(done)

    async def run(self) -> None:
        """Give to whoever asks, and take what is ordered, until cancelled.

        Where it cannot listen it only takes, and the log says why.
        """
        self._loop = asyncio.get_running_loop()
        # Others wait their turn, within their own time.
        self._turns = asyncio.Semaphore(MAX_PULLS)
        try:
            async with bind_tcp(
                self._spec.bind, FROM_TARGET, self._spec.keys, max_queued=MAX_QUEUED
            ) as router:
                self.address = router.endpoint
                self._is_ready.set()
                await Source(self._store, router).run()
        except Exception as error:
            _log.exception("this server gives no KV to others: %s", describe(error))
        self._is_ready.set()
        await asyncio.Event().wait()  # it takes theirs all the same
