"""One sender writes an update's weights; whatever becomes of it can be told."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pickle
import shutil
from functools import cache

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.checks import ModelSpec, TensorSpec
from aseer.weights.files import map_tensors
from aseer.weights.target import WeightTarget, open_target, read_sent
from tests.lazy import Lazy

torch = Lazy("torch")

MODEL = ModelSpec({"a": TensorSpec("F32", (2, 3)), "b": TensorSpec("F32", (4,))}, "F32")


@cache
def given():
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


@pytest.fixture
def target(tmp_path):
    open_target(tmp_path)
    return WeightTarget(version=3, directory=str(tmp_path), model=MODEL)


def check_sent(directory):
    sent = read_sent(directory)
    found = dict(map_tensors(sent.index))
    assert found.keys() == given().keys()
    assert all(torch.equal(found[name], given()[name]) for name in given())
    assert sent.send_s >= 0


async def pairs(tensors):
    for pair in tensors.items():
        await asyncio.sleep(0)
        yield pair


async def test_what_a_pickled_target_sends_arrives_from_every_source(target, tmp_path):
    target = pickle.loads(pickle.dumps(target))
    target.send(iter(given().items()))
    check_sent(tmp_path)
    for source in (given(), pairs(given())):
        for path in tmp_path.iterdir():
            path.unlink()
        open_target(tmp_path)
        await target.send_async(source)
        check_sent(tmp_path)


async def test_an_async_iterable_needs_the_form_that_awaits(target, tmp_path):
    with pytest.raises(WeightUpdateError, match="async iterable needs"):
        target.send(pairs(given()))
    with pytest.raises(WeightUpdateError, match="no weights were sent"):
        read_sent(tmp_path)


def test_only_one_process_sends_and_only_once(target):
    def slow():
        yield from list(given().items())[:1]
        with pytest.raises(WeightUpdateError, match=f"process {os.getpid()} is send"):
            target.send(given())
        yield from list(given().items())[1:]

    target.send(slow())
    with pytest.raises(WeightUpdateError, match=r"has sent .* call Engine.finish"):
        target.send(given())


def test_after_a_sender_that_failed_another_may_send(target, tmp_path):
    def broken():
        yield from list(given().items())[:1]
        raise OSError("the shard is gone")

    with pytest.raises(OSError, match="the shard is gone"):
        target.send(broken())
    with pytest.raises(WeightUpdateError, match=r"could not send.*the shard is gone"):
        read_sent(tmp_path)
    with pytest.raises(WeightUpdateError, match="no tensor 'c'"):
        target.send({"c": torch.ones(1)} | given())
    target.send(given())
    check_sent(tmp_path)


def test_a_sender_that_works_and_one_that_died_are_told_apart(target, tmp_path):
    def half():
        yield from list(given().items())[:1]
        with pytest.raises(WeightUpdateError, match="is still sending"):
            read_sent(tmp_path)
        with (tmp_path / "sender.json").open("rb") as file:
            while_it_sends.append(file.read())
        yield from list(given().items())[1:]

    while_it_sends: list[bytes] = []
    target.send(half())
    # What a process that was killed leaves there, without its lock.
    (tmp_path / "sender.json").write_bytes(while_it_sends[0])
    with pytest.raises(WeightUpdateError, match=r"ended while it was sending"):
        read_sent(tmp_path)


def test_a_target_that_is_over_or_elsewhere_says_so(target, tmp_path):
    def ends():
        yield from list(given().items())[:1]
        shutil.rmtree(tmp_path)
        yield from list(given().items())[1:]

    with pytest.raises(WeightUpdateError, match=r"no update to version 3.*abandoned"):
        target.send(ends())
    with pytest.raises(WeightUpdateError, match=r"runs on another machine"):
        target.send(given())
    with pytest.raises(WeightUpdateError, match="are gone"):
        read_sent(tmp_path)
    assert not tmp_path.exists(), "and nothing is left there"


def test_the_lock_is_let_go_however_sending_ends(target, tmp_path):
    with pytest.raises(WeightUpdateError):
        target.send({})
    target.send(given())
    with (tmp_path / "sender.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
