"""What a benchmark prints last: one line of JSON that says what was measured where."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent


def result_line(
    bench: str, *, settings: Mapping[str, Any], figures: Mapping[str, Any]
) -> str:
    """A benchmark's result as one line of JSON.

    Args:
        bench: its name.
        settings: everything that a repetition needs to know.
        figures: what was measured; these keys stand at the top level.
    Raises:
        ValueError: a figure has the name of something else in the line.
    """
    fixed = {
        "bench": bench,
        "settings": dict(settings),
        "device": device(),
        "python": platform.python_version(),
        "commit": commit(),
    }
    clash = sorted(set(fixed) & set(figures))
    if clash:
        raise ValueError(f"figures have reserved names {clash}")
    return json.dumps({"bench": bench, **figures, **fixed})


def print_result(line: str, *, save_as: str | Path | None = None) -> None:
    """Print a result's line; save it too, with its command, if a file is named."""
    if save_as is not None:
        path = Path(save_as)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"command": command(), **json.loads(line)}, indent=2)
        path.write_text(text + "\n")
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def quantiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, 10th and 90th percentile of measurements, and how many they are."""
    if len(values) == 1:
        low = high = values[0]
    else:
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        low, high = deciles[0], deciles[-1]
    return {
        "n": len(values),
        "median": round(statistics.median(values), digits),
        "p10": round(low, digits),
        "p90": round(high, digits),
    }


def command() -> str:
    """The command line that runs this benchmark again, from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return " ".join(["python", str(script), *sys.argv[1:]])


def commit() -> str | None:
    """The checked out commit, "-dirty" if files differ from it; None if unknown."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _git("status", "--porcelain", "-uno") else "")


def device() -> dict[str, Any]:
    """The CPU and the cores this process may use."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
