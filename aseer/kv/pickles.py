"""No pickle from a socket is ever loaded, in the pool's server or in an engine.

Loading a pickle runs what it names. LMCache (0.5.6) sends KV as pickles where shared
memory cannot be used, and its server takes one from any local user who reaches its
port, in either mode. An engine would take one from whoever listens there after its
server died. Both refuse here: a store fails, a load finds nothing, and the engine
computes anew.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

from aseer.errors import AseerError

_log = logging.getLogger("aseer.kv")


class PickleRefused(AseerError):
    """A pickle asked for something to be imported or called."""


def refuse_in_server() -> None:
    """Refuse KV as pickles, and in all of this process any pickle that names a thing.

    For the server's own process only: what it does cannot be undone.
    """
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


def refuse_in_engine() -> None:
    """Neither send KV as pickles nor take it."""
    from lmcache.v1.multiprocess.transfer_context.pickle import (
        EngineDrivenContextPickle,
    )

    EngineDrivenContextPickle.commit_store = lambda *_: False
    EngineDrivenContextPickle.prepare_retrieve = lambda *_: None


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        module, name = args
        raise PickleRefused(f"a pickle asks for {module}.{name}; none is loaded here")
