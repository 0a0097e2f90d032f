"""What is said to a pool server's process, and to the pool of another node.

Whoever keeps a server up and its process say a line each:

    engine's thread, or a node's agent               pool server's process
      ServerSpec, the first line on its standard input ->
                                       <- PoolCounts, once it serves
      Poll, a few times a second ---------------------->
                                       <- PoolCounts, the answer; the heartbeat, too
                                       <- Pulled, one a Pull, whenever it is over
      the end of its standard input: remove all and exit

Structs of plain data in JSON; bytes travel as base64.

The controller and a node's agent say, in the session that they have:

    controller                                       agent
      StartPool, first of all ------------------------->
      Free, Prefetch, DropOlder, Pull, StopPool ------->
                                       <- PoolState, at once and whenever it changed
                                       <- Pulled, one a Pull

Between two servers goes what `aseer.kv.peers` has.
"""

from __future__ import annotations

import msgspec

# Runtime imports: msgspec resolves the annotations.
from aseer.kv.settings import PoolPlan
from aseer.transport.keys import Keys


class PeerSpec(msgspec.Struct, frozen=True):
    """How a server talks to those of other nodes.

    Attributes:
        bind: address that it listens at; the port may be any. keys: of the cluster.
    """

    bind: str
    keys: Keys


class ServerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool server is to run.

    Attributes:
        args: of LMCache's server, as on its command line.
        disk_dir: its own, made and removed by it; None = no disk tier.
        shm_name: of its memory; unlinked at its end, however it comes.
        peers: None = it gives nothing to those of other nodes, nor takes theirs.
    """

    args: list[str]
    shm_name: str
    disk_dir: str | None = None
    peers: PeerSpec | None = None


class Free(msgspec.Struct, tag="free", frozen=True, array_like=True):
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


class Prefetch(msgspec.Struct, tag="prefetch", frozen=True, array_like=True):
    """KV that will be asked for soon: what of it is on disk only is to go to DRAM.

    Attributes:
        model, world_size, salt, tokens: as in `Free`.
    """

    model: str
    world_size: int
    salt: str
    tokens: bytes


class Pull(msgspec.Struct, tag="pull", frozen=True, array_like=True):
    """KV that will be asked for now, and that another server has.

    Attributes:
        pull: its number, unlike any other's.
        server: which of a node's is to have it.
        source: address of the other.
        model, world_size, salt, tokens: as in `Free`.
        timeout_s: what is not there by then is computed.
    """

    pull: int
    server: int
    source: str
    model: str
    world_size: int
    salt: str
    tokens: bytes
    timeout_s: float


class Pulled(msgspec.Struct, tag="pulled", frozen=True):
    """How a pull ended.

    Attributes:
        num_tokens, num_bytes: that came.
        error: why not all did that the source had.
    """

    pull: int
    num_tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    error: str = ""


class Poll(msgspec.Struct, frozen=True, kw_only=True):
    """A question after the state, with what is to be done.

    Attributes:
        free, prefetch, pull: as they say.
        drop_below: free everything of weight versions below it; None = nothing.
        clear_dram: drop from DRAM whatever is not being read or written.
    """

    free: list[Free] = []
    prefetch: list[Prefetch] = []
    pull: list[Pull] = []
    drop_below: int | None = None
    clear_dram: bool = False


class PoolCounts(msgspec.Struct, tag="counts", frozen=True, kw_only=True):
    """What a pool server has done since its start, and holds; bytes.

    Attributes:
        stored: written by engines. evicted: dropped from DRAM for want of room, whether
            or not the disk has them. freed: dropped since nobody will ask for it again.
        resident: in DRAM now. capacity: of DRAM.
        disk_written, disk_read: moved to and from the disk. disk_resident: there now.
        prefetched: of what was read from the disk, what no engine had asked for yet.
        pulled: taken from servers of other nodes.
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
    pulled: int = 0
    per_chunk: int = 0


class StartPool(msgspec.Struct, tag="start", frozen=True, array_like=True):
    """Have a pool, for so many instances."""

    plan: PoolPlan
    num_instances: int


class StopPool(msgspec.Struct, tag="stop", frozen=True, array_like=True):
    """Have no pool any more: no engine there uses it."""


class DropOlder(msgspec.Struct, tag="drop_older", frozen=True, array_like=True):
    """Free everything of weight versions below one."""

    version: int


class Serves(msgspec.Struct, tag="serves", frozen=True):
    """Where servers of other nodes find this one; said before the first `PoolCounts`,
    if anywhere.
    """

    address: str


class ServerState(msgspec.Struct, frozen=True):
    """A server as an engine is told of it.

    Attributes:
        port: on its host. log: path of its log there.
        is_expected: whether it serves, or is about to for the first time.
        address: where servers of other nodes find it; "" = nowhere.
    """

    port: int
    log: str
    is_expected: bool
    address: str = ""


class PoolState(msgspec.Struct, tag="state", frozen=True):
    """A node's pool: what its servers did in all their lives, and hold."""

    counts: PoolCounts
    num_restarts: int
    servers: list[ServerState]


ToPool = StartPool | StopPool | Free | Prefetch | DropOlder | Pull
FromPool = PoolState | Pulled
FromServer = PoolCounts | Pulled | Serves
TO_POOL: msgspec.msgpack.Decoder[ToPool] = msgspec.msgpack.Decoder(ToPool)
FROM_POOL: msgspec.msgpack.Decoder[FromPool] = msgspec.msgpack.Decoder(FromPool)
FROM_SERVER: msgspec.json.Decoder[FromServer] = msgspec.json.Decoder(FromServer)
encode = msgspec.msgpack.Encoder().encode
