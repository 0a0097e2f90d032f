"""Engines end when the user's process is gone, however it went, and leave nothing."""

from __future__ import annotations

import errno
import os
import signal
import time

import psutil
import pytest

import aseer
from aseer.node.forks import forget, keep_from_forks
from aseer.node.janitor import start_janitor
from aseer.node.leftovers import Leftovers, sweep
from aseer.node.lifeline import Lifeline, _started_at, watch
from aseer.transport.zeromq import make_socket_dir
from tests.integration.sims import config_of, groups_of
from tests.integration.trainers import trainer

SOON_S = 8.0


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("helper", ["", "spawn", "fork"])
def test_a_killed_trainer_leaves_nothing(helper):
    with trainer(helper=helper) as found:
        assert bool(found.below) == bool(helper)
        kill(found.process.pid)
        assert found.left_after(SOON_S) == []


def test_a_process_that_the_trainer_forked_keeps_nothing_alive():
    with trainer(forks=True) as found:
        kill(found.process.pid)
        assert found.left_after(SOON_S) == []


@pytest.mark.parametrize("helper", ["spawn", "fork"])
def test_what_is_below_the_instances_ends_if_they_are_killed_with_the_trainer(helper):
    with trainer(helper=helper) as found:
        kill(found.process.pid, *found.instances)
        assert found.left_after(SOON_S) == []


def test_a_janitor_removes_what_is_left_when_all_are_killed_at_once():
    with trainer(helper="spawn", janitor=True) as dead:
        pids = (dead.process.pid, *dead.instances, *dead.below)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that none outlives another
        kill(*pids)
        dead.process.wait()
        assert dead.left_after(SOON_S) == []


def test_a_janitor_ends_with_its_engine():
    with aseer.Engine(config_of()) as engine:
        start_janitor(engine.run_dir)
        found = [p for p in psutil.process_iter(["cmdline"]) if is_janitor(p)]
        assert found
    psutil.wait_procs(found, timeout=SOON_S)
    assert not any(p.is_running() for p in found)


def is_janitor(process: psutil.Process) -> bool:
    return "aseer.node.janitor" in (process.info["cmdline"] or ())


def test_the_next_engine_removes_what_engines_left_that_were_killed_at_once():
    with trainer() as living, trainer(forks=True, helper="spawn") as dead:
        for pid in (dead.process.pid, *dead.instances, *dead.below):
            os.kill(pid, signal.SIGSTOP)  # so that none outlives another
        kill(dead.process.pid, *dead.instances, *dead.below)
        dead.process.wait()
        while dead.alive():
            time.sleep(0.02)
        assert [str(dead.run_dir), str(dead.weights_dir)] == dead.left()
        with (
            aseer.Engine(config_of()) as first,
            aseer.Engine(config_of()) as second,
        ):
            assert dead.left() == []
            for engine in (first, second):
                assert len(list(engine.rollout_sync(groups_of(1)))) == 4
        assert living.run_dir.exists()
        assert living.weights_dir.exists()


def no_locks(*args: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_sweep_removes_only_lists_that_nobody_holds(tmp_path, monkeypatch):
    held, dead = Leftovers(make_socket_dir()), Leftovers(make_socket_dir())
    begun, foreign = make_socket_dir(), make_socket_dir()
    (begun / "leftovers").touch()
    monkeypatch.setattr("aseer.node.leftovers.fcntl.flock", no_locks)
    unheld = Leftovers(make_socket_dir())
    monkeypatch.undo()
    unheld.add(tmp_path / "of-the-unheld")
    target = tmp_path / "of-the-dead"
    target.mkdir()
    dead.add(target)
    dead._file.close()  # as at its process's end
    try:
        assert dead.run_dir in sweep()
        assert not target.exists()
        assert not dead.run_dir.exists()
        kept = (held.run_dir, unheld.run_dir, begun, foreign)
        assert [p.exists() for p in kept] == [True] * 4
    finally:
        held.remove()
        unheld.remove()
        (begun / "leftovers").unlink()
        begun.rmdir()
        foreign.rmdir()


def test_shared_memory_whose_name_is_anothers_now_is_kept(tmp_path):
    leftovers = Leftovers(make_socket_dir())
    name = tmp_path / "psm"
    name.touch()
    leftovers.add_shared_memory([name])
    (tmp_path / "other").touch()
    (tmp_path / "other").rename(name)
    leftovers.remove()
    assert name.exists()


def test_a_fork_lets_go_of_what_is_kept_from_it_and_of_nothing_else():
    reader, writer = os.pipe()
    other_reader, other_writer = os.pipe()
    entry = keep_from_forks(writer)
    fork = os.fork()
    if fork == 0:
        time.sleep(600)
    try:
        os.close(writer)
        os.close(other_writer)
        os.set_blocking(other_reader, False)
        assert os.read(reader, 1) == b""  # it ends, though the fork lives
        with pytest.raises(BlockingIOError):
            os.read(other_reader, 1)
    finally:
        forget(entry)
        kill(fork)
        os.waitpid(fork, 0)
        os.close(reader)
        os.close(other_reader)


@pytest.mark.parametrize("can_open", [True, False])
def test_the_end_of_a_controller_is_seen_and_of_nobody_else(can_open, monkeypatch):
    """Also where the kernel does not let processes be opened."""

    def forbidden(pid):
        raise PermissionError

    if not can_open:
        monkeypatch.setattr("os.pidfd_open", forbidden)
        monkeypatch.setattr("aseer.node.lifeline._POLL_S", 0.05)
    reader, writer = os.pipe()
    controller = os.fork()
    if controller == 0:
        time.sleep(600)
    lifeline = Lifeline(pid=controller, started_at=_started_at(controller), run_dir="")
    watch(lifeline, lambda: os.write(writer, b"x"))
    os.set_blocking(reader, False)
    try:
        time.sleep(0.2)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        kill(controller)
        os.waitpid(controller, 0)
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b"x"
    # Whose id is another process's by now is gone, too.
    reused = Lifeline(pid=os.getpid(), started_at=1, run_dir="")
    watch(reused, lambda: os.write(writer, b"y"))
    assert os.read(reader, 1) == b"y"
    os.close(reader)
    os.close(writer)
