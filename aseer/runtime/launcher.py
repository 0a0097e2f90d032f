"""What starts an engine's nodes where nobody does by hand (`EngineConfig.nodes`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from aseer.config import EngineConfig
    from aseer.errors import AseerError
    from aseer.transport.keys import Keys


class Launcher(Protocol):
    """Starts nodes, for one opening of an engine."""

    #: By which name or address other hosts reach this one.
    host: str
    num_nodes: int
    #: How far the nodes are, and what to do about it.
    state: str
    #: Why a node could not be started, once one could not.
    failure: AseerError | None

    async def run(self, address: str, keys: Keys) -> None:
        """Start the nodes, and tell of those that end, until cancelled.

        Args:
            address: of the controller.
        """
        ...

    async def close(self) -> None:
        """End what was started, whether or not `run` came to its end."""
        ...


def launcher_of(config: EngineConfig) -> Launcher | None:
    """What starts an engine's nodes; None if nothing does.

    Raises:
        ConfigError: it is not installed, or has no hosts of the kind.
    """
    if config.nodes is None:
        return None
    # By its name: what integrations stand on is below them, and only whoever asks for
    # one has its package.
    module = importlib.import_module(f"aseer.integrations.{config.nodes}")
    return cast("Launcher", module.launcher(config))
