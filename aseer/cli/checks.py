"""The doctor's checks: each looks at one thing and returns a finding, never raises.

Whatever imports torch or vLLM runs in a process of its own with a deadline: a broken
installation may raise, crash or hang there, and only that check fails.
"""

from __future__ import annotations

import asyncio
import importlib.util
import platform
import re
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from aseer.cli.family import model_checks
from aseer.cli.findings import Check, Finding, fail, ok, warn
from aseer.cli.fit import check_fit
from aseer.cli.probes import (
    KV_POOL,
    PLATFORM,
    PROBE_TIMEOUT_S,
    SAMPLER,
    TORCH,
    TRANSFORMERS,
    ProbeError,
    probe,
)
from aseer.compat.versions import (
    SUPPORTED,
    check_vllm,
    installed_version,
    installed_vllm,
    is_cpu_build,
    is_newer_than_tested,
    lmcache_obstacle,
)
from aseer.config import EngineConfig
from aseer.errors import AseerError, ConfigError
from aseer.groups import Group
from aseer.node.machine import this_machine
from aseer.runtime.engine import Engine
from aseer.sampling import SamplingParams

MIN_PYTHON = (3, 11)
_GIB = 1 << 30
LITTLE_MEMORY = 6 * _GIB  # two small engines and the model's preparation
TOO_LITTLE_MEMORY = 2 * _GIB
LITTLE_SHM = 256 << 20
# Packages that must be of the same build as torch, and break transformers if not.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec", "triton")


def all_checks(
    scratch: Path, *, with_engine: bool, model: str | None = None
) -> list[Check]:
    """The checks in the order that helps.

    Args:
        scratch: for a tiny model's files.
        model: that the user has in mind.
    """
    tiny = scratch / "tiny"
    libraries = ("vllm", "torch", "transformers")
    checks = [
        Check(name="python", run=check_python),
        Check(name="vllm", run=check_vllm_version),
        Check(name="torch", run=check_torch, needs=("vllm",)),
        Check(name="fit", run=check_fit, needs=("vllm",)),
        Check(name="transformers", run=check_transformers, needs=("torch",)),
        Check(name="matplotlib", run=check_matplotlib),
        Check(name="cores", run=check_cores),
        Check(name="memory", run=check_memory),
        Check(name="shared memory", run=check_shared_memory),
        Check(name="gpus", run=check_gpus),
        Check(name="kv pool", run=check_kv_pool, needs=("torch",)),
        Check(name="platform", run=lambda: check_platform(tiny), needs=libraries),
        Check(name="drafts", run=check_drafts, needs=("platform",)),
    ]
    if model is not None:
        checks += model_checks(model)
    if with_engine:
        checks.append(
            Check(name="engine", run=lambda: check_engine(tiny), needs=("platform",))
        )
    return checks


def check_python() -> Finding:
    """Whether the interpreter is new enough."""
    detail = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return fail(detail, f"use Python {wanted} or newer")
    return ok(detail)


def check_vllm_version() -> Finding:
    """Whether there is one vLLM, of a version that works."""
    try:
        name, version = check_vllm()
    except ConfigError as exc:
        problem, _, advice = str(exc).partition("; ")
        return fail(problem, advice)
    detail = f"{name} {version}"
    if is_newer_than_tested(version):
        newest = ".".join(map(str, SUPPORTED[1]))
        return warn(detail, f"newer than {newest}, the newest that was tried")
    return ok(detail)


def check_torch() -> Finding:
    """Whether torch is there, and is what vLLM was built for."""
    name, version = check_vllm()
    try:
        torch = probe(TORCH)
    except ProbeError as exc:
        return fail(str(exc), f"install {name} {version} anew, with what it requires")
    return judge_torch(torch, name, version, pinned_torch(name))


def judge_torch(
    torch: dict[str, Any], vllm: str, vllm_version: str, pinned: set[str]
) -> Finding:
    """The finding for a torch that imports.

    Args:
        torch: what the probe said.
        pinned: the releases of torch that vLLM requires; empty if it names none.
    """
    accelerator = torch["cuda"] or torch["hip"]
    kind = "CUDA" if torch["cuda"] else "ROCm" if torch["hip"] else "CPU"
    version = str(torch["version"])
    detail = f"{version}, a {kind} build"
    release = version.partition("+")[0]
    if pinned and release not in pinned:
        wanted = " or ".join(sorted(pinned))
        return fail(
            f"{detail}, but {vllm} {vllm_version} was built for torch {wanted}",
            f"install torch {wanted}",
        )
    if accelerator and is_cpu_build(vllm, vllm_version):
        return warn(detail, f"{vllm} wants the CPU build of torch {release}")
    if not accelerator and not is_cpu_build(vllm, vllm_version):
        return fail(detail, f"{vllm} wants torch {release} built for your GPUs")
    return ok(detail)


def pinned_torch(distribution: str) -> set[str]:
    """The releases of torch that this distribution requires, on any platform."""
    requirements = metadata.requires(distribution) or []
    found = (re.match(r"torch\s*==\s*([\d.]+)", r) for r in requirements)
    return {m[1] for m in found if m}


def check_transformers() -> Finding:
    """Whether transformers imports, which mismatched companions of torch prevent."""
    companions = [f"{n} {v}" for n in COMPANIONS if (v := installed_version(n))]
    try:
        found = probe(TRANSFORMERS)
    except ProbeError as exc:
        if not companions:
            return fail(str(exc), "install transformers anew")
        names = " ".join(name.split()[0] for name in companions)
        torch = installed_version("torch")
        return fail(
            f"{exc} (with {', '.join(companions)} and torch {torch})",
            f"if they are of another build than torch: pip uninstall -y {names}",
        )
    return ok(", ".join([str(found["version"]), *companions]))


def check_matplotlib() -> Finding:
    """Whether timelines can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        return warn("not installed, so no timeline.png", "pip install 'aseer[plot]'")
    return ok(installed_version("matplotlib") or "installed")


def check_cores() -> Finding:
    """How many cores the engines may use."""
    count = len(this_machine().cores)
    quota = _cgroup_cores()
    detail = f"{count}" + (f", limited to {quota:g}" if quota is not None else "")
    if min(count, quota or count) < 2:
        return warn(detail, "CPU engines want a core each; with one core run one")
    return ok(detail)


def check_memory() -> Finding:
    """Whether engines have memory to start in."""
    free = this_machine().free_memory_bytes
    detail = f"{free / _GIB:.1f} GiB free"
    if free < TOO_LITTLE_MEMORY:
        return fail(detail, f"free at least {LITTLE_MEMORY / _GIB:.0f} GiB")
    if free < LITTLE_MEMORY:
        return warn(detail, "enough for one small engine: num_instances=1")
    return ok(detail)


def check_shared_memory() -> Finding:
    """Whether processes can share memory."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return warn(f"no {path}", "mount a tmpfs there")
    free = shutil.disk_usage(path).free
    detail = f"{free / _GIB:.2f} GiB free in {path}"
    if free < LITTLE_SHM:
        return warn(detail, "start the container with --shm-size=1g or --ipc=host")
    return ok(detail)


def check_kv_pool() -> Finding:
    """Whether engines of this machine can find each other's KV."""
    found = installed_vllm()
    on_gpu = bool(this_machine().gpus) and not (found and is_cpu_build(*found))
    lmcache = installed_version("lmcache")
    obstacle = lmcache_obstacle(lmcache, installed_version("torch"), on_gpu=on_gpu)
    if obstacle is None:
        try:
            probe(KV_POOL, "gpu" if on_gpu else "cpu")
        except ProbeError as exc:
            obstacle = f"LMCache {lmcache} does not load: {exc}"
    if obstacle is not None:
        detail, _, advice = obstacle.partition("; ")
        return warn(
            f"off, since {detail}; chunks that move compute their prefix again",
            advice or "see what `python -c 'import aseer.kv.connector'` says",
        )
    return ok(f"LMCache {lmcache}")


def check_gpus() -> Finding:
    """Whether the GPUs here and vLLM's build go together."""
    found = installed_vllm()
    gpus = this_machine().gpus
    return judge_gpus(gpus, cpu_build=found is None or is_cpu_build(*found))


def judge_gpus(gpus: tuple[str, ...], *, cpu_build: bool) -> Finding:
    """The finding for these visible devices and this build of vLLM."""
    detail = f"{len(gpus)} visible ({', '.join(gpus)})" if gpus else "none visible"
    if gpus and cpu_build:
        return warn(detail, "vLLM's CPU build cannot use them: pip install vllm")
    if not gpus and not cpu_build:
        return fail(
            detail,
            "check the driver, the container's devices and CUDA_VISIBLE_DEVICES, or "
            "for the CPU alone run `make setup` in a checkout of aseer",
        )
    return ok(detail)


def check_platform(model: Path) -> Finding:
    """What vLLM makes of this machine; leaves a tiny model in `model`."""
    try:
        found = probe(PLATFORM, str(model))
    except ProbeError as exc:
        return fail(str(exc), "see what `python -c 'import vllm'` says")
    if not found["device"]:
        return fail("vLLM finds no device it can run on", "check the lines above")
    return ok(f"{found['device']}, model runner {found['runner']}")


def check_drafts() -> Finding:
    """Whether what verifies drafts samples as it should on this vLLM and device."""
    try:
        found = probe(SAMPLER)
    except ProbeError as exc:
        return warn(str(exc), "set speculation='off'; the rest works without")
    draws = f"{found['num_draws']} draws on {found['device']}"
    if not found["is_right"]:
        return warn(
            f"the sampler that verifies drafts is wrong ({found['fault']}; {draws})",
            "engines here refuse to speculate; another version of vLLM may be right",
        )
    mended = "; vLLM's own is wrong here, and mended" if found["was_mended"] else ""
    return ok(f"the sampler draws as it should ({draws}){mended}")


def check_engine(model: Path) -> Finding:
    """Whether an engine starts and generates, in chunks, what it should."""
    config = EngineConfig(
        model=str(model),
        num_instances=1,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        chunk_size=32,
        kv_cache_bytes=64 << 20,
        start_timeout_s=PROBE_TIMEOUT_S,
    )
    try:
        return asyncio.run(_try_engine(config))
    except AseerError as exc:
        return fail(str(exc), "the lines above say why; then run aseer doctor again")


async def _try_engine(config: EngineConfig) -> Finding:
    sampling = SamplingParams(temperature=1.0, max_tokens=80, ignore_eos=True)
    group = Group(prompt=list(range(3, 35)), n=2, sampling=sampling)
    start = time.monotonic()
    async with Engine(config) as engine:
        started = time.monotonic()
        info = engine.instances[0]
        lengths = [len(r.token_ids) async for r in engine.rollout([group])]
        done = time.monotonic()
    detail = (
        f"started in {started - start:.0f} s on {info.device}, generated "
        f"{sum(lengths)} tokens in {done - started:.1f} s"
    )
    if lengths != [80, 80]:
        return fail(f"{detail}, but 2 x 80 were asked for", "report this")
    return ok(detail)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except OSError:
        return ""


def _cgroup_cores() -> float | None:
    """The container's share of CPU time in cores; None if it has no limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
