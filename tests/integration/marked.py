"""Processes known by a mark in their environment, and files known by their folder."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.integration.nodes import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.own_shm import OwnShm

_MARK = "ASEER_CHAOS_RUN"


@contextmanager
def own_environment() -> Iterator[tuple[Path, str]]:
    """A folder for what is started to write to, and a mark that it inherits."""
    mark = uuid.uuid4().hex
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    ours = {_MARK: mark, "TMPDIR": str(folder), "ASEER_KEY": KEY}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield folder, mark
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def left_behind(hosts: list[OwnShm], mark: str) -> list[str]:
    """What is still there after a while; processes are killed.

    What a killed process leaves in files is for the next that starts to remove; the
    next is this one.
    """
    deadline = time.monotonic() + 15.0
    while True:
        processes = list(_marked(mark))
        left = [f"{p.pid} {' '.join(p.cmdline())[:150]}" for p in processes]
        for host in hosts:
            host.sweep()
            left += host.left()
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    return left


def is_marked(pid: int) -> bool:
    """Whether a process is one of ours, and not another that has its number now."""
    with suppress(psutil.Error):
        return psutil.Process(pid).environ().get(_MARK) == os.environ[_MARK]
    return False


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(_MARK) == mark:
                yield process
