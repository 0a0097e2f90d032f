"""What a machine has to share, and what one instance gets of it."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aseer.compat.versions import installed_vllm, is_cpu_build, release_of
from aseer.node.cleanup import SHARED_MEMORY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.models.traits import ModelTraits
    from aseer.node.interpreter import Interpreter

_GIB = 1 << 30
# vLLM on AMD's GPUs takes either, and refuses to start if they differ.
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


# The first release that goes without a binding which a container does not allow.
_BINDS_SAFELY = (0, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to share.

    Attributes:
        gpus: ids of the visible devices, as CUDA_VISIBLE_DEVICES spells them.
        cores: ids of the cores this process may run on.
        cpu_only: whether the installed vLLM is built for CPUs only.
        cpu_dtype: what its CPU computes fastest in.
        free_shm_bytes: of /dev/shm.
        numa_nodes: of each GPU by its number, where engines are to be bound to theirs;
            empty = they are not.
    """

    gpus: tuple[str, ...]
    cores: tuple[int, ...]
    free_memory_bytes: int
    cpu_only: bool
    cpu_dtype: str
    free_shm_bytes: int = 0
    numa_nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One instance: the backend's arguments and what its environment adds.

    Attributes:
        cores: that all its processes stay on; empty = any.
        traits: of its model; None = not known.
        interpreter: that its processes run on; None = the one of this process.
    """

    instance_id: int
    backend: str
    engine_args: Mapping[str, Any]
    env: Mapping[str, str]
    share: str
    cores: tuple[int, ...] = ()
    traits: ModelTraits | None = None
    interpreter: Interpreter | None = None


def this_machine(packages: Mapping[str, str] | None = None) -> Machine:
    """What this process can see of the machine it runs on.

    Args:
        packages: of the interpreter that engines run on; None = those of this one.
    """
    found = installed_vllm(packages)
    return Machine(
        gpus=visible_gpus(),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        free_memory_bytes=free_memory_bytes(),
        cpu_only=found is not None and is_cpu_build(*found),
        cpu_dtype=fast_cpu_dtype(),
        free_shm_bytes=free_shm_bytes(),
        numa_nodes=numa_nodes_to_bind(found[1] if found else ""),
    )


def numa_nodes_to_bind(
    vllm: str,
    proc: Path = Path("/proc"),
    dev: Path = Path("/dev"),
    sys: Path = Path("/sys"),
) -> tuple[int, ...]:
    """See `Machine.numa_nodes`. CUDA numbers equal devices in the order of their buses.

    Args:
        vllm: its version.
    """
    if not vllm or release_of(vllm) < _BINDS_SAFELY or not shutil.which("numactl"):
        return ()
    nodes = []
    for gpu in sorted((proc / "driver/nvidia/gpus").glob("*")):
        told = re.search(r"Device Minor:\s*(\d+)", _read(gpu / "information"))
        if told is None or not (dev / f"nvidia{told[1]}").exists():
            continue  # another container's
        node = _read(sys / "bus/pci/devices" / gpu.name.lower() / "numa_node")
        nodes.append(int(node) if node.isdigit() else -1)  # -1 = the kernel knows none
    return tuple(nodes) if len(set(nodes)) > 1 and min(nodes) >= 0 else ()


def fast_cpu_dtype(proc: Path = Path("/proc")) -> str:
    """bfloat16 where this machine's CPU has it in hardware, otherwise float32."""
    flags = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's
    return "bfloat16" if flags & set(_read(proc / "cpuinfo").split()) else "float32"


def visible_gpus(
    environ: Mapping[str, str] = os.environ,
    dev: Path = Path("/dev"),
    amd_nodes: Path = Path("/sys/class/kfd/kfd/topology/nodes"),
) -> tuple[str, ...]:
    """Ids of the GPUs that the environment leaves visible; else of all, of one make."""
    for variable in GPU_VARIABLES:
        named = environ.get(variable)
        if named is not None:
            ids = (d.strip() for d in named.split(","))
            return tuple(d for d in ids if d not in ("", "-1"))
    found = (re.fullmatch(r"nvidia(\d+)", p.name) for p in dev.glob("nvidia*"))
    # CUDA counts the devices that it sees from 0. A container that was given the
    # machine's last two has /dev/nvidia6 and /dev/nvidia7, which are its 0 and 1.
    if num := sum(1 for m in found if m):
        return tuple(map(str, range(num)))
    # CPUs are nodes, too, of id 0; a node of a container's neighbour is not readable.
    amd = [n for n in amd_nodes.glob("*") if _read(n / "gpu_id") not in ("", "0")]
    return tuple(map(str, range(len(amd))))


def free_memory_bytes(
    proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """What this process may still use: the machine's, or its container's if less."""
    free = _entry(proc / "meminfo", "MemAvailable:") * 1024 or 4 * _GIB
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit.isdigit() and used.isdigit():
        # As for the machine, cached files make room when they must.
        cached = _entry(cgroup / "memory.stat", "inactive_file")
        free = min(free, max(0, int(limit) - int(used) + cached))
    return free


def free_shm_bytes(folder: Path = SHARED_MEMORY) -> int:
    """What is left of /dev/shm; 0 where there is none."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _entry(path: Path, name: str) -> int:
    """The number behind a name in a file of one a line; 0 if it is not there."""
    rows = (line.split() for line in _read(path).splitlines())
    return next((int(row[1]) for row in rows if row[:1] == [name]), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
