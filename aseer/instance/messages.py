"""What the controller and an instance say to each other on the control channel.

    controller (ROUTER)                          instance (DEALER)
                             <----------------   Hello, once its engine is up
    Run, AbortChunks, Stop   ---------------->
                             <----------------   Report, a few times a second and
                                                 whenever a chunk ends; the heartbeat,
                                                 too
                             <----------------   Failed, before it gives up

Structs of plain data in MessagePack, told apart by a tag. A change that an older peer
would misread raises `PROTOCOL_VERSION`.
"""

from __future__ import annotations

import msgspec

# Runtime imports: msgspec resolves the annotations.
from aseer.types import Chunk, ChunkId, ChunkProgress, InstanceInfo, InstanceLoad

PROTOCOL_VERSION = 2


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """The engine is up."""

    protocol: int
    info: InstanceInfo


class Report(msgspec.Struct, tag="report", frozen=True):
    """Progress of chunks since the last report, and the engine's load."""

    chunks: list[ChunkProgress]
    load: InstanceLoad


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine cannot go on, or could not start."""

    error: str


class Run(msgspec.Struct, tag="run", frozen=True):
    """Run a chunk."""

    chunk: Chunk


class AbortChunks(msgspec.Struct, tag="abort", frozen=True):
    """Stop chunks; their ends are reported as `aborted`."""

    chunk_ids: list[ChunkId]


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Shut the engine down and exit."""


ToInstance = Run | AbortChunks | Stop
FromInstance = Hello | Report | Failed

TO_INSTANCE: msgspec.msgpack.Decoder[ToInstance] = msgspec.msgpack.Decoder(ToInstance)
FROM_INSTANCE: msgspec.msgpack.Decoder[FromInstance] = msgspec.msgpack.Decoder(
    FromInstance
)
