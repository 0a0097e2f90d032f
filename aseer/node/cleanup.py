"""Ending a process group so that nothing of it remains, shared memory included.

An engine that is killed cannot remove the shared memory it made, and vLLM kills its own
workers when they are slow to end. So what a group has mapped is noted while it lives
(`shared_memory_of`), and removed once no process has it mapped any more
(`remove_shared_memory`); what another process shares with it is not touched.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from aseer.watch import WakingClock

SHARED_MEMORY = Path("/dev/shm")
_EXIT_TIMEOUT_S = 5.0
_POLL_S = 0.01


def shared_memory_of(group: int) -> set[Path]:
    """Files in shared memory that processes of the group have mapped."""
    mapped = _mapped_by(_members(group))
    return {path for path in _entries(SHARED_MEMORY) if _inode(path) in mapped}


def weights_dir_for(run_dir: Path) -> Path:
    """Where weights for engines go by default: memory, if it can be shared as files."""
    shared = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    return SHARED_MEMORY / run_dir.name if shared else run_dir / "weights"


def signal_group(group: int) -> None:
    """Send SIGKILL to every process of a group; wait for none."""
    with suppress(OSError):  # there is none, or none of ours
        os.killpg(group, signal.SIGKILL)


def kill_group(group: int) -> None:
    """Kill every process of a group, and wait until they hold nothing any more."""
    signal_group(group)
    clock = WakingClock()
    while any(map(_is_alive, _members(group))) and clock.read() < _EXIT_TIMEOUT_S:
        time.sleep(_POLL_S)


def remove_shared_memory(paths: set[Path], *, group: int | None = None) -> None:
    """Remove those files that no process has mapped.

    Args:
        paths: what the processes had that are gone now.
        group: of processes whose use does not count, since they end, too.
    """
    left = {path for path in paths if path.exists()}
    if left:
        everyone = _processes()
        ending = _members(group) if group is not None else set()
        mapped = _mapped_by(everyone - ending)
        for path in left:
            if _inode(path) not in mapped:
                path.unlink(missing_ok=True)


def _members(group: int) -> set[int]:
    found = set()
    for pid in _processes():
        with suppress(OSError):
            if os.getpgid(pid) == group:
                found.add(pid)
    return found


def _processes() -> set[int]:
    names = (path.name for path in _entries(Path("/proc")))
    return {int(name) for name in names if name.isdecimal()}


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if it cannot be told."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_alive(pid: int) -> bool:
    """Whether it still holds its memory; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _mapped_by(pids: set[int]) -> set[int]:
    """Inodes in shared memory that any of the processes has mapped.

    Not names: a named semaphore is mapped under a name of glibc's that is gone.
    """
    found = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if f" {SHARED_MEMORY}/" in line:
                    found.add(int(line.split(maxsplit=5)[4]))
    return found


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
