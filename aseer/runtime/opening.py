"""An engine's thread and host, from its opening to its end."""

from __future__ import annotations

import asyncio
import atexit
import weakref
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from aseer.errors import EngineClosedError, EngineError
from aseer.node.children import LONGEST_DEATH_S
from aseer.runtime.loop_thread import LoopThread
from aseer.runtime.serving import Folders, serve

if TYPE_CHECKING:
    from aseer.config import EngineConfig
    from aseer.node.machine import Launch
    from aseer.runtime.host import Host
    from aseer.runtime.serving import Listening

# What a thread needs to end beyond the two deadlines of its instances: instances and
# then pool servers that cannot be killed are waited for, and files are removed.
_JOIN_MARGIN_S = 2 * LONGEST_DEATH_S + 30.0


class Opening:
    """Opens an engine and closes it, again and again; from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        launches: list[Launch],
        listening: Listening = nullcontext,
    ) -> None:
        """`listening` gives the nodes of other hosts, if any may join."""
        self._config = config
        self._listening = listening
        self._launches = launches
        self._thread: LoopThread | None = None
        self._started: Future[Host] = Future()
        self._at_exit = partial(_close_at_exit, weakref.ref(self))

    def begin(self) -> Future[Host]:
        """Start the thread; the future has the host once every instance is up.

        Raises:
            EngineError: the engine is open already, or no thread can be had.
            ConfigError: `log_dir` cannot be used.
        """
        if self._thread is not None:
            if not self._thread.is_here:
                raise self._thread.closed_error()
            raise EngineError("the engine is open already")
        folders = Folders.make(self._config)
        thread = LoopThread("aseer-engine")
        started: Future[Host] = Future()
        started.set_running_or_notify_cancel()  # whoever waits cannot cancel the start
        self._started = started
        args = (self._config, self._launches, folders, thread, started)
        try:
            thread.start(partial(serve, *args, listening=self._listening))
        except EngineError:
            folders.leftovers.remove()
            raise
        self._thread = thread
        atexit.register(self._at_exit)
        return started

    def current(self) -> tuple[LoopThread, Host]:
        """The thread and the host of the engine that is open.

        Raises:
            EngineClosedError: the engine is not open.
            EngineError: the engine has failed; with the cause.
        """
        thread, started = self._thread, self._started
        if thread is not None and not thread.is_here:
            raise thread.closed_error()
        if thread is None or not started.done() or started.exception() is not None:
            raise EngineClosedError(
                "the engine is not open; use it as a context manager, such as "
                "`async with aseer.Engine(config) as engine:`"
            )
        if thread.ended.is_set():
            raise thread.closed_error()
        return thread, started.result()

    async def aclose(self) -> None:
        """End every process of the engine and wait for it. May be called again."""
        thread = self._thread
        if thread is not None:
            thread.request_stop()
            # The end has its own deadline; being cancelled must not leave it half done.
            closing = asyncio.get_running_loop().run_in_executor(None, self.close)
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                await closing
                raise

    def close(self) -> None:
        """End every process of the engine and wait for it. May be called again.

        Raises:
            EngineError: the engine did not end in time.
        """
        thread = self._thread
        if thread is None:
            return
        thread.request_stop()
        deadline_s = 2 * self._config.shutdown_timeout_s + _JOIN_MARGIN_S
        if not thread.join(deadline_s):
            raise EngineError(f"the engine's thread did not end in {deadline_s:g} s")
        self._thread = None
        atexit.unregister(self._at_exit)


def _close_at_exit(reference: weakref.ref[Opening]) -> None:
    opening = reference()
    if opening is not None:
        opening.close()
