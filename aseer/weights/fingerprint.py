"""What identifies weights and models, in every process that has them.

Weights that an update brought are identified by their content, whoever wrote it where:
a trainer that is restarted, and sends what it sent before, has the same. The weights of
the checkpoint that an engine was started from are identified by the names, sizes and
times of its files, or by the commit of a snapshot of the hub, since reading them all
takes long.
"""

from __future__ import annotations

import json
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec

from aseer.models.traits import read_settings
from aseer.weights.files import read_index

if TYPE_CHECKING:
    from aseer.config import EngineConfig
    from aseer.types import InstanceInfo

_BLOCK_BYTES = 64 << 20
_MAX_THREADS = 8  # as many as it takes to read as fast as memory is
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_DIGEST_BYTES = 16
# Settings of a `config.json` that say who wrote it, and not what the model is.
_NO_MODEL = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "dtype",
    "torch_dtype",
)
# Arguments of vLLM's that change what is computed; others only change how fast.
_ARGUMENTS = (
    "code_revision",
    "hf_overrides",
    "kv_cache_dtype",
    "load_format",
    "quantization",
)


def describe_model(config: EngineConfig, info: InstanceInfo) -> dict[str, str]:
    """What tells models apart, by name: values in words.

    Weights are no part of it, nor where the model's files are.
    """
    args = config.engine_args
    settings = None
    if config.device != "sim":
        revision, token = args.get("revision"), args.get("hf_token")
        settings = read_settings(config.model, revision, token=token)
    found = {"dtype": info.dtype, "vocab_size": str(info.vocab_size)}
    if settings is None:
        found["model"] = str(config.model)
    else:
        kept = {k: v for k, v in settings.items() if k not in _NO_MODEL}
        text = json.dumps(kept, sort_keys=True)
        found["config.json"] = _digest(text.encode())
        found["model_type"] = str(settings.get("model_type", "unknown"))
    found |= {name: repr(args[name]) for name in _ARGUMENTS if name in args}
    return found


def fingerprint_of_model(config: EngineConfig) -> str:
    """Of the weights in the checkpoint that an engine was started from."""
    if config.device == "sim":
        return "sim"
    directory, revision = Path(config.model), config.engine_args.get("revision")
    if directory.is_file():
        return _digest(_stat_of(directory, directory.name).encode())
    if not directory.is_dir():
        commit = _commit_of(str(config.model), revision)
        return f"{config.model}@{commit or revision}"
    files = sorted(p for p in directory.iterdir() if p.suffix in _WEIGHT_FILES)
    lines = [_stat_of(path, path.name) for path in files]
    return _digest("\n".join(lines).encode())


def fingerprint_of_update(index_path: str) -> str:
    """Of the weights that an update brought: every name, shape, dtype and byte.

    Raises:
        WeightUpdateError: they are gone.
    """
    index = read_index(index_path)
    parts = [
        (t.file, start, min(start + _BLOCK_BYTES, t.offset + t.num_bytes))
        for t in index.tensors
        for start in range(t.offset, t.offset + t.num_bytes, _BLOCK_BYTES)
    ]
    maps = [_map(Path(path)) for path in index.files]
    views = [memoryview(m) for m in maps]
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    try:
        with ThreadPoolExecutor(num_threads, "aseer-fingerprint") as threads:
            sums = dict(
                zip(
                    [(file, start) for file, start, _ in parts],
                    threads.map(lambda p: crc32(views[p[0]][p[1] : p[2]]), parts),
                    strict=True,
                )
            )
    finally:
        for view, mapped in zip(views, maps, strict=True):
            view.release()
            if isinstance(mapped, mmap.mmap):
                mapped.close()
    told: list[Any] = [
        (
            t.name,
            t.spec.dtype,
            list(t.spec.shape),
            [
                sums[t.file, start]
                for start in range(t.offset, t.offset + t.num_bytes, _BLOCK_BYTES)
            ],
        )
        for t in sorted(index.tensors, key=lambda t: t.name)
    ]
    return _digest(msgspec.msgpack.encode(told))


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _commit_of(name: str, revision: str | None) -> str | None:
    """The snapshot that lies in the hub's cache; None if none is found."""
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=["*.json"]
        )
    except (ImportError, OSError, ValueError):
        return None
    return Path(found).name


def _stat_of(path: Path, name: str) -> str:
    status = path.stat()
    return f"{name} {status.st_size} {status.st_mtime_ns}"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
