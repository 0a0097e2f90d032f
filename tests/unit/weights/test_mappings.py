"""A file that is written again is mapped once, and no longer than it is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aseer.weights.blocks import BlockWriter
from aseer.weights.mappings import Mappings, unmap
from tests.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

torch = Lazy("torch")

MEMORY = Path("/dev/shm")


@pytest.fixture
def path() -> Iterator[Path]:
    path = MEMORY / f"mappings-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


def write(mappings: Mappings | None, path: Path, num: int, start: int) -> bytes:
    """Write so many 16-bit integers; what the file must have then."""
    values = (torch.arange(num) + start).to(torch.int16)
    path.touch()
    with path.open("r+b", buffering=0) as file:
        mapped = mappings.of(file.fileno()) if mappings else None
        writer = BlockWriter(file.fileno(), mapped)
        writer.put(values, 0, "I16")
        writer.finish()
        writer.close()
        file.truncate(2 * num)
    return bytes(values.numpy().tobytes())


def is_mapped(path: str, pid: int | str = "self") -> bool:
    return path in Path(f"/proc/{pid}/maps").read_text()


def test_a_file_that_has_its_pages_is_written_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mappings = Mappings()
    write(mappings, path, 5000, 0)

    def refuse(*_: object) -> int:
        raise AssertionError("it was written as a file is")

    monkeypatch.setattr("os.pwrite", refuse)
    for start in (100, 200):
        expected = write(mappings, path, 5000, start)
        assert path.read_bytes() == expected


@pytest.mark.parametrize("sizes", [(10, 9000, 9000), (9000, 10, 4000, 9000)])
def test_a_file_may_grow_and_shrink(path: Path, sizes: tuple[int, ...]) -> None:
    mappings = Mappings()
    for start, num in enumerate((*sizes, *sizes)):
        expected = write(mappings, path, num, start)
        assert path.read_bytes() == expected


def test_a_file_that_was_removed_is_let_go(path: Path) -> None:
    mappings, other = Mappings(), path.with_suffix(".other")
    try:
        for each in (path, other):
            write(mappings, each, 5000, 0)
            write(mappings, each, 5000, 1)
        path.unlink()
        assert is_mapped(str(path))
        unmap(mappings.take_but([path, other]))
        assert not is_mapped(f"{path}\n")
        assert not is_mapped(f"{path} (deleted)")
        assert is_mapped(str(other))
        unmap(mappings.take_but([]))
        assert not is_mapped(str(other))
    finally:
        other.unlink(missing_ok=True)


def test_a_writer_that_is_at_work_keeps_what_it_writes_into(path: Path) -> None:
    mappings = Mappings()
    write(mappings, path, 5000, 0)
    with path.open("r+b", buffering=0) as file:
        mapped = mappings.of(file.fileno())
    unmap(mappings.take_but([]))
    mapped[:2] = 7, 8
    assert path.read_bytes()[:2] == b"\x07\x08"
    del mapped
    assert not is_mapped(str(path))


def test_a_fork_does_not_keep_the_memory(path: Path) -> None:
    mappings = Mappings()
    write(mappings, path, 5000, 0)
    write(mappings, path, 5000, 1)
    assert is_mapped(str(path))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"yes" if is_mapped(str(path)) else b"no")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 3) == b"no"
    os.close(reading)
    os.close(writing)
    assert write(mappings, path, 5000, 2) == path.read_bytes()


def test_what_cannot_be_mapped_is_written_as_a_file(tmp_path: Path) -> None:
    mappings = Mappings()
    reading, writing = os.pipe()
    assert len(mappings.of(writing)) == 0  # nor has it any size
    os.close(reading)
    os.close(writing)
    expected = write(mappings, tmp_path / "data", 5000, 0)
    assert (tmp_path / "data").read_bytes() == expected
