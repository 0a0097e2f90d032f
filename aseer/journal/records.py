"""What a journal says, an event a frame: all records of an event are there, or none.

A journal is the events of a rollout in the order in which they were decided, so any
beginning of it is the state of the rollout at some moment. That is what makes a resumed
rollout sample right: at that moment nobody knew how the responses would go on.

    Begin     a process begins the rollout, or goes on with it
    Groups    groups came; they are numbered in order of their first coming
    Started   chunks of requests run
    Taken     what an instance reported, as it came
    Lost      chunks are gone with their instance
    Done      a request is finished
"""

from __future__ import annotations

from typing import Literal

import msgspec

# Runtime imports: msgspec resolves the annotations.
from aseer.core.columns import Columns
from aseer.journal.frames import frame_of
from aseer.types import GroupKey, RequestMetrics

FORMAT = 1


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """A process begins the rollout, or goes on with it.

    Attributes:
        model: what tells models apart, by name; values in words.
        groups: digest of all groups' keys, where they are known from the start.
        weights: fingerprint of the weights that `weight_version` stands for.
        nonce: random; seeds that the rollout makes itself are derived from it.
    """

    format: int
    model: dict[str, str]
    groups: bytes | None
    weight_version: int
    weights: str
    nonce: bytes


class Groups(msgspec.Struct, frozen=True, tag="groups"):
    """Groups came that the journal had not."""

    keys: list[GroupKey]


class Start(msgspec.Struct, frozen=True, array_like=True):
    """One chunk that runs.

    Attributes:
        group: number of the request's group. index: of the request in it.
        num_before: tokens that the request had generated; 0 = it starts over.
    """

    chunk_id: int
    group: int
    index: int
    num_before: int
    max_tokens: int


class Started(msgspec.Struct, frozen=True, tag="started"):
    """Chunks run."""

    chunks: list[Start]


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """An instance's report, as it came: also what of it is known or refused."""

    report: Columns


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """Chunks are gone with their instance."""

    chunk_ids: list[int]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A request has ended by itself.

    Attributes:
        num_tokens: that it has generated; a check.
        held_text: the end of its text that no report brought.
    """

    group: int
    index: int
    num_tokens: int
    reason: Literal["stop", "length"]
    stop_reason: int | str | None
    held_text: str
    metrics: RequestMetrics


Record = Begin | Groups | Started | Taken | Lost | Done

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[Record])


def encode(records: list[Record]) -> bytes:
    """An event's records as a frame."""
    return frame_of(_ENCODER.encode(records))


def decode(payload: bytes) -> list[Record]:
    """An event's records.

    Raises:
        msgspec.DecodeError: the payload is not what `encode` writes.
    """
    return _DECODER.decode(payload)
