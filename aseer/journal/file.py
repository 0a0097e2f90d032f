"""A journal's file, and the thread that it is read and written on.

Nobody waits for the disk but this thread: writes are queued, and the event loop of
whoever queued them hears what is written. The first error ends the file's use.

    loop                                 thread
    Writer.start ----------------------> open, lock, read, cut off what does not count
         on_open(reading) <-------------
    write(data) -- queue --------------> write at once, sync once a second
         on_written(number) <-----------
    close() ---------------------------> write what is left, sync, close
         on_closed() <------------------
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from aseer.errors import ConfigError
from aseer.journal.history import History, OtherFormat, Reading, read
from aseer.node.forks import forget, keep_from_forks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log = logging.getLogger("aseer")

# What was written is on the disk itself after this time, or after so many bytes: what a
# host's crash costs. A process's crash costs nothing that was written.
SYNC_S = 1.0
_SYNC_BYTES = 16 << 20
_WRITE_BYTES = 8 << 20  # of one call: others are told in between


class Writer:
    """Reads a journal, then appends to it.

    What it tells comes by `post`, as calls on the loop of whoever made it.
    """

    def __init__(
        self,
        path: Path,
        check: Callable[[History], None],
        post: Callable[[Callable[[], object]], object],
        *,
        on_open: Callable[[History | Exception], object],
        on_written: Callable[[int], object],
        on_failed: Callable[[OSError], object],
        on_closed: Callable[[], object],
    ) -> None:
        """Prepare; `start` begins.

        Args:
            check: refuses a journal by an exception, on the thread; the file then stays
                as it is.
        """
        self._path = path
        self._check = check
        self._post = post
        self._on_open = on_open
        self._on_written = on_written
        self._on_failed = on_failed
        self._on_closed = on_closed
        self._changed = threading.Condition()
        self._queue: list[bytes] = []
        self._num_queued = 0
        self._is_closing = self._is_abandoned = False
        self._file = -1
        self._thread = threading.Thread(
            target=self._run, name="aseer-journal", daemon=True
        )

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def write(self, data: bytes) -> int:
        """Append, soon; returns the number of this write, from 1."""
        with self._changed:
            self._queue.append(data)
            self._num_queued += 1
            self._changed.notify()
            return self._num_queued

    def close(self) -> None:
        """Write what is queued, and end."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def abandon(self) -> None:
        """End without a word, as soon as the system lets go of the thread."""
        with self._changed:
            self._is_closing = self._is_abandoned = True
            self._queue.clear()
            self._changed.notify()

    # On the thread

    def _run(self) -> None:
        try:
            history = self._open()
        except Exception as error:
            self._release()
            if isinstance(error, OSError):
                words = f"the journal {self._path} cannot be used: {error}"
                error, cause = ConfigError(words), error
                error.__cause__ = cause
            self._tell(partial(self._on_open, error))
            return
        self._tell(partial(self._on_open, history))
        try:
            self._append()
        except OSError as error:
            self._release()
            self._tell(partial(self._on_failed, error))
        else:
            self._release()
            self._tell(self._on_closed)

    def _tell(self, what: Callable[[], object]) -> None:
        if not self._is_abandoned:
            self._post(what)

    def _open(self) -> History:
        path = self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._file = os.open(path, flags, 0o600)
        self._kept = keep_from_forks(self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"the journal {path} is in use by another rollout, of this process or "
                "another one; give another name, or end that rollout first"
            ) from None
        except OSError:  # a file system without locks
            _log.warning("the journal %s cannot be locked where it is", path)
        reading = self._read()
        self._check(reading.history)
        size = os.fstat(self._file).st_size
        if reading.end < size:
            if reading.damage:
                self._set_aside(reading, size)
            os.ftruncate(self._file, reading.end)
        return reading.history

    def _read(self) -> Reading:
        size = os.fstat(self._file).st_size
        if not size:
            return Reading(History(), 0, "")
        try:
            with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as data:
                return read(data)
        except OtherFormat as error:
            raise ConfigError(
                f"the journal {self._path} cannot be read: {error}; give another name, "
                "or remove the file"
            ) from error

    def _set_aside(self, reading: Reading, size: int) -> None:
        """Keep a copy of a journal that is damaged before its end."""
        number = 1
        while (copy := self._path.with_suffix(f".damaged-{number}")).exists():
            number += 1
        shutil.copyfile(self._path, copy)
        _log.warning(
            "the journal %s is damaged after %d of its %d bytes (%s): what is behind "
            "does not count, and is generated anew; a copy as it was is %s",
            self._path,
            reading.end,
            size,
            reading.damage,
            copy,
        )

    def _append(self) -> None:
        num_written = unsynced = 0
        synced_at = time.monotonic()
        while True:
            with self._changed:
                while not (self._queue or self._is_closing):
                    wait_s = SYNC_S - (time.monotonic() - synced_at)
                    if unsynced and wait_s <= 0:
                        break
                    self._changed.wait(wait_s if unsynced else None)
                data = self._queue[:]
                self._queue.clear()
                is_over = self._is_closing and not data
            if self._is_abandoned:
                return
            while data:
                num = _num_at_once(data)
                self._write(b"".join(data[:num]))
                unsynced += sum(map(len, data[:num]))
                num_written += num
                del data[:num]
                self._tell(partial(self._on_written, num_written))
            waited_s = time.monotonic() - synced_at
            if unsynced and (is_over or unsynced >= _SYNC_BYTES or waited_s >= SYNC_S):
                os.fdatasync(self._file)
                unsynced, synced_at = 0, time.monotonic()
            if is_over:
                return

    def _write(self, data: bytes) -> None:
        """Append all of it, or nothing that stays."""
        before = os.fstat(self._file).st_size
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, before)
            raise

    def _release(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            forget(self._kept)
            with suppress(OSError):
                os.close(file)


def _num_at_once(data: list[bytes]) -> int:
    """Writes that go into one call; one at least."""
    num_bytes = len(data[0])
    for num, each in enumerate(data[1:], 1):
        num_bytes += len(each)
        if num_bytes > _WRITE_BYTES:
            return num
    return len(data)
