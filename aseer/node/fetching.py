"""Files that a node fetches from its controller, block by block, in its session.

The node asks for a few blocks at a time, and for the next when one has come: so neither
end keeps more of a file than that, and what else is said does not wait behind it.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.errors import describe
from aseer.node.children import in_thread
from aseer.node.cleanup import remove_folder, wait_until_freed
from aseer.node.messages import Fetched, GetBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import msgspec

    from aseer.node.messages import Block, FetchFiles

# As much as is encrypted and written in a millisecond or two, in which the event loops
# do nothing else.
BLOCK_BYTES = 1 << 20
# On their way at once: more than a round trip takes, on a fast network.
MAX_BLOCKS_ASKED = 16
# Room that is asked for at once: what takes the system a fraction of a second.
_ROOM_AT_ONCE = 256 << 20
# Above any file's size, and what a system's calls take for an offset.
MAX_FILE_BYTES = 1 << 62


class Fetching:
    """One order's files on their way to a directory."""

    def __init__(
        self,
        order: FetchFiles,
        directory: Path,
        say: Callable[[msgspec.Struct], None],
    ) -> None:
        """Prepare; `begin` begins.

        Args:
            directory: of the order; it is removed if it cannot be filled.
            say: sends the controller a message; at last a `Fetched`.
        """
        self._order = order
        self._directory = directory
        self._say = say
        self._files: list[int] = []
        self._blocks = self._all_blocks()
        self._num_missing = 0
        self._lock = threading.Lock()
        self._is_making = True
        self.is_over = False

    async def begin(self) -> None:
        """Make the files, and ask for the first blocks.

        The system takes tens of seconds to find the memory of a large model.
        """
        try:
            await in_thread(self._make)
        except OSError as error:
            self._fail(describe(error))
        if self.is_over:
            return
        for _ in range(MAX_BLOCKS_ASKED):
            self._ask()
        self._end_if_done()

    def take(self, block: Block) -> None:
        """Write a block, and ask for the next."""
        if self.is_over:
            return
        if block.error:
            self._fail(block.error)
            return
        try:
            os.pwrite(self._files[block.file], block.data, block.offset)
        except OSError as error:
            self._fail(describe(error))
            return
        self._num_missing -= 1
        self._ask()
        self._end_if_done()

    def close(self) -> None:
        """Take no more, and remove what has come."""
        with self._lock:
            self.is_over = True
            if not self._is_making:  # else whoever makes the files removes them
                self._remove()

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

    def _ask(self) -> None:
        block = next(self._blocks, None)
        if block is not None:
            self._num_missing += 1
            self._say(GetBlock(self._order.folder, *block))

    def _end_if_done(self) -> None:
        if not self._num_missing:
            self.is_over = True
            self._close_files()
            self._say(Fetched(self._order.folder))

    def _fail(self, why: str) -> None:
        self.close()
        self._say(Fetched(self._order.folder, why))

    def _close_files(self) -> None:
        for file in self._files:
            with suppress(OSError):
                os.close(file)
        self._files.clear()


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
