"""What a controller and a node on another host say to each other.

    controller                                     node
                               <----------------   Join, first of all
    Welcome                    ---------------->
    StartProcess, KillProcess, ---------------->
    NoteMemory, EndProcess
    Locate                     ---------------->   for an engine that spans nodes
                               <----------------   Located, one a Locate, in order
                               <----------------   Gives, where other nodes find it
    FetchFiles, DropFiles,     ---------------->   weights, for its instances
    FetchRest
                               <----------------   GetBlock, some for each file
    Block                      ---------------->   one a GetBlock
                               <----------------   Fetched, one a FetchFiles
                               <----------------   Ended, one a StartProcess
    ToPeer, ForgetPeer         ---------------->   to an instance's process
                               <----------------   FromPeer, PeerGone, PeerLost
                               <----------------   AskDrafts, of an engine's drafter
    Drafts                     ---------------->
    ToPool                     ---------------->   of the node's KV pool, which
                               <----------------   FromPool, `aseer.kv.messages` has
                               <----------------   Leave, once it is told to end

They travel in a session (`aseer.transport.sessions`): each comes once, in order. A
process is known by the name under which it speaks, unlike any other's. A session that
the controller closes ends with a `Goodbye`; without one the node may come back.

Nodes ask each other for blocks, too, over connections of their own without a session:

    who fetches                                    a node that has them, or will
    GetBlock                   ---------------->
                               <----------------   Block, or NotYet from time to time
"""

from __future__ import annotations

# Runtime imports: msgspec resolves the annotations.
from collections.abc import Mapping
from typing import Annotated

import msgspec

from aseer.node.machine import Machine

# A folder's name is a number; a neighbour keeps it until it has what was asked for.
MAX_FOLDER_NAME = 20
MAX_ADDRESS = 300  # a host's name has at most 253


class Versions(msgspec.Struct, tag="join", frozen=True):
    """The part of `Join` that all releases have."""

    protocol: int
    version: str
    name: str


class Join(msgspec.Struct, tag="join", frozen=True):
    """What a node is.

    Attributes:
        protocol, version: of the messages, and of aseer.
        name: that users know it by.
        machine: what there is to share.
        packages: versions of what its engines import.
        num_instances: engines that it is to run; None = by its GPUs or cores.
        endpoint: that its instances connect to. drafts: of their draft server.
        log_dir: where their logs are. weights_dir: where it keeps weights for them.
    """

    protocol: int
    version: str
    name: str
    machine: Machine
    packages: dict[str, str]
    num_instances: int | None
    endpoint: str
    drafts: str
    log_dir: str
    weights_dir: str


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """The node is taken, until nothing is heard of it for `lease_s`, at either end.

    Attributes:
        nodes_per_instance: that each of its engines spans.
    """

    lease_s: float
    nodes_per_instance: int = 1


class StartProcess(msgspec.Struct, tag="start", frozen=True):
    """See `Node.start`."""

    peer: bytes
    name: str
    line: bytes
    env: Mapping[str, str]


class KillProcess(msgspec.Struct, tag="kill", frozen=True):
    """See `Process.kill`."""

    peer: bytes


class NoteMemory(msgspec.Struct, tag="note", frozen=True):
    """See `Process.note_shared_memory`."""

    peer: bytes


class EndProcess(msgspec.Struct, tag="end", frozen=True):
    """See `Process.end`."""

    peer: bytes
    grace_s: float


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """A process is over, and nothing of it remains.

    Attributes:
        status: see `Process.wait`; 1 if it could not even be started.
        log_tail, cause: see `Process`.
    """

    peer: bytes
    status: int
    log_tail: str = ""
    cause: str | None = None


class Locate(msgspec.Struct, tag="locate", frozen=True):
    """Ask where an engine's processes on other nodes reach those of this one."""


class Located(msgspec.Struct, tag="located", frozen=True):
    """There, or why it cannot be said.

    Attributes:
        address: of the host, as a number.
        interface: that has it; "" = not known.
        port: of that address, which nobody had just then.
    """

    address: str = ""
    interface: str = ""
    port: int = 0
    error: str = ""


class Reach(msgspec.Struct, tag="reach", frozen=True):
    """Ask whether this node reaches another, at an address where that one listens."""

    address: str


class Reached(msgspec.Struct, tag="reached", frozen=True):
    """Whether it does."""

    address: str
    is_reached: bool


class ToPeer(msgspec.Struct, tag="to", frozen=True):
    """A message for a process."""

    peer: bytes
    message: msgspec.Raw


class ForgetPeer(msgspec.Struct, tag="forget", frozen=True):
    """See `Router.forget`."""

    peer: bytes


class FromPeer(msgspec.Struct, tag="from", frozen=True):
    """A message of a process."""

    peer: bytes
    message: msgspec.Raw


class PeerGone(msgspec.Struct, tag="gone", frozen=True):
    """What was sent to a process is lost (`on_gone` of `Router.run`)."""

    peer: bytes


class PeerLost(msgspec.Struct, tag="lost", frozen=True):
    """A process reads nothing, or speaks nonsense (`on_lost` of `Router.run`)."""

    peer: bytes
    why: str


class Neighbour(msgspec.Struct, frozen=True):
    """A node that gives an update's blocks to others.

    Attributes:
        address: where. folder: its own, that the files are in.
    """

    address: str
    folder: str


class Gives(msgspec.Struct, tag="gives", frozen=True):
    """Where other nodes find this one's blocks; "" = nowhere any more."""

    address: Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]


class FetchFiles(msgspec.Struct, tag="fetch", frozen=True):
    """Fetch files to a folder of the weights' directory, by their numbers.

    Attributes:
        sizes: of the files, in bytes.
        index_name, index: a file that is put beside them.
        key: of the blocks' digests.
        neighbour: from whom; None = from the controller. Whatever it does not give, the
            controller does.
        base: a folder that was fetched, with files of the same sizes, of which blocks
            may be told by what has changed since; "" = none.
    """

    folder: str
    sizes: list[int]
    index_name: str
    index: bytes
    key: bytes
    neighbour: Neighbour | None = None
    base: str = ""


class FetchRest(msgspec.Struct, tag="fetch_rest", frozen=True):
    """Fetch what is missing of a folder from the controller: its neighbour is slow."""

    folder: str


class GetBlock(msgspec.Struct, tag="get", frozen=True):
    """Ask for a part of a file.

    Attributes:
        has_base: whether what has changed in it since the base will do.
    """

    folder: Annotated[str, msgspec.Meta(max_length=MAX_FOLDER_NAME)]
    file: int
    offset: int
    size: int
    has_base: bool = False


class Block(msgspec.Struct, tag="block", frozen=True):
    """It, or why it cannot be had.

    Attributes:
        digest: of the part and its place in the update (`fetching.digest_of`), made
            where the update began.
        is_delta: the data are what has changed in the part (`aseer.node.delta`).
    """

    folder: str
    file: int
    offset: int
    data: bytes = b""
    digest: bytes = b""
    error: str = ""
    is_delta: bool = False


class NotYet(msgspec.Struct, tag="not_yet", frozen=True):
    """A node is there, and has not yet what it was asked for."""


class Fetched(msgspec.Struct, tag="fetched", frozen=True):
    """All files of a folder are there, or with an `error` none is.

    Attributes:
        gave_up: why its neighbour did not give all of them; "" if it did.
    """

    folder: str
    error: str = ""
    gave_up: str = ""


class DropFiles(msgspec.Struct, tag="drop", frozen=True):
    """Remove a folder."""

    folder: str


class AskDrafts(msgspec.Struct, tag="ask_drafts", frozen=True):
    """What a draft client says to the draft server (`aseer.dgds.messages`)."""

    client: bytes
    message: msgspec.Raw


class Drafts(msgspec.Struct, tag="drafts", frozen=True):
    """What the draft server answers it."""

    client: bytes
    message: msgspec.Raw


class ToPool(msgspec.Struct, tag="to_pool", frozen=True):
    """What the controller says to the node's KV pool."""

    message: bytes


class FromPool(msgspec.Struct, tag="from_pool", frozen=True):
    """What that answers."""

    message: bytes


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """The node is about to end: its work is to go on elsewhere."""

    why: str


class Goodbye(msgspec.Struct, tag="goodbye", frozen=True):
    """Why the controller closed the session: the node ends, too.

    Attributes:
        is_refusal: it was never taken, or could not do its work.
    """

    why: str
    is_refusal: bool = False


ToNode = (
    Welcome
    | StartProcess
    | KillProcess
    | NoteMemory
    | EndProcess
    | Locate
    | Reach
    | ToPeer
    | ForgetPeer
    | FetchFiles
    | FetchRest
    | Block
    | DropFiles
    | Drafts
    | ToPool
)
FromNode = (
    Join
    | Ended
    | Located
    | Reached
    | FromPeer
    | PeerGone
    | PeerLost
    | Gives
    | GetBlock
    | Fetched
    | AskDrafts
    | FromPool
    | Leave
)

TO_NODE: msgspec.msgpack.Decoder[ToNode] = msgspec.msgpack.Decoder(ToNode)
FROM_NODE: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)
FROM_NEIGHBOUR: msgspec.msgpack.Decoder[Block | NotYet] = msgspec.msgpack.Decoder(
    Block | NotYet
)
TO_NEIGHBOUR: msgspec.msgpack.Decoder[GetBlock] = msgspec.msgpack.Decoder(GetBlock)
VERSIONS: msgspec.msgpack.Decoder[Versions] = msgspec.msgpack.Decoder(Versions)
GOODBYE: msgspec.msgpack.Decoder[Goodbye] = msgspec.msgpack.Decoder(Goodbye)
ANY: msgspec.msgpack.Decoder[msgspec.Raw] = msgspec.msgpack.Decoder(msgspec.Raw)
"""Of messages that are passed on unread."""
encode = msgspec.msgpack.Encoder().encode
