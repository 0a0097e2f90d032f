"""Files on their way to a node: whole and in their places, or not at all."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from aseer.errors import EngineError, InstanceLostError
from aseer.node import fetching
from aseer.node.cleanup import remove_folder, wait_until_freed
from aseer.node.fetching import BadBlock, Fetching, block_of, digest_of, read_block
from aseer.node.machine import Machine
from aseer.node.messages import (
    TO_NODE,
    Block,
    DropFiles,
    Ended,
    Fetched,
    FetchFiles,
    GetBlock,
    Join,
)
from aseer.node.remote import RemoteNode
from aseer.runtime.remote_weights import once_there

if TYPE_CHECKING:
    from pathlib import Path

KEY = b"of these tests"
JOIN = Join(
    protocol=1,
    version="1",
    name="far",
    machine=Machine(
        gpus=(), cores=(0,), free_memory_bytes=1, cpu_only=True, cpu_dtype="float32"
    ),
    packages={},
    num_instances=None,
    endpoint="ipc:///nowhere",
    drafts="ipc:///nowhere",
    log_dir="/logs",
    weights_dir="/weights",
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BLOCK_BYTES", 10)


def block(file: int, offset: int, data: bytes) -> Block:
    """As the controller makes it."""
    return Block("1", file, offset, data, digest_of(KEY, file, offset, data))


def order_of(sizes: list[int]) -> FetchFiles:
    return FetchFiles("1", sizes, "index.json", b"the index", KEY)


@pytest.mark.parametrize("sizes", [[], [0], [10], [1, 0, 25], [1000, 333]])
async def test_all_blocks_come_to_their_places_in_any_order(
    tmp_path: Path, sizes: list[int]
) -> None:
    rng = random.Random(1)
    files = [rng.randbytes(size) for size in sizes]
    said: list[Any] = []
    folder = tmp_path / "1"
    coming = Fetching(order_of(sizes), folder, said.append)
    await coming.begin()
    while wanted := [m for m in said if isinstance(m, GetBlock)]:
        assert len(wanted) <= 16
        next_one = rng.choice(wanted)
        said.remove(next_one)
        place = slice(next_one.offset, next_one.offset + next_one.size)
        data = files[next_one.file][place]
        coming.take(block(next_one.file, next_one.offset, data))
    assert said == [Fetched("1")]
    assert [(folder / str(i)).read_bytes() for i in range(len(sizes))] == files
    assert (folder / "index.json").read_bytes() == b"the index"
    coming.close()
    assert not folder.exists()


async def test_what_cannot_be_read_there_or_written_here_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    coming = Fetching(order_of([25]), tmp_path / "1", said.append)
    await coming.begin()
    with pytest.raises(BadBlock, match="the file is gone"):
        coming.take(Block("1", 0, 0, error="the file is gone"))
    coming.fail("the file is gone")
    assert said[-1] == Fetched("1", "the file is gone")
    assert not os.listdir(tmp_path)
    coming.take(block(0, 10, bytes(10)))
    assert len(said) == 4, "three blocks were asked for"

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    coming = Fetching(order_of([25]), tmp_path / "2", said.append)
    await coming.begin()
    with monkeypatch.context() as patch:
        patch.setattr("aseer.node.fetching.os.pwrite", no_room)
        coming.take(block(0, 0, bytes(10)))
    assert said[-1] == Fetched("1", "OSError: [Errno 28] No space left on device")
    monkeypatch.setattr("aseer.node.fetching.os.posix_fallocate", no_room)
    await Fetching(order_of([25]), tmp_path / "3", said.append).begin()
    assert said[-1] == Fetched("1", "OSError: [Errno 28] No space left on device")
    assert not os.listdir(tmp_path)


async def test_the_loop_goes_on_while_room_is_made_and_what_is_dropped_then_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, goes_on = threading.Event(), threading.Event()
    allocate = os.posix_fallocate

    def slowly(file: int, offset: int, size: int) -> None:
        has_begun.set()
        assert goes_on.wait(10)
        allocate(file, offset, size)

    monkeypatch.setattr("aseer.node.fetching.os.posix_fallocate", slowly)
    said: list[Any] = []
    coming = Fetching(order_of([25, 25]), tmp_path / "1", said.append)
    beginning = asyncio.get_running_loop().create_task(coming.begin())
    assert await asyncio.to_thread(has_begun.wait, 10)
    assert not beginning.done()
    coming.close()
    goes_on.set()
    await beginning
    assert said == []
    assert not os.listdir(tmp_path)


def test_a_large_files_memory_is_given_back_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aseer.node.cleanup._LARGE_BYTES", 10)
    closed_by: list[str] = []
    close = os.close

    def noting(file: int) -> None:
        closed_by.append(threading.current_thread().name)
        close(file)

    folder = tmp_path / "1"
    (folder / "below").mkdir(parents=True)
    (folder / "large").write_bytes(bytes(10))
    (folder / "small").write_bytes(bytes(9))
    monkeypatch.setattr("aseer.node.cleanup.os.close", noting)
    remove_folder(folder)
    assert not folder.exists()
    wait_until_freed()
    assert "aseer-free" in closed_by
    remove_folder(folder)


async def test_only_what_the_update_has_there_is_written(tmp_path: Path) -> None:
    said: list[Any] = []
    coming = Fetching(order_of([30]), tmp_path / "1", said.append)
    await coming.begin()
    good = block(0, 10, b"0123456789")
    for bad in (
        structs.replace(good, data=b"0123456780"),
        structs.replace(good, offset=0),  # of another place
        structs.replace(good, digest=b""),
        structs.replace(good, data=bytes(9)),
        structs.replace(good, digest=digest_of(b"older", 0, 10, good.data)),
    ):
        with pytest.raises(BadBlock):
            coming.take(bad)
        assert coming.give(0, 10) is None
    coming.take(good)
    coming.take(structs.replace(good, data=bytes(10)))  # comes twice: dropped
    coming.take(structs.replace(good, offset=5))  # nobody asked for it
    assert coming.give(0, 10) == good


async def test_what_a_neighbour_has_not_given_is_asked_of_the_controller(
    tmp_path: Path,
) -> None:
    said: list[Any] = []
    asked: list[Any] = []
    coming = Fetching(order_of([40]), tmp_path / "1", said.append, asked.append)
    await coming.begin()
    assert [each.offset for each in asked] == [0, 10, 20, 30]
    coming.take(block(0, 10, bytes(10)))
    assert said == []
    coming.give_up("it hangs")
    coming.give_up("once more")
    assert [each.offset for each in said] == [0, 20, 30]
    for each in list(said):
        coming.take(block(0, each.offset, bytes(10)))
    assert said[3:] == [Fetched("1", gave_up="it hangs")]
    assert coming.give(0, 30) == block(0, 30, bytes(10))
    last = coming.give(1, 0)
    assert last is not None
    assert "no such block" in last.error
    (tmp_path / "1" / "0").unlink()
    gone = coming.give(0, 30)
    assert gone is not None
    assert "FileNotFoundError" in gone.error
    coming.close()
    assert coming.give(0, 30) is not None


def test_a_block_is_read_as_a_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read_block(str(path), 3, 4) == b"3456"
    with pytest.raises(OSError, match="ends within a block"):
        read_block(str(path), 8, 4)
    wanted = GetBlock("1", 0, 3, 4)
    assert block_of(wanted, str(path), KEY) == block(0, 3, b"3456")
    short = block_of(structs.replace(wanted, offset=8), str(path), KEY)
    assert "ends within a block" in short.error


async def test_a_node_fetches_files_once_for_all_that_ask(tmp_path: Path) -> None:
    said: list[Any] = []
    node = RemoteNode(JOIN, lambda data: said.append(TO_NODE.decode(data)))
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")

    def fetch(key: str) -> asyncio.Future[str]:
        return node.weights.fetch(key, [str(path)], lambda paths: repr(paths).encode())

    first, second = fetch("a"), fetch("a")
    (order,) = said
    assert len(order.key) == 32
    index = b"['/weights/1/0']"
    assert order == FetchFiles("1", [10], "index.json", index, order.key)
    assert node.weights.find(GetBlock("1", 0, 0, 10)) == (
        *(str(path), order.key, None),
    )
    assert node.weights.find(GetBlock("1", 1, 0, 10)) is None
    assert node.weights.find(GetBlock("2", 0, 0, 10)) is None
    nothing: Any = None
    node.take(Fetched("1"), nothing, nothing, nothing)
    assert await first == await second == "/weights/1/index.json"

    other = fetch("b")
    node.take(Fetched("2", "No space left"), nothing, nothing, nothing)
    with pytest.raises(EngineError, match="did not come: No space left"):
        await other
    again = fetch("b")
    assert [type(each) for each in said[-2:]] == [DropFiles, FetchFiles]
    assert said[-1].folder == "3"
    node.take(Fetched("2", "too late"), nothing, nothing, nothing)
    node.take(Fetched("3"), nothing, nothing, nothing)
    assert await again == "/weights/3/index.json"
    node.weights.drop("b")
    node.weights.drop("b")
    assert said[-1] == DropFiles("3")
    path.unlink()
    with pytest.raises(EngineError, match="No such file"):
        await fetch("c")


async def test_weights_that_are_gone_are_an_error_of_the_instance(tmp_path) -> None:
    node = RemoteNode(JOIN, lambda data: None)
    nothing: Any = None
    asked = once_there(node.supplies, str(tmp_path / "index.json"), nothing)
    with pytest.raises(EngineError, match="the new weights are gone"):
        await asked


async def test_a_lost_nodes_processes_and_files_are_over() -> None:
    said: list[bytes] = []
    node = RemoteNode(JOIN, said.append)
    process = await node.start(b"2.1", "instance-2", b"{}", {})
    assert node.log_of("instance-2") == "/logs/instance-2.log on far"
    coming = node.weights.fetch("a", [], lambda paths: b"")
    nothing: Any = None
    node.take(Ended(b"9.9", 0), nothing, nothing, nothing)  # it has no such process
    num_said = len(said)
    node.lose("the cable")
    assert await process.wait() == -9
    await process.end(1.0)
    assert node.lost_because == "its node far is gone: the cable"
    with pytest.raises(InstanceLostError, match="the cable"):
        await coming
    late = node.weights.fetch("b", [], lambda paths: b"")
    assert isinstance(late.exception(), InstanceLostError)
    process.kill()
    assert len(said) == num_said, "nothing is said to it any more"
