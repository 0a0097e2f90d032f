"""`EngineConfig.kv_pool`: where KV is kept that any engine of a node can load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from aseer.errors import ConfigError
from aseer.inputs.fields import directory, one_of, refusal, seconds, whole
from aseer.inputs.plain import INT64_MAX
from aseer.inputs.settings import AnyPath, check_fields, default, documented

KvPoolMode = Literal["auto", "off", "lmcache", "external"]
KvTransfer = Literal["engine_driven", "lmcache_driven"]

_NOT_BY_THE_SERVER = (
    "transfer='lmcache_driven' is refused: LMCache's server would copy KV into the "
    "engines' GPU memory, and LMCache has no message that calls such a copy back, so "
    "that a server that hangs and then goes on writes into blocks that its engine has "
    "given to other requests by then, and those sample from it without an error; leave "
    "it at 'engine_driven'"
)


def _mode(_: str, given: object) -> str:
    return one_of("kv_pool", given, get_args(KvPoolMode))


def _transfer(name: str, given: object) -> str:
    found = one_of(name, given, get_args(KvTransfer))
    if found == "lmcache_driven":
        raise ConfigError(_NOT_BY_THE_SERVER)
    return found


@documented
@dataclass(frozen=True, kw_only=True)
class KvPoolConfig:
    """Where KV is kept that any engine of a node can load.

    A chunk that starts on another engine than the request's last one finds the
    request's KV in this pool. A pool that fails costs recomputation, and nothing else.
    """

    mode: Annotated[
        KvPoolMode,
        _mode,
        """"lmcache" starts LMCache servers; "auto" does if LMCache is installed and
        requests can move: there are two engines or more, and the engine's
        `chunk_size` is above 0 and, where `max_model_len` is set, below that. "off"
        has none. "external" starts nothing, and says that the connector in
        `EngineConfig.kv_transfer_config` finds what any engine stored, as
        Mooncake's does: requests then move as freely.""",
    ] = "auto"
    dram_bytes: Annotated[
        int | None,
        whole(1, INT64_MAX, optional=True),
        "memory of one server, in /dev/shm; None = a share of the free memory.",
    ] = None
    disk_dir: Annotated[
        AnyPath,
        directory,
        """where KV goes that DRAM has no room for, in directories that are removed
        at the end; used if `disk_bytes` is above 0.""",
    ] = default(None)
    disk_bytes: Annotated[
        int,
        whole(0, INT64_MAX),
        "the most that one server keeps there; 0 = nothing goes to disk.",
    ] = 0
    chunk_tokens: Annotated[
        int,
        whole(1),
        """how many tokens are stored and found together. Chunks of requests end
        just past a multiple of this. It must be a multiple of the engines' KV block
        size, which vLLM chooses when it loads the model: where it is not, "auto" has
        no pool, and the log says what to set.""",
    ] = 128
    num_servers: Annotated[
        int,
        whole(1),
        """servers that share out the engines of the node: one for all, or for
        example one for each NUMA domain. Each has its own memory, and none sees
        another's.""",
    ] = 1
    transfer: Annotated[
        KvTransfer,
        _transfer,
        """who copies KV between an engine and the pool: "engine_driven" = the engine,
        which knows whose a block is. "lmcache_driven", LMCache's own choice on GPUs,
        by which its server copies, is refused.""",
    ] = "engine_driven"
    timeout_s: Annotated[
        float,
        seconds,
        """seconds after which an engine gives up on its server, and computes
        instead; a server that is silent for twice as long is started again.""",
    ] = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.disk_bytes and self.disk_dir is None:
            raise refusal("disk_dir", None, "a directory, since disk_bytes is above 0")
