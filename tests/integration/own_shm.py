"""A host with a /dev/shm of its own, which can be filled, and no more of its own.

It is a mount namespace, for which root is needed; without, all hosts share the
machine's /dev/shm, and nothing fills it. What a host's processes write for themselves
is in a folder of its own either way, as elsewhere in /tmp.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from aseer.node.cleanup import SHARED_MEMORY

_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # it ends
_ROOT = Path(__file__).resolve().parents[2]
_SWEEP = "from aseer.node.leftovers import sweep; sweep()"


class OwnShm:
    """Such a host; `close` ends it."""

    def __init__(self, folder: Path, num_bytes: int | None) -> None:
        """Make it.

        Args:
            folder: to be made, for its processes' files.
            num_bytes: of its /dev/shm; None = it has the machine's.
        """
        folder.mkdir()
        self.folder = folder
        self.shared = SHARED_MEMORY
        self._holder: subprocess.Popen[bytes] | None = None
        self._enter: tuple[str, ...] = ()
        if num_bytes is not None:
            script = (
                f"mount -t tmpfs -o size={num_bytes},mode=1777 tmpfs /dev/shm && "
                "echo ready && exec sleep infinity >/dev/null"
            )
            self._holder = subprocess.Popen(
                [*_WITH_US, "unshare", "--mount", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env={"PATH": os.environ["PATH"]},  # without marks: it is no process
            )
            assert self._holder.stdout is not None
            assert self._holder.stdout.readline() == b"ready\n"
            pid = self._holder.pid
            self.shared = Path(f"/proc/{pid}/root/dev/shm")
            self._enter = ("nsenter", "-t", str(pid), "--mount", f"--wd={_ROOT}", "--")
        self._before = set(os.listdir(self.shared))

    @property
    def prefix(self) -> tuple[str, ...]:
        """Of a command that is to run there; the process is the command's own."""
        return (*self._enter, "env", f"TMPDIR={self.folder}")

    def fill(self) -> None:
        """Leave no page of its /dev/shm."""
        with suppress(OSError), (self.shared / "filler").open("ab", 0) as file:
            while True:
                file.write(bytes(1 << 16))
        with suppress(OSError), (self.shared / "filler").open("ab", 0) as file:
            while True:
                file.write(bytes(1 << 12))

    def empty(self) -> None:
        """Give back what was filled."""
        (self.shared / "filler").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed processes left, as the next that starts there does."""
        command = [*self.prefix, sys.executable, "-c", _SWEEP]
        subprocess.run(command, check=True, cwd=_ROOT)

    def left(self) -> list[str]:
        """Files that were not there at first."""
        files = [str(path) for path in self.folder.glob("aseer-*")]
        shared = set(os.listdir(self.shared)) - self._before
        return files + [f"{self.folder.name}:/dev/shm/{name}" for name in shared]

    def close(self) -> None:
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()
