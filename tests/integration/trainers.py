"""Users' processes for tests to kill: each opens an engine and says what it has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import aseer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(aseer.__file__).parents[1]
SHARED_MEMORY = Path("/dev/shm")
_GRACE_S = 5.0

SCRIPT = """
import asyncio, os, time
from pathlib import Path
import aseer
from aseer.node.janitor import start_janitor
from tests.integration.sims import config_of

async def main():
    async with aseer.Engine(config_of(engine_args={engine_args!r})) as engine:
        if {janitor!r}:
            start_janitor(engine.run_dir)
        weights = Path("/dev/shm", engine.run_dir.name)
        weights.mkdir()
        (weights / "0").write_bytes(bytes(4096))  # as an update leaves them there
        fork = 0
        if {forks!r} and (fork := os.fork()) == 0:
            time.sleep(600)  # as a data loader's worker that waits for work
        pids = [i.pid for i in engine.instances]
        print(engine.run_dir, fork, *pids, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@dataclass
class Trainer:
    """A user's process with an engine that is open, and new weights in memory."""

    process: subprocess.Popen[str]
    run_dir: Path
    fork: int
    instances: list[int]
    below: list[int] = field(default_factory=list)

    @property
    def weights_dir(self) -> Path:
        return SHARED_MEMORY / self.run_dir.name

    def alive(self) -> list[int]:
        """The engine's processes that are."""
        return [p for p in self.instances + self.below if is_alive(p)]

    def left(self) -> list[str]:
        """What of the engine is still there."""
        folders = [p for p in (self.run_dir, self.weights_dir) if p.exists()]
        return [*map(str, self.alive()), *map(str, folders)]

    def left_after(self, seconds: float) -> list[str]:
        """What is still there then; returns at once when nothing is."""
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in ("zombie", "dead")
    except psutil.NoSuchProcess:
        return False


@contextmanager
def trainer(
    *, forks: bool = False, janitor: bool = False, **engine_args: object
) -> Iterator[Trainer]:
    """A user's process; whatever of it is left at the end is killed.

    Args:
        forks: it has forked a process, which lives on.
        janitor: it has started one.
        engine_args: of its simulated engines.
    """
    folder = Path(tempfile.mkdtemp())
    script = folder / "train.py"
    script.write_text(
        SCRIPT.format(engine_args=engine_args, forks=forks, janitor=janitor)
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        run_dir, *pids = process.stdout.readline().split()
        fork, *instances = map(int, pids)
        found = Trainer(process, Path(run_dir), fork, instances)
        for pid in instances:
            children = psutil.Process(pid).children(recursive=True)
            found.below += [child.pid for child in children]
        assert found.weights_dir.exists()
        try:
            yield found
        finally:
            process.kill()
            process.wait()
            found.left_after(_GRACE_S)
            for pid in (*found.instances, *found.below, fork):
                with suppress(ProcessLookupError):
                    if pid:
                        os.kill(pid, signal.SIGKILL)
    script.unlink()
    folder.rmdir()
