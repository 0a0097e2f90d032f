"""Step 0: what the machine has, as a reader of the report would ask for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from aseer.cli.checks import all_checks
from aseer.cli.examining import examine
from aseer.cli.findings import Finding, fail, ok, warn
from aseer.cli.probes import ProbeError, probe
from aseer.node.machine import this_machine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.cli.hour.site import Site

_GIB = 1 << 30
_COMMAND_TIMEOUT_S = 30.0
# LMCache's kernels; what its other way of copying KV, which aseer does not use, needs.
KERNELS = "lmcache.cuda_ops"
_MODULES = (KERNELS, "cupy")
_IMPORT = """
import importlib, json, sys
import torch
module = importlib.import_module(sys.argv[1])
print(json.dumps({"version": str(getattr(module, "__version__", "there"))}))
"""
# Variables that change what engines do. Names that hint at a secret are left out.
_VARIABLE = re.compile(r"(CUDA|HIP|NCCL|NVIDIA|OMP|PYTORCH|TORCH|VLLM|LMCACHE|ASEER)_")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_UUID = re.compile(r"\s*\(UUID: [^)]*\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What there is.

    Attributes:
        checks: what `aseer doctor` found, by check.
        gpus: lines of `nvidia-smi -L`, without what tells one card from another.
        shm: size and free space of /dev/shm in GiB; None = there is none.
        modules: for GPUs, by name: the version, or why it does not import.
        variables: of the environment, that change what engines do.
    """

    checks: dict[str, Finding]
    gpus: list[str]
    shm: tuple[float, float] | None
    num_cores: int
    free_memory_gib: float
    modules: dict[str, str]
    variables: dict[str, str]


def machine_facts(site: Site) -> MachineFacts:
    """Look at the machine; no engine is started."""
    machine = this_machine()
    checks = all_checks(site.scratch, with_engine=False, model=site.model)
    return MachineFacts(
        checks=examine(checks, Console(quiet=True)),
        gpus=gpu_lines(output_of("nvidia-smi", "-L")),
        shm=_shared_memory(),
        num_cores=len(machine.cores),
        free_memory_gib=round(machine.free_memory_bytes / _GIB, 1),
        modules={name: _try_import(name) for name in _MODULES if site.on_gpu},
        variables=telling_variables(os.environ),
    )


def judge_machine(facts: MachineFacts) -> Finding:
    """A check that failed fails the list; one that warns is told."""
    for name, finding in facts.checks.items():
        if finding.status == "fail":
            return fail(f"{name}: {finding.detail}", finding.advice)
    shm = "no /dev/shm"
    if facts.shm is not None:
        shm = "{:.1f} of {:.1f} GiB free in /dev/shm".format(*reversed(facts.shm))
    gpus = facts.checks["gpus"].detail if "gpus" in facts.checks else "not looked for"
    memory = f"{facts.free_memory_gib} GiB of memory free"
    modules = (f"{name}: {found}" for name, found in facts.modules.items())
    parts = (f"GPUs: {gpus}", f"{facts.num_cores} cores", memory, shm, *modules)
    detail = "; ".join(parts)
    warnings = [
        f"{n}: {f.detail}" for n, f in facts.checks.items() if f.status == "warn"
    ]
    if warnings:
        return warn(detail, "`aseer doctor` warns of " + "; ".join(warnings))
    return ok(detail)


def gpu_lines(listed: str) -> list[str]:
    """The cards in the output of `nvidia-smi -L`."""
    lines = (_UUID.sub("", line).strip() for line in listed.splitlines())
    return [line for line in lines if line]


def telling_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that a reader of the report has to know, and may."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if _VARIABLE.match(name) and not _SECRET.search(name)
    }


def _try_import(name: str) -> str:
    try:
        return str(probe(_IMPORT, name)["version"])
    except ProbeError as error:
        return str(error)


def _shared_memory() -> tuple[float, float] | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return round(usage.total / _GIB, 2), round(usage.free / _GIB, 2)


def output_of(*command: str) -> str:
    """What a command prints; "" if it is not there, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
