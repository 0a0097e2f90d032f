"""Files that a node fetches, block by block, from a neighbour or from its controller.

The node asks for a few blocks at a time, and for the next when one has come: so neither
end keeps more of a file than that, and what else is said does not wait behind it. With
each block comes a digest that was made where the update began, under a key that the
controller tells the node itself: so a block is what it was there, whoever passed it on.

A node that has an earlier version, the base, may be told what has changed in a block
instead. The digest is of the block that comes of it: if that is another, as with a base
that is not what it should be, blocks come as a whole from then on.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import AseerError, describe
from aseer.node import delta
from aseer.node.children import in_thread
from aseer.node.cleanup import remove_folder, wait_until_freed
from aseer.node.messages import Block, Fetched, GetBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aseer.node.messages import FetchFiles

_log = logging.getLogger("aseer")

# As much as is encrypted and written in a millisecond or two, in which the event loops
# do nothing else.
BLOCK_BYTES = 1 << 20
# On their way at once: more than a round trip takes, on a fast network.
MAX_BLOCKS_ASKED = 16
# Room that is asked for at once: what takes the system a fraction of a second.
_ROOM_AT_ONCE = 256 << 20
# Above any file's size, and what a system's calls take for an offset.
MAX_FILE_BYTES = 1 << 62
_PLACE = struct.Struct("<QQ")


class BadBlock(AseerError):
    """A block cannot be had, or is not what it was where the update began."""


class Fetching:
    """One order's files on their way to a directory."""

    def __init__(
        self,
        order: FetchFiles,
        directory: Path,
        say: Callable[[msgspec.Struct], None],
        ask: Callable[[GetBlock], None] | None = None,
        base: Path | None = None,
    ) -> None:
        """Prepare; `begin` begins.

        Args:
            directory: of the order; it is removed if it cannot be filled.
            say: sends the controller a message; at last a `Fetched`.
            ask: asks the order's neighbour for a block; None = there is none.
            base: directory of an earlier version; None = there is none.
        """
        self._order = order
        self._directory = directory
        self._say = say
        self._ask = ask or say
        self._gave_up = ""
        self._base = base
        self._base_files: list[int] = []
        self._files: list[int] = []
        self._blocks = self._all_blocks()
        self._asked: dict[tuple[int, int], GetBlock] = {}
        self._digests: dict[tuple[int, int], bytes] = {}  # of what is here
        self._deltas: dict[tuple[int, int], bytes] = {}  # that others may be given
        self._lock = threading.Lock()
        self._is_making = True
        self._num_come = 0  # bytes
        self.is_over = False

    @property
    def asks_neighbour(self) -> bool:
        """Whether its neighbour is to give what is missing."""
        return not self.is_over and self._ask != self._say

    async def begin(self) -> None:
        """Make the files, and ask for the first blocks.

        The system takes tens of seconds to find the memory of a large model.
        """
        try:
            await in_thread(self._make)
        except OSError as error:
            self.fail(describe(error))
        if self.is_over:
            return
        for _ in range(MAX_BLOCKS_ASKED):
            self._ask_next()
        self._end_if_done()

    def take(self, block: Block) -> None:
        """Write a block, and ask for the next; one that was not asked for is dropped.

        Raises:
            BadBlock: it is none that may be written. It is still to come.
        """
        place = block.file, block.offset
        asked = self._asked.get(place)
        if self.is_over or asked is None:
            return
        if block.is_delta and asked.has_base:
            data = self._patched(asked, block)
            if data is None:
                self._ask_for_all_of(asked)
                return
            self._deltas[place] = block.data
        else:
            data = self._checked(asked, block)
        try:
            os.pwrite(self._files[block.file], data, block.offset)
        except OSError as error:
            self.fail(describe(error))
            return
        self._num_come += len(block.data)
        del self._asked[place]
        self._digests[place] = block.digest
        self._ask_next()
        self._end_if_done()

    def _checked(self, asked: GetBlock, block: Block) -> bytes:
        """The block's data.

        Raises:
            BadBlock: it has none, or they are not what is to be there.
        """
        if block.error:
            raise BadBlock(block.error)
        if len(block.data) != asked.size or block.is_delta:
            raise BadBlock(f"a block has {len(block.data)} bytes and not {asked.size}")
        if not self._is_right(block, block.data):
            raise BadBlock("a block is not what it was where the update began")
        return block.data

    def _patched(self, asked: GetBlock, block: Block) -> bytes | None:
        """The data of a block of which it came what has changed since the base.

        None if they are not what is to be there: the base is another than it was for
        whoever sent it, or there is none any more.
        """
        if not self._base_files:
            return None
        try:
            base = _read(self._base_files[asked.file], asked.offset, asked.size)
            data = delta.apply(base, block.data)
        except (OSError, ValueError):
            return None
        return data if self._is_right(block, data) else None

    def _is_right(self, block: Block, data: bytes) -> bool:
        digest = digest_of(self._order.key, block.file, block.offset, data)
        return hmac.compare_digest(digest, block.digest)

    def _ask_for_all_of(self, asked: GetBlock) -> None:
        """Ask for a block as a whole, and so for all that follow."""
        self._close_base()
        again = msgspec.structs.replace(asked, has_base=False)
        self._asked[asked.file, asked.offset] = again
        self._ask(again)

    def give(self, file: int, offset: int, *, has_base: bool = False) -> Block | None:
        """A block for another node; None while it is not here.

        Args:
            has_base: whether what has changed since the base will do.
        """
        folder, digest = self._order.folder, self._digests.get((file, offset))
        if digest is None:
            if not self.is_over:
                return None
            return Block(folder, file, offset, error="the neighbour has no such block")
        if has_base and (file, offset) in self._deltas:
            told = self._deltas[file, offset]
            return Block(folder, file, offset, told, digest, is_delta=True)
        size = min(BLOCK_BYTES, self._order.sizes[file] - offset)
        try:
            data = read_block(str(self._directory / str(file)), offset, size)
        except OSError as error:
            return Block(folder, file, offset, error=describe(error))
        return Block(folder, file, offset, data, digest)

    def forget_base(self, folder: str) -> None:
        """A folder is gone; nobody else has it any more if it is the base."""
        if self._order.base == folder:
            self._deltas.clear()

    def give_up(self, why: str) -> None:
        """Ask the neighbour no more; the controller gives what it has not given."""
        if not self.asks_neighbour:
            return
        self._gave_up = why
        self._ask = self._say
        for asked in self._asked.values():
            self._say(asked)

    def close(self) -> None:
        """Take no more, and remove what has come."""
        with self._lock:
            self.is_over = True
            if not self._is_making:  # else whoever makes the files removes them
                self._remove()

    def fail(self, why: str) -> None:
        """Nothing of it will be here."""
        self.close()
        self._say(Fetched(self._order.folder, why, self._gave_up))

    def _make(self) -> None:
        """Make the directory and the files, as long as they are wanted; in a thread.

        Raises:
            OSError: there is no room.
        """
        try:
            wait_until_freed()
            self._directory.mkdir(mode=0o700, parents=True)
            for number, size in enumerate(self._order.sizes):
                self._files.append(_open(self._directory / str(number)))
                for offset in range(0, size, _ROOM_AT_ONCE):
                    if self.is_over:
                        return
                    room = min(_ROOM_AT_ONCE, size - offset)
                    os.posix_fallocate(self._files[-1], offset, room)
            index = self._directory / self._order.index_name
            index.write_bytes(self._order.index)
            self._open_base()
        finally:
            with self._lock:
                self._is_making = False
                if self.is_over:
                    self._remove()

    def _open_base(self) -> None:
        """Hold the base's files open, whose names may go; none if one does not fit."""
        if self._base is None:
            return
        try:
            for number, size in enumerate(self._order.sizes):
                self._base_files.append(os.open(self._base / str(number), os.O_RDONLY))
                if os.fstat(self._base_files[-1]).st_size != size:
                    raise OSError(f"file {number} of the base has another size")
        except OSError:
            self._close_base()

    def _close_base(self) -> None:
        while self._base_files:
            os.close(self._base_files.pop())

    def _remove(self) -> None:
        self._close_files()
        remove_folder(self._directory)

    def _all_blocks(self) -> Iterator[tuple[int, int, int]]:
        for number, size in enumerate(self._order.sizes):
            for offset in range(0, size, BLOCK_BYTES):
                yield number, offset, min(BLOCK_BYTES, size - offset)

    def _ask_next(self) -> None:
        block = next(self._blocks, None)
        if block is not None:
            asked = GetBlock(self._order.folder, *block, bool(self._base_files))
            self._asked[asked.file, asked.offset] = asked
            self._ask(asked)

    def _end_if_done(self) -> None:
        if not self._asked:
            self.is_over = True
            self._close_files()
            _log.info(
                "weights are here: %d bytes, for which %d came",
                sum(self._order.sizes),
                self._num_come,
            )
            self._say(Fetched(self._order.folder, gave_up=self._gave_up))

    def _close_files(self) -> None:
        for file in self._files:
            with suppress(OSError):
                os.close(file)
        self._files.clear()
        self._close_base()


def digest_of(key: bytes, file: int, offset: int, data: bytes) -> bytes:
    """What tells a block at its place from any other, for who has the key."""
    digest = hmac.new(key, _PLACE.pack(file, offset), hashlib.sha256)
    digest.update(data)
    return digest.digest()


def block_of(wanted: GetBlock, path: str, key: bytes, base: str | None = None) -> Block:
    """A block of a file where the update began, or why it cannot be had.

    Args:
        base: path of the version that whoever wants it has; None = it has none.
    """
    folder, file, offset = wanted.folder, wanted.file, wanted.offset
    try:
        data = read_block(path, offset, wanted.size)
    except Exception as error:  # of this file alone
        return Block(folder, file, offset, error=describe(error))
    digest = digest_of(key, file, offset, data)
    if base is not None:
        with suppress(OSError):  # it is gone: the block as a whole will do
            told = delta.encode(read_block(base, offset, wanted.size), data)
            if told is not None:
                return Block(folder, file, offset, told, digest, is_delta=True)
    return Block(folder, file, offset, data, digest)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def read_block(path: str, offset: int, size: int) -> bytes:
    """A block of a file, as a whole.

    Raises:
        OSError: the file is gone, or shorter.
    """
    with Path(path).open("rb") as file:
        return _read(file.fileno(), offset, size)


def _read(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise OSError("a file of weights ends within a block")
    return data
