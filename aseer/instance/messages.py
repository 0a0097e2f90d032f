"""What the controller and an instance say to each other on the control channel.

    controller (ROUTER)                          instance (DEALER)
                             <----------------   Hello, once its engine is up
    Run, AbortChunks, Stop   ---------------->
    Ask                      ---------------->
                             <----------------   Answer, one an Ask
                             <----------------   Report, a few times a second and
                                                 whenever a chunk ends; the heartbeat,
                                                 too
                             <----------------   Failed, before it gives up

Structs of plain data in MessagePack, told apart by a tag. A change that an older peer
would misread raises `transport.base.PROTOCOL_VERSION`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

# Runtime imports: msgspec resolves the annotations.
from aseer.core.columns import Columns
from aseer.types import Chunk, ChunkId, InstanceInfo, InstanceLoad

# Methods of `Backend`.
Question = Literal[
    "describe_weights",
    "prepare_weights",
    "commit_weights",
    "discard_weights",
    "transfer_weights",
    "sleep",
    "wake",
]


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """The engine is up."""

    protocol: int
    info: InstanceInfo


class Report(msgspec.Struct, tag="report", frozen=True):
    """Progress of chunks since the last report, and the engine's load."""

    chunks: Columns
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


class Ask(msgspec.Struct, tag="ask", frozen=True):
    """Call a method of the backend, after those asked for before."""

    ask_id: int
    what: Question
    arguments: dict[str, Any]


class Answer(msgspec.Struct, tag="answer", frozen=True):
    """What the method returned; a non-empty `error` if it raised."""

    ask_id: int
    value: Any = None
    error: str = ""


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Shut the engine down and exit."""


ToInstance = Run | AbortChunks | Ask | Stop
FromInstance = Hello | Report | Answer | Failed

TO_INSTANCE: msgspec.msgpack.Decoder[ToInstance] = msgspec.msgpack.Decoder(ToInstance)
FROM_INSTANCE: msgspec.msgpack.Decoder[FromInstance] = msgspec.msgpack.Decoder(
    FromInstance
)
