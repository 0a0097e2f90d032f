"""Every change that aseer makes to LMCache's classes, and why.

Each is a row of `PATCHES`; `apply` makes and logs those of a process. What is changed
of one object only, an engine's adapter and its transfers, is in `guard.py` and
`connector.py`, which say why.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any, Literal

from aseer.compat.patching import Patch, apply_patches
from aseer.errors import AseerError

_log = logging.getLogger("aseer.kv")


class PickleRefused(AseerError):
    """A pickle asked for something to be imported or called."""


def apply(process: Literal["server", "engine"]) -> list[str]:
    """Apply and log the patches of a pool's server, or of an engine's processes.

    They cannot be undone: a server's are for its own process only.

    Returns:
        The names of those that changed something.
    """
    return apply_patches(PATCHES, process, _log)


def discard_unfilled_memory() -> bool:
    """Have LMCache discard, not publish, what a forgotten worker had reserved."""
    from lmcache.v1.distributed.storage_manager import _L1_WRITE_TAG
    from lmcache.v1.multiprocess.modules.engine_driven_transfer import (
        EngineDrivenTransferModule,
    )

    upstream = EngineDrivenTransferModule._release_entry

    def release(self: Any, instance_id: int, entry: Any) -> None:
        with self._pending_shm_lock:
            pending = self._pending_shm_writes
            mine = [pending.pop(k) for k in list(pending) if k[0] == instance_id]
        for keys in mine:
            for manager in self._ctx.storage_manager._l1_managers_by_id.values():
                manager.finish_write_and_delete(keys, tag=_L1_WRITE_TAG)
        upstream(self, instance_id, entry)

    EngineDrivenTransferModule._release_entry = release
    return True


def check_what_the_disk_gives() -> bool:
    """Have LMCache check what it reads back from the disk by its checksum."""
    from lmcache.v1.distributed.l2_adapters import native_connector_l2_adapter

    from aseer.kv.disk import CheckedAdapter

    native_connector_l2_adapter.NativeConnectorL2Adapter = CheckedAdapter
    return True


def refuse_pickles_in_server() -> bool:
    """Refuse KV as pickles, and in this whole process any pickle that names a thing."""
    # Neither process imports the other's part of LMCache.
    from lmcache.v1.multiprocess.custom_types import PrepareRetrieveResponse
    from lmcache.v1.multiprocess.modules.server_transfer import PickleTransferStrategy

    was_said = threading.Event()

    def refuse_store(self: Any, **store: Any) -> bool:
        del self, store
        if not was_said.is_set():  # whoever sends one can send many
            was_said.set()
            _log.warning("refused KV that was sent as a pickle, and will any other")
        return False

    def refuse_load(self: Any, **load: Any) -> Any:
        del self, load
        return PrepareRetrieveResponse(success=False, data=b"", context={})

    PickleTransferStrategy.commit_store = refuse_store
    PickleTransferStrategy.prepare_retrieve = refuse_load
    sys.addaudithook(_refuse)
    return True


def refuse_pickles_in_engine() -> bool:
    """Neither send KV as pickles nor take it."""
    from lmcache.v1.multiprocess.transfer_context.pickle import (
        EngineDrivenContextPickle,
    )

    EngineDrivenContextPickle.commit_store = lambda *_: False
    EngineDrivenContextPickle.prepare_retrieve = lambda *_: None
    return True


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        module, name = args
        raise PickleRefused(f"a pickle asks for {module}.{name}; none is loaded here")


PATCHES = (
    Patch(
        refuse_pickles_in_server,
        "server",
        "LMCache's server loads a pickle from any user of the machine who reaches its "
        "port; loading one runs what it names",
        "0.5.6",
    ),
    Patch(
        discard_unfilled_memory,
        "server",
        "memory that a worker reserved for a store and never filled is published under "
        "its keys when the worker is forgotten, and other engines read it",
        "0.5.6",
    ),
    Patch(
        check_what_the_disk_gives,
        "server",
        "bytes that changed on the disk are taken for KV",
        "0.5.6",
    ),
    Patch(
        refuse_pickles_in_engine,
        "engine",
        "an engine loads KV as a pickle from whoever listens where its server was",
        "0.5.6",
    ),
)
