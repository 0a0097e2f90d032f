"""A pool server's process: LMCache's multi-process server, and a lifeline to the
controller.

Started by the controller as `python -m aseer.kv.server` with a `ServerSpec` on standard
input, which stays open: polls follow, and its end means that the server is to go, or
that the controller is gone, however it died. Its memory and its disk directory go with
it.

Beyond what LMCache does, what nobody will ask for again is freed at once, by tokens or
by weight version. What is changed of LMCache itself is in `aseer/kv/patches.py`.

What will be asked for soon is loaded from the disk by LMCache's own prefetch.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
from array import array
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from lmcache.v1.distributed.api import Tier
from lmcache.v1.distributed.config import (
    add_storage_manager_args,
    parse_args_to_config,
)
from lmcache.v1.distributed.internal_api import L1ManagerListener, L2AdapterListener
from lmcache.v1.mp_observability.config import (
    add_observability_args,
    parse_args_to_observability_config,
)
from lmcache.v1.multiprocess.cache_control.errors import CacheControlError, NotFound
from lmcache.v1.multiprocess.cache_control.key_resolver import resolve_object_keys
from lmcache.v1.multiprocess.cache_control.prefetch_service import PrefetchService
from lmcache.v1.multiprocess.config import (
    add_mp_server_args,
    add_p2p_args,
    parse_args_to_mp_server_config,
)
from lmcache.v1.multiprocess.server import run_cache_server

from aseer.kv import patches
from aseer.kv.exchange import Exchange
from aseer.kv.ledger import Ledger
from aseer.kv.lending import L1Store
from aseer.kv.messages import (
    Free,
    FromServer,
    Poll,
    PoolCounts,
    Prefetch,
    Pull,
    Pulled,
    ServerSpec,
    Serves,
)
from aseer.kv.prefetches import Prefetches
from aseer.kv.settings import SHM_PREFIX, WATERMARK
from aseer.node.leftovers import hold
from aseer.node.lifeline import Lifeline, end_group, watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.kv.peers import Want

_log = logging.getLogger("aseer.kv")

_FREE_ROUNDS = 8  # polls; what is being read, or written to disk, cannot go yet


class _Listener(Ledger, L1ManagerListener, L2AdapterListener):  # type: ignore[misc]  # untyped
    """The ledger, told by LMCache's threads; these calls change nothing in it."""

    def on_l1_keys_reserved_read(self, keys: list[Any]) -> None: ...
    def on_l1_keys_read_finished(self, keys: list[Any]) -> None: ...
    def on_l1_keys_reserved_write(self, keys: list[Any]) -> None: ...
    def on_l1_keys_accessed(self, keys: list[Any]) -> None: ...
    def on_l2_keys_accessed(self, keys: list[Any]) -> None: ...


class PoolServer:
    """LMCache's server in this process, and what is asked of it."""

    def __init__(
        self, spec: ServerSpec, tell: Callable[[FromServer], None] = lambda _: None
    ) -> None:
        """Serve from now on.

        Args:
            tell: is told where others find this server, and how pulls ended.
        """
        patches.apply("server")
        parser = argparse.ArgumentParser()
        for add in (add_mp_server_args, add_p2p_args, add_storage_manager_args):
            add(parser)
        add_observability_args(parser)
        args = parser.parse_args(spec.args)
        started = run_cache_server(
            mp_config=parse_args_to_mp_server_config(args),
            storage_manager_config=parse_args_to_config(args),
            obs_config=parse_args_to_observability_config(args),
            return_engine=True,
            start_prometheus_http_server=False,
        )
        assert started is not None
        self._requests, self._engine = started
        self._storage = self._engine.storage_manager
        self._managers = list(self._storage._l1_managers_by_id.values())
        self._ledger = _Listener()
        for manager in self._managers:
            manager.register_listener(self._ledger)
        self._storage.register_l2_listener(self._ledger)
        self._to_free: dict[Any, int] = {}
        self._prefetcher = PrefetchService(self._engine)
        self._prefetches = Prefetches()
        self._num_prefetched = 0
        self._tell = tell
        self._exchange: Exchange | None = None
        if spec.peers is not None:
            context = self._engine.context
            store = L1Store(
                self._managers[0],
                context.layout_desc_registry,
                self._keys_of,
                self._ledger.in_dram,
                self._ledger.pulling,
            )
            self._exchange = Exchange(spec.peers, store, context.chunk_size, tell)
            self._exchange.start()
            tell(Serves(self._exchange.address))

    def counts(self) -> PoolCounts:
        """See `PoolCounts`."""
        size = capacity = 0
        for manager in self._managers:
            capacity += manager.get_memory_usage()[1]
            key = self._ledger.any_in_dram()
            state = manager.get_object_state(key) if key is not None else None
            size = max(size, state.memory_obj.get_size() if state else 0)
        counts = self._ledger.counts(capacity, size)
        prefetched = self._num_prefetched * counts.per_chunk
        return msgspec.structs.replace(counts, prefetched=prefetched)

    def answer(self, poll: Poll) -> PoolCounts:
        """Do what a poll asks for."""
        keys = set()
        if poll.drop_below is not None:
            keys |= self._ledger.older_than(poll.drop_below)
        for what in poll.free:
            with suppress(ValueError):  # LMCache takes no more than a million tokens
                keys.update(self._keys_of(what, what.start))
        self._to_free.update(dict.fromkeys(keys, _FREE_ROUNDS))
        self._free()
        self._prefetch(poll.prefetch)
        for order in poll.pull:
            if self._exchange is None:
                self._tell(Pulled(order.pull, error="it takes nothing from others"))
            else:
                self._exchange.pull(order)
        if poll.clear_dram:
            self._storage.clear()
        return self.counts()

    def _keys_of(
        self, what: Free | Prefetch | Pull | Want, start: int = 0
    ) -> list[Any]:
        """Of whole chunks that hold `start` or begin after it."""
        context = self._engine.context
        keys, num_chunks = resolve_object_keys(
            context.token_hasher,
            what.model,
            what.world_size,
            array("i", what.tokens).tolist(),
            what.salt,
        )
        first = start // context.chunk_size
        return [k for i, k in enumerate(keys) if i * num_chunks // len(keys) >= first]

    def _prefetch(self, wanted: list[Prefetch]) -> None:
        """Begin to load what is on disk only, and see what was loaded."""
        now = time.monotonic()
        self._num_prefetched += self._prefetches.settle(self._num_found, now)
        for what in wanted:
            if not self._prefetches.has_room:
                break
            with suppress(ValueError, CacheControlError):
                in_dram, on_disk = self._ledger.held(set(self._keys_of(what)))
                num_missing = len(set(on_disk) - set(in_dram))
                if 0 < num_missing <= self._num_room():
                    tokens = array("i", what.tokens).tolist()
                    job = self._prefetcher.submit(
                        what.model,
                        what.world_size,
                        tokens,
                        what.salt,
                        source_tier=Tier.L2,
                        target_tier=Tier.L1,
                    )
                    self._prefetches.begin(str(job["request_id"]), len(in_dram), now)

    def _num_found(self, job: str) -> int | None:
        try:
            found = self._prefetcher.status(job).get("found_keys")
        except NotFound as error:
            raise KeyError(job) from error
        return None if found is None else int(found)

    def _num_room(self) -> int:
        """Chunks that DRAM takes before it drops others, which are as much wanted."""
        sizes = [manager.get_memory_usage() for manager in self._managers]
        room = sum(int(WATERMARK * capacity) - used for used, capacity in sizes)
        num_chunks: int = room // max(1, self.counts().per_chunk)
        return num_chunks

    def _free(self) -> None:
        wanted = set(self._to_free)
        in_dram, on_disk = self._ledger.held(wanted)
        if in_dram:
            self._ledger.begin_freeing(in_dram)
            self._storage.delete_l1_keys(in_dram)
            self._ledger.end_freeing()
        if on_disk:
            for _, adapter in self._storage.l2_adapters():
                adapter.delete(on_disk)
        # Only what was locked is tried again: the rest may be stored anew meanwhile.
        locked, _ = self._ledger.held(wanted)
        self._to_free = {k: n for k in locked if (n := self._to_free[k] - 1)}


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what LMCache prints goes to the log
    lifeline = Lifeline.of_this_process()
    hold(Path(lifeline.run_dir))
    watch(lifeline, lambda: end_group(lifeline))
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=ServerSpec)
    signal.signal(signal.SIGTERM, lambda *_: _exit_now(spec))
    if spec.disk_dir is not None:
        Path(spec.disk_dir).mkdir(parents=True, exist_ok=True)
    # Bounded by the controller, which sends a line once the last was answered.
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(lines, lifeline), daemon=True)
    reader.start()
    lock = threading.Lock()

    def say(message: FromServer) -> None:
        with lock:
            _say(answers, message)

    server = PoolServer(spec, say)
    say(server.counts())
    while True:
        say(server.answer(msgspec.json.decode(lines.get(), type=Poll)))


def _read(lines: queue.SimpleQueue[bytes], lifeline: Lifeline) -> None:
    """Read standard input in a thread, so that its end is never missed."""
    while line := sys.stdin.buffer.readline():
        lines.put(line)
    end_group(lifeline)


def _say(answers: Any, message: FromServer) -> None:
    with suppress(BrokenPipeError):  # the lifeline's end comes with it
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()


def _exit_now(spec: ServerSpec) -> None:
    """Leave nothing behind, whatever the threads are doing."""
    Path(f"/dev/shm/{SHM_PREFIX}{spec.shm_name}").unlink(missing_ok=True)
    if spec.disk_dir is not None:
        shutil.rmtree(spec.disk_dir, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
