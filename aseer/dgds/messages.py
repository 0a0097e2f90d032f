"""What a draft client and the draft server say to each other.

    client (DEALER, in a vLLM worker)              server (ROUTER, in the controller)
      RegisterGroups, once a group ---------------->
      FetchCst, a few times a second -------------->
                                    <------------- Deltas, one an answer

Every message may be lost, late, doubled or overtaken: a delta says where in its request
it starts, a fetch says how much of each request the client has, and both sides skip
what they know. What requests write needs no message: the server lives where it is kept.
The server reads a question, and writes an answer, without making an object of each
request (`TokenLog.fetch_cst`).
"""

from __future__ import annotations

import msgspec

# A runtime import: msgspec resolves the annotations.
from aseer.inputs.speculation import SpeculationConfig

EXTRA_ARGS_KEY = "aseer"
"""Key of the entry in vLLM's `extra_args` that tells a drafter which request it has."""

ADDITIONAL_CONFIG_KEY = "aseer_drafts"
"""Key of the entry in vLLM's `additional_config` by which V2 gets our speculator."""


class DraftingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's drafter is told at its start.

    Attributes:
        endpoint: address of the draft server.
        fetch_interval_s: seconds between questions for what siblings wrote.
    """

    settings: SpeculationConfig
    endpoint: str
    fetch_interval_s: float


class GroupEntry(msgspec.Struct, frozen=True, array_like=True):
    """A group that a client drafts for.

    Attributes:
        prompt_key: equal for groups with the same prompt.
        ttl_s: how long the group lives after it was last asked for.
    """

    group_id: str
    prompt_key: bytes
    ttl_s: float


class RegisterGroups(msgspec.Struct, tag="register", frozen=True):
    """Groups that will be asked for."""

    groups: list[GroupEntry]


class FetchCst(msgspec.Struct, tag="fetch", frozen=True):
    """Ask for what is new.

    Attributes:
        cache_infos: for each group, how many tokens of each request the client has.
    """

    cache_infos: dict[str, dict[str, int]]


class RequestDelta(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of a request from `start` on, int32 as bytes."""

    request_id: str
    start: int
    tokens: bytes


class GroupDelta(msgspec.Struct, frozen=True, array_like=True):
    """What is new in a group; `is_known` is false if it is over, or was forgotten."""

    group_id: str
    is_known: bool
    requests: list[RequestDelta]


class Deltas(msgspec.Struct, tag="deltas", frozen=True):
    """What is new in the groups asked for; those without news are left out."""

    groups: list[GroupDelta]


class PackedFetch(msgspec.Struct, tag="fetch", frozen=True):
    """A `FetchCst`, not unpacked."""

    cache_infos: msgspec.Raw


ToServer = RegisterGroups | PackedFetch
ToClient = Deltas
TO_SERVER: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
TO_CLIENT: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)
