"""Where an engine's nodes join it: an address, a key, and a file that says where."""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING

from aseer.errors import ConfigError
from aseer.node.network import reachable
from aseer.runtime.cluster import Cluster
from aseer.runtime.launcher import launcher_of
from aseer.transport.keys import find_keys, new_keys
from aseer.transport.sessions import FRAME
from aseer.transport.tcp import bind_tcp, check_key_is_there

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aseer.config import EngineConfig
    from aseer.models.traits import ModelTraits
    from aseer.runtime.serving import Listening
    from aseer.transport.keys import Keys


def listening(config: EngineConfig, traits: ModelTraits | None) -> Listening:
    """What gives an engine's nodes, while it is open.

    Raises:
        ConfigError: the address needs a key, the key cannot be used, or what is to
            start the nodes cannot.
    """
    launcher = launcher_of(config)
    if launcher is not None:
        address = config.listen or f"tcp://{launcher.host}:*"
    elif config.listen is not None:
        address = config.listen
    else:
        return nullcontext
    keys = find_keys(None if config.key_file is None else str(config.key_file))
    if launcher is not None:
        keys = keys or new_keys()
    check_key_is_there("listen", address, keys)
    return partial(_listen, config, address, traits, keys)


@asynccontextmanager
async def _listen(
    config: EngineConfig, address: str, traits: ModelTraits | None, keys: Keys | None
) -> AsyncIterator[Cluster]:
    """Listen for nodes; the file that tells them where goes at the end, and so do the
    nodes that were started.

    Raises:
        EngineError: the address cannot be had.
        ConfigError: the file cannot be written, or nodes cannot be started.
    """
    launcher = launcher_of(config)
    async with bind_tcp(address, FRAME, keys) as router:
        cluster = Cluster(config, traits, router, launcher, keys)
        path = config.controller_file
        if path is not None:
            _write(path, reachable(cluster.address))
        try:
            yield cluster
        finally:
            if path is not None:
                with suppress(OSError):
                    path.unlink()
            if launcher is not None:
                await launcher.close()


def _write(path: Path, address: str) -> None:
    """Put the file there as a whole: others may be looking for it."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps({"address": address}) + "\n")
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"controller_file cannot be written: {error}") from error
