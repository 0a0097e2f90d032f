"""Files that a node fetches, block by block, from a neighbour or from its controller.

The node asks for a few blocks at a time, and for the next when one has come: so neither
end keeps more of a file than that, and what else is said does not wait behind it. With
each block comes a digest that was made where the update began, under a key that the
controller tells the node itself: so a block is what it was there, whoever passed it on.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.errors import AseerError, describe
from aseer.node.children import in_thread
from aseer.node.cleanup import remove_folder, wait_until_freed
from aseer.node.messages import Block, Fetched, GetBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import msgspec

    from aseer.node.messages import FetchFiles

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
    ) -> None:
        """Prepare; `begin` begins.

        Args:
            directory: of the order; it is removed if it cannot be filled.
            say: sends the controller a message; at last a `Fetched`.
            ask: asks the order's neighbour for a block; None = there is none.
        """
        self._order = order
        self._directory = directory
        self._say = say
        self._ask = ask or say
        self._gave_up = ""
        self._files: list[int] = []
        self._blocks = self._all_blocks()
        self._asked: dict[tuple[int, int], GetBlock] = {}
        self._digests: dict[tuple[int, int], bytes] = {}  # of what is here
        self._lock = threading.Lock()
        self._is_making = True
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
        if block.error:
            raise BadBlock(block.error)
        if len(block.data) != asked.size:
            raise BadBlock(f"a block has {len(block.data)} bytes and not {asked.size}")
        digest = digest_of(self._order.key, *place, block.data)
        if not hmac.compare_digest(digest, block.digest):
            raise BadBlock("a block is not what it was where the update began")
        try:
            os.pwrite(self._files[block.file], block.data, block.offset)
        except OSError as error:
            self.fail(describe(error))
            return
        del self._asked[place]
        self._digests[place] = digest
        self._ask_next()
        self._end_if_done()

    def give(self, file: int, offset: int) -> Block | None:
        """A block for another node; None while it is not here."""
        folder, digest = self._order.folder, self._digests.get((file, offset))
        if digest is None:
            if not self.is_over:
                return None
            return Block(folder, file, offset, error="the neighbour has no such block")
        size = min(BLOCK_BYTES, self._order.sizes[file] - offset)
        try:
            data = read_block(str(self._directory / str(file)), offset, size)
        except OSError as error:
            return Block(folder, file, offset, error=describe(error))
        return Block(folder, file, offset, data, digest)

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
        finally:
            with self._lock:
                self._is_making = False
                if self.is_over:
                    self._remove()

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
            asked = GetBlock(self._order.folder, *block)
            self._asked[asked.file, asked.offset] = asked
            self._ask(asked)

    def _end_if_done(self) -> None:
        if not self._asked:
            self.is_over = True
            self._close_files()
            self._say(Fetched(self._order.folder, gave_up=self._gave_up))

    def _close_files(self) -> None:
        for file in self._files:
            with suppress(OSError):
                os.close(file)
        self._files.clear()


def digest_of(key: bytes, file: int, offset: int, data: bytes) -> bytes:
    """What tells a block at its place from any other, for who has the key."""
    digest = hmac.new(key, _PLACE.pack(file, offset), hashlib.sha256)
    digest.update(data)
    return digest.digest()


def block_of(wanted: GetBlock, path: str, key: bytes) -> Block:
    """A block of a file where the update began, or why it cannot be had."""
    folder, file, offset = wanted.folder, wanted.file, wanted.offset
    try:
        data = read_block(path, offset, wanted.size)
    except Exception as error:  # of this file alone
        return Block(folder, file, offset, error=describe(error))
    return Block(folder, file, offset, data, digest_of(key, file, offset, data))


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def read_block(path: str, offset: int, size: int) -> bytes:
    """A block of a file, as a whole.

    Raises:
        OSError: the file is gone, or shorter.
    """
    with Path(path).open("rb") as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends within a block")
    return data
