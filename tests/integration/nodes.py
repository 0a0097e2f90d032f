"""`aseer node` processes beside a test, as if they were on other hosts."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.integration.sims import config_of

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator

    import aseer

ROOT = Path(__file__).resolve().parents[2]
KEY = "of these tests, and no others"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class NodeProcess:
    """A node; make it with `Nodes.start`."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process = process
        self._output = output
        self.pid = process.pid

    @property
    def said(self) -> str:
        return self._output.read_text()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def wait(self, timeout_s: float = 30.0) -> int:
        """Its exit status."""
        return await asyncio.get_running_loop().run_in_executor(
            None, self._process.wait, timeout_s
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class TrainerProcess:
    """A trainer on a host of its own, that runs a rollout for each line it is told."""

    def __init__(self, module: str, prefix: tuple[str, ...], **settings: Any) -> None:
        """Start it.

        Args:
            module: its code, as `tests.integration.cluster_trainer`.
            prefix: of the command.
            settings: what the module is told.
        """
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "ASEER_KEY": KEY},
        )

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def until_open(self) -> None:
        assert self._hear() == "open"

    def tell(self, line: str) -> str:
        """Tell it something; what it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._hear()

    def roll(self, in_the_middle: Callable[[], object] = lambda: None) -> Any:
        """One rollout; something happens while it runs."""
        assert self.tell("go") == "first"
        in_the_middle()
        return json.loads(self._hear())

    def close(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Nodes:
    """Nodes of one controller's address."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self._started: list[NodeProcess] = []
        self.port = port
        self.address = f"tcp://127.0.0.1:{port}"

    def start(
        self,
        name: str,
        *args: str,
        where: tuple[str, ...] | None = None,
        key: str = KEY,
        num_instances: int = 2,
        prefix: tuple[str, ...] = (),
        module: str = "aseer",
    ) -> NodeProcess:
        """Start a node.

        Args:
            where: the options that say where the controller is.
            prefix: of the command. module: that is the command.
        """
        output = self.folder / f"{name}-{len(self._started)}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [
                    *prefix,
                    *(sys.executable, "-m", module, "node", "--name", name),
                    *(where or ("--controller", self.address)),
                    *("--num-instances", str(num_instances), *args),
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, "ASEER_KEY": key},
            )
        node = NodeProcess(process, output)
        self._started.append(node)
        return node

    def start_trainer(self, **settings: Any) -> subprocess.Popen[bytes]:
        """An engine in a process of its own, that says where its files are, once it is
        open.
        """
        code = (
            "import aseer, time\n"
            "from pathlib import Path\n"
            "from tests.integration.nodes import Nodes\n"
            f"nodes = Nodes(Path({str(self.folder)!r}), {self.port})\n"
            f"with aseer.Engine(nodes.config(**{settings!r})) as engine:\n"
            "    print(engine.run_dir, flush=True)\n"
            "    time.sleep(100)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT
        )

    def config(self, **settings: Any) -> aseer.EngineConfig:
        """Of an engine without instances of its own that waits for a node."""
        ours: dict[str, Any] = {
            "num_instances": 0,
            "min_nodes": 1,
            "listen": self.address,
            "key_file": self.key_file(),
            "node_timeout_s": 20.0,
        }
        return config_of(**ours | settings)

    def key_file(self) -> Path:
        """A file with the key of these nodes."""
        path = self.folder / "key"
        path.write_text(KEY)
        path.chmod(0o600)
        return path

    def end(self) -> None:
        for node in self._started:
            node.kill()


@contextmanager
def nodes_in(folder: Path) -> Iterator[Nodes]:
    """Nodes that write what they say to a folder; they are gone at the end."""
    nodes = Nodes(folder, free_port())
    try:
        yield nodes
    finally:
        nodes.end()
