"""This machine, as a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aseer.errors import InstanceStartError, describe
from aseer.node.interpreter import this_interpreter
from aseer.node.messages import Located
from aseer.node.network import free_port
from aseer.node.process import InstanceProcess

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from aseer.node.interpreter import Interpreter
    from aseer.node.leftovers import Leftovers
    from aseer.node.supply import Supply
    from aseer.transport.base import Message, Router

_HERE = "127.0.0.1"


class LocalNode:
    """See `Node`; processes are children of this one."""

    def __init__(
        self,
        router: Router[Any],
        endpoint: str,
        leftovers: Leftovers,
        log_dir: Path,
        interpreter: Interpreter | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            router: bound to `endpoint`.
            leftovers: of the engine that the node belongs to.
            interpreter: that instances run on; None = the one of this process.
        """
        self._router = router
        self._leftovers = leftovers
        self.log_dir = log_dir
        self._interpreter = interpreter or this_interpreter()
        # Those that are started again are as the first ones, whatever has become of
        # this process's environment and working directory.
        self._environment = self._interpreter.environment()
        self.name = ""
        self.endpoint = endpoint
        self.drafts = f"ipc://{leftovers.run_dir}/dgds"
        self.supplies: tuple[Supply, ...] = ()
        self.lost_because: str | None = None

    def send(self, peer: bytes, message: Message) -> None:
        """See `Node`."""
        self._router.send(peer, message)

    def forget(self, peer: bytes) -> None:
        """See `Node`."""
        self._router.forget(peer)

    async def start(
        self, peer: bytes, name: str, line: bytes, env: Mapping[str, str]
    ) -> InstanceProcess:
        """See `Node`."""
        del peer  # the line says it
        # vLLM leaves its sockets lying where it makes them: in a folder that we remove.
        ours = {"VLLM_RPC_BASE_PATH": str(self._leftovers.run_dir)}
        return await InstanceProcess.start(
            name,
            line,
            {**self._environment, **ours, **env},
            self._path_of(name),
            self._leftovers,
            self._interpreter,
        )

    async def locate(self) -> Located:
        """See `Node`."""
        try:
            return Located(_HERE, port=free_port(_HERE))
        except OSError as error:
            why = f"no port for instances to meet: {describe(error)}"
            raise InstanceStartError(why) from error

    def log_of(self, name: str) -> str:
        """See `Node`."""
        return str(self._path_of(name))

    def _path_of(self, name: str) -> Path:
        return self.log_dir / f"{name}.log"
