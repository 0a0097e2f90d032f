"""Whether packages fit aseer, and a model's weights the shared memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from aseer.cli.findings import Finding, ok, warn
from aseer.compat.check import check, installed_roots
from aseer.kv.room import checkpoint_bytes

SHM = Path("/dev/shm")
_GIB = 1 << 30


def check_fit() -> Finding:
    """Whether the names and the ways of vLLM and LMCache that aseer uses are there."""
    reports = [check(*root) for root in installed_roots()]
    detail = ", ".join(f"{r.package} {r.version}" for r in reports) or "nothing"
    misfits = [misfit for report in reports for misfit in report.misfits]
    if misfits:
        first = " ".join(misfits[0].split())
        return warn(
            f"{detail}: {len(misfits)} names or facts do not fit, such as: {first}",
            "run `python -m aseer.compat`, which says what breaks",
        )
    return ok(detail)


def judge_room(model_bytes: int | None, free: int) -> Finding:
    """Whether updates of a model of that size, None = unknown, fit what is free."""
    if model_bytes is None:
        return warn("the model's weights are not on this machine", "download them")
    wanted = 2 * model_bytes  # an update writes beside what instances may still load
    detail = f"{free / _GIB:.1f} GiB free in /dev/shm, updates take {wanted / _GIB:.1f}"
    if wanted > free:
        return warn(
            detail, "enlarge it (--shm-size), or set EngineConfig.weights_dir to a disk"
        )
    return ok(detail)


def check_room(model: str) -> Finding:
    """Whether updates of a model's weights have room in shared memory."""
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    return judge_room(checkpoint_bytes(model), free)
