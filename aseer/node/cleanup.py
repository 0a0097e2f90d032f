"""Ending a process group so that nothing of it remains, shared memory included.

An engine that is killed cannot remove the shared memory it made, and vLLM kills its own
workers when they are slow to end. So what a group has mapped is noted while it lives
(`shared_memory_of`), and removed once no process has it mapped any more
(`remove_shared_memory`); what another process shares with it is not touched.

A model's weights in shared memory take the system tens of seconds to give back, in
which an event loop must not stand still (`remove_folder`).
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from aseer.node.forks import forget, keep_from_forks

if TYPE_CHECKING:
    from collections.abc import Callable
from aseer.watch import WakingClock

SHARED_MEMORY = Path("/dev/shm")
_EXIT_TIMEOUT_S = 5.0
_POLL_S = 0.01
# What the system gives back in a tenth of a second.
_LARGE_BYTES = 256 << 20
_freeing: set[threading.Thread] = set()


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


def remove_folder(folder: Path) -> None:
    """Remove a folder of files, at once by their names.

    The memory of large ones is given back by a thread; `wait_until_freed` waits for it.
    """
    held = [file for path in _entries(folder) if (file := _held_if_large(path)) >= 0]
    shutil.rmtree(folder, ignore_errors=True)
    if held:
        free_later(lambda: _close(held))


def free_later(free: Callable[[], object]) -> None:
    """Have a thread give memory back; `wait_until_freed` waits for it."""

    def run() -> None:
        free()
        _freeing.discard(threading.current_thread())

    thread = threading.Thread(target=run, name="aseer-free", daemon=True)
    _freeing.add(thread)
    try:
        thread.start()
    except RuntimeError:  # none can be had
        _freeing.discard(thread)
        free()


def wait_until_freed() -> None:
    """Wait until the memory of all that was removed so far can be had again."""
    for thread in list(_freeing):
        if thread.is_alive():
            thread.join()


def _held_if_large(path: Path) -> int:
    """A large file, held open, so that its name can go without its memory; else -1."""
    try:
        status = path.lstat()
        is_large = S_ISREG(status.st_mode) and status.st_size >= _LARGE_BYTES
        return os.open(path, os.O_RDONLY) if is_large else -1
    except OSError:  # gone, or not ours to read
        return -1


def _close(files: list[int]) -> None:
    """Close files, each the last of its names; a fork must not keep them meanwhile."""
    kept = [keep_from_forks(file) for file in files]
    for file, entry in zip(files, kept, strict=True):
        os.close(file)
        forget(entry)


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


def state_of(pid: int) -> str:
    """A process's state, a letter as in proc(5): "D" waits for a device or file system,
    "Z" is over; empty if there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def _is_alive(pid: int) -> bool:
    """Whether it still holds its memory; a zombie does not."""
    return state_of(pid) not in ("", "Z", "X")


def _mapped_by(pids: set[int]) -> set[tuple[int, int]]:
    """Devices and inodes of what any of the processes has mapped of shared memory.

    Not names: a named semaphore is mapped under a name of glibc's that is gone, and
    another container's processes have a shared memory of their own.
    """
    found = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if f" {SHARED_MEMORY}/" in line:
                    _, _, _, device, inode, _ = line.split(maxsplit=5)
                    major, minor = (int(part, 16) for part in device.split(":"))
                    found.add((os.makedev(major, minor), int(inode)))
    return found


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
