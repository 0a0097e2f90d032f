"""`EngineConfig.kv_pool`: where KV is kept that any engine of a node can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 -- annotations are resolved at run time, too
from typing import TYPE_CHECKING, Any, Literal, get_args

from aseer.inputs.fields import (
    check_directory,
    check_int,
    check_seconds,
    one_of,
    refusal,
    set_field,
    settings_of,
)
from aseer.inputs.plain import INT64_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

KvPoolMode = Literal["auto", "off", "lmcache", "external"]


@dataclass(frozen=True, kw_only=True)
class KvPoolConfig:
    """Where KV is kept that any engine of a node can load.

    A chunk that starts on another engine than the request's last one finds the
    request's KV in this pool. A pool that fails costs recomputation, and nothing else.

    Attributes:
        mode: "lmcache" starts LMCache servers; "auto" does if LMCache is installed and
            requests can move: there are two engines or more, and the engine's
            `chunk_size` is above 0 and, where `max_model_len` is set, below that. "off"
            has none. "external" starts nothing, and says that the connector in
            `EngineConfig.kv_transfer_config` finds what any engine stored, as
            Mooncake's does: requests then move as freely.
        dram_bytes: memory of one server, in /dev/shm; None = a share of the free
            memory.
        disk_dir: where KV goes that DRAM has no room for, in directories that are
            removed at the end; used if `disk_bytes` is above 0.
        disk_bytes: the most that one server keeps there; 0 = nothing goes to disk.
        chunk_tokens: how many tokens are stored and found together. Chunks of requests
            end just past a multiple of this.
        num_servers: servers that share out the engines of the node: one for all, or for
            example one for each NUMA domain. Each has its own memory, and none sees
            another's.
        timeout_s: seconds after which an engine gives up on its server, and computes
            instead; a server that is silent for twice as long is started again.
    """

    mode: KvPoolMode = "auto"
    dram_bytes: int | None = None
    disk_dir: Path | str | None = None
    disk_bytes: int = 0
    chunk_tokens: int = 128
    num_servers: int = 1
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        set_field(self, "mode", one_of("kv_pool", self.mode, get_args(KvPoolMode)))
        check_int(self, "dram_bytes", 1, INT64_MAX, optional=True)
        check_int(self, "disk_bytes", 0, INT64_MAX)
        check_directory(self, "disk_dir")
        check_int(self, "chunk_tokens", 1)
        check_int(self, "num_servers", 1)
        check_seconds(self, "timeout_s")
        if self.disk_bytes and self.disk_dir is None:
            raise refusal("disk_dir", None, "a directory, since disk_bytes is above 0")


def check_kv_pool(
    kv_pool: KvPoolConfig | KvPoolMode | Mapping[str, Any],
) -> KvPoolConfig:
    """The settings that a mode, or a mapping of their fields, stands for.

    Raises:
        ConfigError: there is no such mode.
    """
    return settings_of(KvPoolConfig, "kv_pool", kv_pool, short="mode")
