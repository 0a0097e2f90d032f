"""A journal's file: all of a write stays, or nothing, and its owner hears which."""

from __future__ import annotations

import errno
import fcntl
import os
import queue
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import ConfigError
from aseer.journal import file as journal_file
from aseer.journal.file import Writer
from aseer.journal.history import History, Weights
from aseer.journal.records import FORMAT, Begin, Groups, encode
from aseer.types import GroupKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SOON_S = 10.0


def begin(format_: int = FORMAT) -> bytes:
    return encode([Begin(format_, {}, None, 1, "w", b"n")])


def group(name: str) -> bytes:
    return encode([Groups([GroupKey(name, b"p", b"s", 2)])])


def refuse(history: History) -> None:
    raise ConfigError("it is another rollout's")


class Owner:
    """Hears what a writer tells, in order, as an event loop would."""

    def __init__(self, path: Path, check: Any = lambda history: None) -> None:
        self.calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.told: list[tuple[str, Any]] = []
        self.path = path
        self.writer = Writer(
            path,
            check,
            self.calls.put,
            on_open=lambda found: self.told.append(("open", found)),
            on_written=lambda number: self.told.append(("written", number)),
            on_failed=lambda error: self.told.append(("failed", error)),
            on_closed=lambda: self.told.append(("closed", None)),
        )

    def hear(self, what: str, of: Any = None) -> Any:
        """Wait until something is told; of what."""
        while True:
            for kind, found in self.told:
                if kind == what and of in (None, found):
                    return found
            self.calls.get(timeout=SOON_S)()

    def open(self) -> Any:
        self.writer.start()
        return self.hear("open")

    def end(self) -> None:
        self.writer.close()
        self.writer._thread.join(SOON_S)
        assert not self.writer._thread.is_alive()
        while not self.calls.empty():
            self.calls.get()()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Owner]]:
    made: list[Owner] = []

    def make(**settings: Any) -> Owner:
        made.append(Owner(tmp_path / "folder" / "j.journal", **settings))
        return made[-1]

    yield make
    for owner in made:
        if owner.writer._thread.ident is not None:
            owner.end()


@pytest.fixture
def owner(make: Callable[..., Owner]) -> Owner:
    return make()


def test_writes_come_into_the_file_in_order_and_each_is_told(owner: Owner) -> None:
    assert isinstance(owner.open(), History), "its folder is made, and it is empty"
    first = owner.writer.write(begin())
    owner.hear("written", first)
    assert owner.path.read_bytes() == begin()
    numbers = [owner.writer.write(group(name)) for name in "abc"]
    assert numbers == [2, 3, 4]
    owner.hear("written", 4)
    owner.end()
    owner.hear("closed")
    assert owner.path.read_bytes() == begin() + b"".join(map(group, "abc"))
    assert owner.path.stat().st_mode & 0o077 == 0, "prompts are nobody else's"
    told = [number for kind, number in owner.told if kind == "written"]
    assert told == sorted(told), "a later write is never told before an earlier one"


def test_what_waits_is_written_before_the_file_is_closed(owner: Owner) -> None:
    owner.writer.write(begin())
    owner.writer.close()
    owner.open()
    owner.hear("closed")
    assert owner.path.read_bytes() == begin()


def test_what_a_journal_has_is_read_and_what_comes_is_appended(
    make: Callable[..., Owner],
) -> None:
    first = make()
    first.open()
    first.writer.write(begin() + group("a"))
    first.end()
    again = make()
    history = again.open()
    assert [key.group_id for key in history.keys] == ["a"]
    again.writer.write(group("b"))
    again.end()
    third = make()
    assert [key.group_id for key in third.open().keys] == ["a", "b"]


def test_two_rollouts_never_write_the_same_journal(make: Callable[..., Owner]) -> None:
    first = make()
    first.open()
    first.writer.write(begin())
    first.hear("written", 1)
    second = make()
    error = second.open()
    assert isinstance(error, ConfigError)
    assert "in use by another rollout" in str(error)
    first.writer.write(group("a"))
    first.hear("written", 2)
    first.end()
    assert first.path.read_bytes() == begin() + group("a")
    assert [key.group_id for key in make().open().keys] == ["a"], "it is free now"


def test_the_remains_of_one_write_are_cut_off_without_a_word(
    owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    owner.path.parent.mkdir()
    owner.path.write_bytes(begin() + group("a") + group("b")[:-3])
    assert [key.group_id for key in owner.open().keys] == ["a"]
    owner.writer.write(group("c"))
    owner.end()
    assert owner.path.read_bytes() == begin() + group("a") + group("c")
    assert caplog.text == ""
    assert [path.name for path in owner.path.parent.iterdir()] == ["j.journal"]


def test_a_journal_that_is_damaged_is_kept_as_it_was_and_goes_on_before_the_damage(
    make: Callable[..., Owner], caplog: pytest.LogCaptureFixture
) -> None:
    owner = make()
    owner.path.parent.mkdir()
    broken = bytearray(begin() + group("a") + group("b"))
    broken[len(begin()) + 20] ^= 1
    owner.path.write_bytes(broken)
    assert owner.open().keys == []
    copy = owner.path.with_suffix(".damaged-1")
    assert copy.read_bytes() == broken
    assert owner.path.read_bytes() == begin()
    assert "is damaged after" in caplog.text
    assert str(copy) in caplog.text
    owner.end()
    # A second damage does not take the first copy's place.
    owner.path.write_bytes(broken)
    make().open()
    assert owner.path.with_suffix(".damaged-2").read_bytes() == broken


@pytest.mark.parametrize("tail", [b"", b"remains", group("b")[3:] + group("c")])
def test_a_journal_that_is_refused_stays_as_it_is(
    make: Callable[..., Owner], tail: bytes
) -> None:
    owner = make(check=refuse)
    owner.path.parent.mkdir()
    owner.path.write_bytes(begin() + tail)
    error = owner.open()
    assert isinstance(error, ConfigError)
    assert str(error) == "it is another rollout's"
    assert owner.path.read_bytes() == begin() + tail
    assert len(list(owner.path.parent.iterdir())) == 1
    assert isinstance(make().open(), History), "its lock is free"


def test_a_journal_of_another_format_is_refused_and_kept(owner: Owner) -> None:
    owner.path.parent.mkdir()
    owner.path.write_bytes(begin(FORMAT + 1))
    error = owner.open()
    assert isinstance(error, ConfigError)
    assert f"it is of format {FORMAT + 1}" in str(error)
    assert "give another name, or remove the file" in str(error)
    assert owner.path.read_bytes() == begin(FORMAT + 1)


def test_a_place_where_there_can_be_no_file_is_told_with_its_cause(
    owner: Owner,
) -> None:
    owner.path.parent.write_text("it is no folder")
    error = owner.open()
    assert isinstance(error, ConfigError)
    assert str(owner.path) in str(error)
    assert isinstance(error.__cause__, OSError)


def test_where_files_have_no_locks_the_journal_is_written_and_that_is_said(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert isinstance(owner.open(), History)
    assert "cannot be locked where it is" in caplog.text
    owner.writer.write(begin())
    owner.end()
    assert owner.path.read_bytes() == begin()


def test_of_a_write_that_fails_nothing_stays_and_no_later_one_is_made(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.open()
    owner.writer.write(begin())
    owner.hear("written", 1)
    write = os.write

    def full(file: int, data: memoryview) -> int:
        if file != owner.writer._file:
            return write(file, data)
        if len(data) > 10:
            return write(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    owner.writer.write(group("a"))
    error = owner.hear("failed")
    assert error.errno == errno.ENOSPC
    assert owner.path.read_bytes() == begin(), "no half of an event is left"
    monkeypatch.undo()
    owner.writer.write(group("b"))
    owner.end()
    assert owner.path.read_bytes() == begin()
    assert ("closed", None) not in owner.told
    assert ("written", 2) not in owner.told


def test_a_disk_that_takes_a_write_in_parts_gets_all_of_it(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.open()
    write = os.write

    def in_parts(file: int, data: memoryview) -> int:
        return write(file, data[:7] if file == owner.writer._file else data)

    monkeypatch.setattr(os, "write", in_parts)
    owner.writer.write(begin() + group("a"))
    owner.end()
    owner.hear("closed")
    assert owner.path.read_bytes() == begin() + group("a")


def test_who_waits_is_told_while_a_long_queue_is_still_being_written(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "_WRITE_BYTES", 2 * len(group("a")))
    owner.writer.write(begin())
    for name in "012345":
        owner.writer.write(group(name))
    owner.writer.close()
    owner.open()
    owner.hear("closed")
    told = [number for kind, number in owner.told if kind == "written"]
    assert told[-1] == 7
    assert len(told) > 3
    assert owner.path.read_bytes() == begin() + b"".join(map(group, "012345"))


@pytest.mark.parametrize("what", ["time", "size"])
def test_what_is_written_is_on_the_disk_soon_without_being_closed(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What a host's crash costs is bounded in time and in bytes."""
    synced: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(
        os, "fdatasync", lambda file: synced.put(os.fstat(file).st_size)
    )
    if what == "time":
        monkeypatch.setattr(journal_file, "SYNC_S", 0.01)
    else:
        monkeypatch.setattr(journal_file, "_SYNC_BYTES", len(begin()))
    owner.open()
    owner.writer.write(begin())
    assert synced.get(timeout=SOON_S) == len(begin())
    owner.end()
    assert synced.empty(), "nothing was written since"


def test_a_writer_that_is_abandoned_tells_nothing_and_lets_go_of_the_file(
    make: Callable[..., Owner],
) -> None:
    owner = make()
    owner.open()
    owner.writer.write(begin())
    owner.hear("written", 1)
    owner.writer.abandon()
    owner.writer.write(group("late"))
    owner.writer._thread.join(SOON_S)
    assert not owner.writer._thread.is_alive()
    assert owner.calls.empty()
    again = make()
    assert again.open().num_lives(Weights(1, "w")) == 1
    assert owner.path.read_bytes() == begin()


def test_a_writer_that_is_abandoned_before_it_is_open_tells_nothing(
    owner: Owner,
) -> None:
    owner.writer.abandon()
    owner.writer.start()
    owner.writer._thread.join(SOON_S)
    assert owner.calls.empty()
