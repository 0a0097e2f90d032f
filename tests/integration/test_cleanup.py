"""What processes that end or are killed leave behind is removed, and nothing else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import msgspec

from aseer.instance.base import InstanceSpec
from aseer.node.cleanup import (
    SHARED_MEMORY,
    kill_group,
    remove_shared_memory,
    shared_memory_of,
)
from aseer.node.leftovers import Leftovers
from aseer.node.lifeline import Lifeline
from aseer.transport.zeromq import make_socket_dir

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


ENDS_WHILE_IT_CLEANS_UP = """
import shutil, threading, time
import uvloop
from aseer.node import lifeline
from aseer.instance.main import main

began = threading.Event()
remove = shutil.rmtree

def slowly(*args, **kwargs):
    began.set()
    time.sleep(0.5)
    remove(*args, **kwargs)

def run(work):
    work.close()
    began.wait(10)
    return 0

shutil.rmtree, uvloop.run = slowly, run
lifeline.Lifeline.is_intact = lambda _: False  # of a controller that is gone
main()
"""


def test_an_instance_that_ends_waits_for_its_own_cleanup(tmp_path):
    spec = InstanceSpec(
        endpoint="",
        identity="",
        instance_id=0,
        backend="sim",
        report_interval_s=1.0,
        engine_args={},
    )
    folders = [tmp_path / "run", tmp_path / "weights"]
    for folder in folders:
        folder.mkdir()
    leftovers = Leftovers(folders[0])
    leftovers.add(folders[1])
    lifeline = Lifeline.to_this_process(folders[0])
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_WHILE_IT_CLEANS_UP],
        stdin=subprocess.PIPE,
        env=os.environ | lifeline.environment(),
        start_new_session=True,
    ) as process:
        process.communicate(msgspec.json.encode(spec) + b"\n", timeout=30)
    assert process.returncode == -signal.SIGKILL  # of its whole group, when all is gone
    assert not any(folder.exists() for folder in folders)
    leftovers.remove()


def test_a_group_is_killed_and_cleaned_up_after_though_proc_cannot_be_read(monkeypatch):
    """As when this process has no file descriptor left."""
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    ) as process:
        monkeypatch.setattr(Path, "iterdir", no_descriptor)
        assert shared_memory_of(process.pid) == set()
        kill_group(process.pid)
        monkeypatch.undo()
        assert process.wait(timeout=10) == -signal.SIGKILL


def no_descriptor(*args):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_list_that_cannot_be_written_is_no_error(caplog):
    leftovers = Leftovers(make_socket_dir())
    with Path("/dev/full").open("r+b", 0) as full:
        kept, leftovers._file = leftovers._file, full
        leftovers.add(Path("/x"))
        leftovers._file = kept
    leftovers.remove()
    assert "/x may be left behind" in caplog.text
