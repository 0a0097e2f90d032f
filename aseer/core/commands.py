"""What a controller's calls cause, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aseer.types import Chunk, ChunkId, InstanceId, Response


class Dispatch(NamedTuple):
    """Run this chunk on its instance."""

    chunk: Chunk


class Abort(NamedTuple):
    """Stop this chunk; its end is still to be reported."""

    instance_id: InstanceId
    chunk_id: ChunkId


class Finished(NamedTuple):
    """A request is over; the user gets this.

    Attributes:
        held_text: the end of the response's text that no report brought.
    """

    response: Response
    held_text: str = ""


class Blame(NamedTuple):
    """A request was the cause of so many deaths of instances, the last just now."""

    num_deaths: int


Command = Dispatch | Abort | Finished | Blame
