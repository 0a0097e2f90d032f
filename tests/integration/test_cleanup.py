"""What a killed process group leaves in shared memory is removed, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

from aseer.instance.cleanup import (
    SHARED_MEMORY,
    kill_group,
    remove_shared_memory,
    shared_memory_of,
)

SCRIPT = """
import multiprocessing, sys, time
from multiprocessing import shared_memory

lock = multiprocessing.get_context("spawn").Lock()
own = shared_memory.SharedMemory(create=True, size=64)
theirs = shared_memory.SharedMemory(name=sys.argv[1])
print(lock._semlock.name.strip("/"), own.name, flush=True)
time.sleep(60)
"""


def test_only_what_the_group_alone_had_is_removed():
    ours = shared_memory.SharedMemory(create=True, size=64)
    try:
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, ours.name],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            lock, own = process.stdout.readline().split()
            theirs = {SHARED_MEMORY / f"sem.{lock}", SHARED_MEMORY / own}
            shared = Path(SHARED_MEMORY / ours.name)
            found = shared_memory_of(process.pid)
            assert found == theirs | {shared}
            kill_group(process.pid)
            process.wait(timeout=10)
        remove_shared_memory(found)
        assert not [path for path in theirs if path.exists()]
        assert shared.exists()
    finally:
        ours.close()
        ours.unlink()
