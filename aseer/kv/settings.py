"""What the KV pool is made of: sizes, keys, and what engines are told of it. Pure.

Keys: the `cache_salt` of a prompt holds everything by which KV of the same tokens can
differ: the run, the model, the dtype, the block size and the weight version. LMCache's
keys and vLLM's block hashes hold the tokens and the salt. So KV that differs in any of
these is never found, in any tier.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from aseer.config import EngineConfig
    from aseer.inputs.kv_pool import KvPoolConfig
    from aseer.types import InstanceInfo

CONNECTOR = "GuardedConnector"
CONNECTOR_MODULE = "aseer.kv.connector"
PORT_KEY = "lmcache.mp.port"
TIMEOUT_KEY = "aseer.timeout_s"
CHUNK_KEY = "aseer.chunk_tokens"
POOL_LOG_KEY = "aseer.pool_log"
SHM_PREFIX = "lmcache_l1_pool_"  # of LMCache's files in shared memory
QUIET_LMCACHE = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
MIN_DRAM_BYTES = 64 << 20

# Share of the memory that is free at the start: the trainer, the engines and the files
# of the model need the rest.
_DRAM_SHARE = 0.2
# Share of the free /dev/shm that the pool and the weights of an update may take
# together; and the pool's own share where the model's size is not known.
_SHM_SHARE = 0.9
_SHM_SHARE_UNKNOWN = 0.5
# The most that is taken by default: every worker on a GPU page-locks the whole pool
# when it starts, which may take a second a GiB.
_MAX_DRAM_BYTES = 128 << 30
# LMCache drops stores and disk loads for which there is no room at once: with a lower
# watermark eviction keeps ahead of them.
WATERMARK = 0.6
# Engines copy their KV themselves, on GPUs as well. By LMCache's own choice there the
# server opens the engines' GPU memory and copies. What `aseer.inputs.kv_pool` says of
# that is reason enough not to; besides, such a server needs cupy and must see all
# devices, keeps the memory of dead engines, and forbids sleep.
_TRANSFER_MODE = "engine_driven"
# A worker that was stopped in the middle of a copy, and goes on after its memory was
# given to other workers, overwrites their KV. So a worker is forgotten only when its
# engine must have been killed for `heartbeat_timeout_s` of silence. `_LEAST_REAP_S` and
# `_GRACE_S` are LMCache's own defaults.
_REAP_HEARTBEATS = 2
_LEAST_REAP_S = 120.0
_GRACE_S = 3600.0
_START_TIMEOUT_S = 60.0
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a node has free for a pool, in bytes.

    Attributes:
        update_bytes: what weight updates will need in /dev/shm; None = not known.
    """

    free_bytes: int
    shm_free_bytes: int
    update_bytes: int | None = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """A node's pool.

    Attributes:
        num_servers: servers that share out the engines, in order; 0 = the pool is
            another connector's.
        dram_bytes: memory of one server.
        chunk_tokens: how many tokens are stored and found together.
        reap_s: a worker that is silent for so long is forgotten, and its memory is
            given to others.
        start_timeout_s: for a server to serve.
        why: where the size comes from, for a log.
    """

    num_servers: int
    dram_bytes: int
    disk_bytes: int
    disk_dir: str | None
    chunk_tokens: int
    timeout_s: float
    why: str
    reap_s: float = _LEAST_REAP_S
    start_timeout_s: float = _START_TIMEOUT_S


def plan_pool(
    config: EngineConfig,
    num_instances: int,
    block_size: int | None,
    memory: Memory,
    *,
    obstacle: str | None,
) -> tuple[PoolPlan | None, str]:
    """The pool that settings ask for on a node, or None; and why.

    Args:
        block_size: of the engines, in tokens; None = not known before they start.
        obstacle: why the installed packages allow no pool (`lmcache_obstacle`); None =
            they do.
    Raises:
        ConfigError: a pool was asked for by name, and cannot be had.
    """
    pool = config.kv_pool
    is_wanted = pool.mode == "lmcache"
    if pool.mode == "off":
        return None, "it is switched off"
    if pool.mode == "external":
        if config.kv_transfer_config is None:
            raise ConfigError(
                "kv_pool='external' is the pool of another connector: name it in "
                "kv_transfer_config"
            )
        why = "the connector of kv_transfer_config"
        return _plan(config, 0, 0, block_size, why=why), why
    if not is_wanted and (idle := _needless(config, num_instances)) is not None:
        return None, idle
    obstacle = _conflict(config) or obstacle
    if obstacle is not None:
        if is_wanted:
            raise ConfigError(f"kv_pool='lmcache' cannot be had: {obstacle}")
        return None, obstacle
    dram_bytes, why = _dram_bytes(pool, memory)
    if pool.dram_bytes is None and dram_bytes < MIN_DRAM_BYTES:
        if is_wanted:
            raise ConfigError(
                f"kv_pool: {why} is below {MIN_DRAM_BYTES >> 20} MiB; free some memory "
                "or set kv_pool='off'"
            )
        return None, f"{why} is too little"
    num_servers = min(pool.num_servers, num_instances)
    return _plan(config, num_servers, dram_bytes, block_size, why=why), why


def _plan(
    config: EngineConfig,
    num_servers: int,
    dram_bytes: int,
    block_size: int | None,
    *,
    why: str,
) -> PoolPlan:
    pool = config.kv_pool
    return PoolPlan(
        num_servers=num_servers,
        dram_bytes=dram_bytes,
        disk_bytes=pool.disk_bytes,
        disk_dir=str(pool.disk_dir) if pool.disk_dir and pool.disk_bytes else None,
        chunk_tokens=math.lcm(pool.chunk_tokens, block_size or 1),
        timeout_s=pool.timeout_s,
        reap_s=max(_LEAST_REAP_S, _REAP_HEARTBEATS * config.heartbeat_timeout_s),
        start_timeout_s=config.start_timeout_s,
        why=why,
    )


def _needless(config: EngineConfig, num_instances: int) -> str | None:
    """Why nothing would ever be loaded from a pool; None if something would.

    One engine may load what other nodes stored; that is too little for the memory that
    a pool takes, unless one is asked for.
    """
    if num_instances < 2:
        return "one engine keeps its KV itself"
    size, longest = config.chunk_size, config.max_model_len
    if not size:
        return "chunk_size=0 divides no request"
    if longest is not None and size >= longest:
        return f"chunk_size={size} divides no request of max_model_len={longest}"
    return None


def _conflict(config: EngineConfig) -> str | None:
    """Which other setting rules a pool out, in words; None = none."""
    if config.kv_transfer_config is not None:
        return "kv_transfer_config names another connector"
    if "@" in str(config.model):
        return f"LMCache's keys do not allow the '@' in {config.model!r}"
    return None


def _dram_bytes(pool: KvPoolConfig, memory: Memory) -> tuple[int, str]:
    """A server's DRAM in bytes, and where the figure comes from, in words."""
    free, updates = memory.shm_free_bytes, memory.update_bytes
    if pool.dram_bytes is not None:
        # Who sets the size also leaves room for weight updates.
        if pool.dram_bytes > int(free * _SHM_SHARE) // pool.num_servers:
            raise ConfigError(
                f"kv_pool: dram_bytes={pool.dram_bytes} for {pool.num_servers} servers "
                f"is more than /dev/shm has ({free} free)"
            )
        return pool.dram_bytes, f"dram_bytes={pool.dram_bytes}"
    room = {
        f"{_DRAM_SHARE:.0%} of {_gb(memory.free_bytes)} of free memory": (
            _DRAM_SHARE * memory.free_bytes
        ),
        f"at most {_gb(_MAX_DRAM_BYTES)} unless dram_bytes is set": _MAX_DRAM_BYTES,
    }
    if updates is None:
        of = f"{_SHM_SHARE_UNKNOWN:.0%} of {_gb(free)} of /dev/shm"
        room[f"{of}, since weight updates need room there, too"] = (
            _SHM_SHARE_UNKNOWN * free
        )
    else:
        of = f"{_SHM_SHARE:.0%} of {_gb(free)} of /dev/shm"
        if updates:
            of += f", less {_gb(updates)} for weight updates"
        room[of] = max(0.0, _SHM_SHARE * free - updates)
    of = min(room, key=room.__getitem__)
    size = int(room[of]) // pool.num_servers
    return size, f"{_gb(size, 2)} of DRAM ({of})"


def _gb(num_bytes: float, digits: int = 1) -> str:
    return f"{num_bytes / 1e9:.{digits}f} GB"


def server_args(plan: PoolPlan, port: int, shm_name: str, disk_dir: Path) -> list[str]:
    """LMCache's command line for a server.

    Args:
        disk_dir: of this server, if the plan has a disk tier.
    """
    args = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--l1-size-gb": repr(plan.dram_bytes / _GIB),
        "--chunk-size": str(plan.chunk_tokens),
        "--eviction-policy": "LRU",
        "--eviction-trigger-watermark": str(WATERMARK),
        "--supported-transfer-mode": _TRANSFER_MODE,
        "--worker-reap-timeout-seconds": str(plan.reap_s),
        "--worker-registration-grace-seconds": str(max(_GRACE_S, plan.reap_s)),
        "--shm-name": shm_name,
    }
    flat = [word for pair in args.items() for word in pair]
    flat += ["--no-l1-use-lazy", "--disable-observability"]
    if plan.disk_dir is not None:
        flat += ["--l2-adapter", disk_adapter(disk_dir, plan.disk_bytes)]
    return flat


def disk_adapter(directory: Path, max_bytes: int) -> str:
    """LMCache's setting of a disk tier, as JSON."""
    return json.dumps(
        {
            "type": "fs_native",
            "base_path": str(directory),
            "num_workers": 2,
            "max_capacity_gb": max_bytes / _GIB,
            "eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.8},
        }
    )


def misfit(block_sizes: Sequence[int], chunk_tokens: int) -> str:
    """Why an engine's KV cannot be in the pool that it was told of; "" = it can.

    vLLM chooses its block size when it has loaded the model, by what the attention of
    the device can do. So it is known only after the pool's servers were started.

    Args:
        block_sizes: tokens of a block, of each group of the engine's layers.
        chunk_tokens: of the pool's plan.
    """
    if len(block_sizes) > 1:
        return (
            "LMCache serves engines whose layers keep KV alike, and this one has "
            f"{len(block_sizes)} groups of layers, with blocks of "
            f"{', '.join(map(str, block_sizes))} tokens"
        )
    whole = math.lcm(chunk_tokens, *block_sizes)
    if whole == chunk_tokens:
        return ""
    return (
        f"the engine keeps KV in blocks of {block_sizes[0]} tokens, of which "
        f"kv_pool's chunk_tokens={chunk_tokens} is no multiple; set "
        f"kv_pool={{'chunk_tokens': {whole}}}, and there is a pool"
    )


def transfer_config(
    timeout_s: float, port: int, pool_log: str, chunk_tokens: int
) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` for an engine of the pool's.

    Args:
        timeout_s, chunk_tokens: of the pool's plan.
        port, pool_log: port and log of the engine's server.
    """
    extra: dict[str, Any] = {
        "lmcache.mp.host": "tcp://127.0.0.1",
        PORT_KEY: port,
        "lmcache.mp.save_decode_cache": True,
        "lmcache.mp.eager_prefetch": True,
        "lmcache.mp.mp_transfer_mode": _TRANSFER_MODE,
        "lmcache.mp.heartbeat_interval": 1.0,
        "lmcache.mp.mq_timeout": _START_TIMEOUT_S,
        TIMEOUT_KEY: timeout_s,
        POOL_LOG_KEY: pool_log,
        CHUNK_KEY: chunk_tokens,
    }
    return {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def cache_salt(namespace: str, info: InstanceInfo, weight_version: int) -> str:
    """The salt of an engine's prompts.

    Args:
        namespace: a name of the run; engines that share a tier share it.
    """
    what = f"{info.model}|{info.dtype}|{info.block_size}"
    digest = hashlib.sha256(what.encode()).hexdigest()[:12]
    return f"{namespace}-{digest}-v{weight_version}"


def version_of(salt: str) -> int | None:
    """The weight version in a salt of `cache_salt`; None for any other salt."""
    version = salt.rpartition("-v")[2]
    return int(version) if version.isdigit() else None
