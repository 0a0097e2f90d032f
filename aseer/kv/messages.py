"""What the engine's thread and a pool server's process say to each other, a line each.

    engine's thread                                  pool server's process
      ServerSpec, the first line on its standard input ->
                                       <- PoolCounts, once it serves
      Poll, a few times a second ---------------------->
                                       <- PoolCounts, the answer; the heartbeat, too
      the end of its standard input: remove all and exit

Structs of plain data in JSON; bytes travel as base64.
"""

from __future__ import annotations

import msgspec


class ServerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool server is to run.

    Attributes:
        args: of LMCache's server, as on its command line.
        disk_dir: its own, made and removed by it; None = no disk tier.
        shm_name: of its memory; unlinked at its end, however it comes.
    """

    args: list[str]
    shm_name: str
    disk_dir: str | None = None


class Free(msgspec.Struct, frozen=True, array_like=True):
    """KV that nobody will ask for again.

    Attributes:
        model, world_size, salt: under which it was stored.
        tokens: int32; every whole chunk of them is freed,
        start: from that token on.
    """

    model: str
    world_size: int
    salt: str
    tokens: bytes
    start: int


class Prefetch(msgspec.Struct, frozen=True, array_like=True):
    """KV that will be asked for soon: what of it is on disk only is to go to DRAM.

    Attributes:
        model, world_size, salt, tokens: as in `Free`.
    """

    model: str
    world_size: int
    salt: str
    tokens: bytes


class Poll(msgspec.Struct, frozen=True, kw_only=True):
    """A question after the state, with what is to be done.

    Attributes:
        free, prefetch: as they say.
        drop_below: free everything of weight versions below it; None = nothing.
        clear_dram: drop from DRAM whatever is not being read or written.
    """

    free: list[Free] = []
    prefetch: list[Prefetch] = []
    drop_below: int | None = None
    clear_dram: bool = False


class PoolCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool server has done since its start, and holds; bytes.

    Attributes:
        stored: written by engines. evicted: dropped from DRAM for want of room, whether
            or not the disk has them. freed: dropped since nobody will ask for it again.
        resident: in DRAM now. capacity: of DRAM.
        disk_written, disk_read: moved to and from the disk. disk_resident: there now.
        prefetched: of what was read from the disk, what no engine had asked for yet.
        per_chunk: of what is stored and found together; 0 until something was.
    """

    stored: int = 0
    evicted: int = 0
    freed: int = 0
    resident: int = 0
    capacity: int = 0
    disk_written: int = 0
    disk_read: int = 0
    disk_resident: int = 0
    prefetched: int = 0
    per_chunk: int = 0
