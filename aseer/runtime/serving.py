"""An engine's run on its thread, from its folders to its last process."""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aseer.dgds.server import make_draft_server
from aseer.errors import ConfigError, root_of
from aseer.instance.messages import FROM_INSTANCE
from aseer.kv.pool import KvPool, plan_kv_pool
from aseer.node.children import in_thread
from aseer.node.janitor import start_janitor
from aseer.node.leftovers import Leftovers, sweep
from aseer.runtime.host import Host
from aseer.runtime.metrics import metrics_of, note_url
from aseer.runtime.weights import weights_dir_of
from aseer.transport.zeromq import bind_router, make_socket_dir

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from aseer.config import EngineConfig
    from aseer.node.machine import Launch
    from aseer.runtime.cluster import Cluster
    from aseer.runtime.loop_thread import LoopThread

    Listening = Callable[[], AbstractAsyncContextManager[Cluster | None]]

_log = logging.getLogger("aseer")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where an engine keeps its sockets and logs, and weights and images for instances.

    Images are in a folder of `weights`.
    """

    leftovers: Leftovers
    logs: Path
    weights: Path

    @property
    def run(self) -> Path:
        return self.leftovers.run_dir

    @classmethod
    def make(cls, config: EngineConfig) -> Folders:
        """Make them, but that for weights, which the first update makes.

        Raises:
            ConfigError: `log_dir` cannot be used.
        """
        try:
            if config.log_dir is not None:
                config.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"log_dir cannot be used: {error}") from error
        sweep()
        run = make_socket_dir()
        weights = weights_dir_of(config, run)
        leftovers = Leftovers(run)
        leftovers.add(weights)
        return cls(leftovers, config.log_dir or run, weights)


async def serve(
    config: EngineConfig,
    launches: list[Launch],
    folders: Folders,
    thread: LoopThread,
    started: Future[Host],
    stop: asyncio.Event,
    listening: Listening = nullcontext,
) -> None:
    """Run an engine until `stop` is set; whatever happens, nothing of it remains.

    Args:
        thread: that this runs on.
        started: gets the host once every instance is up, or why none is.
        listening: gives the nodes of other hosts, if any may join.
    """
    try:
        if not launches:  # no process of ours outlives this one, to clean up
            await in_thread(start_janitor, folders.run)
        interpreter = launches[0].interpreter if launches else None
        pool_plan = plan_kv_pool(config, launches)
        kv_pool = None
        if pool_plan is not None:
            kv_pool = KvPool(
                pool_plan,
                len(launches),
                folders.logs,
                folders.leftovers,
                interpreter,
            )
        draft_server = make_draft_server(config, folders.run)
        endpoint = f"ipc://{folders.run}/ctrl"
        with draft_server or nullcontext():
            async with (
                bind_router(endpoint, FROM_INSTANCE) as router,
                listening() as cluster,
            ):
                host = Host(
                    config=config,
                    launches=launches,
                    folders=folders,
                    thread=thread,
                    router=router,
                    endpoint=endpoint,
                    interpreter=interpreter,
                    draft_server=draft_server,
                    kv_pool=kv_pool,
                    cluster=cluster,
                )
                with metrics_of(config.metrics_address, thread, host.figures) as url:
                    host.metrics_url = url
                    if url is not None and config.controller_file is not None:
                        note_url(config.controller_file, url)
                    await host.run(stop, started)
    except BaseException as error:
        if not started.done():
            started.set_exception(root_of(error))
        elif not isinstance(error, asyncio.CancelledError):
            _log.error("the engine failed", exc_info=error)
        raise
    finally:
        folders.leftovers.remove()
