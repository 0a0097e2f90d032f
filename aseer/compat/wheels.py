"""The Python files of a release that is not installed, from its wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.compat.check import CompatError, unpacked_roots

if TYPE_CHECKING:
    from collections.abc import Iterable

_RELEASE = re.compile(r"(?:([\w-]+)==)?(\d[\w.+]*)")
# A wheel has hundreds of MB, and a mirror may be slow.
_TIMEOUT_S = 1800.0


def requirement(text: str) -> str | None:
    """What pip is asked for: of "0.33.0" vLLM, of "NAME==VERSION" that; else None."""
    match = _RELEASE.fullmatch(text)
    return f"{match[1] or 'vllm'}=={match[2]}" if match else None


def named_roots(wanted: Iterable[str], scratch: Path) -> list[tuple[str, str, Path]]:
    """The packages of folders, and of releases that are fetched: name, version, folder.

    Args:
        wanted: as `python -m aseer.compat` is told.
        scratch: an empty folder, for what is fetched.
    Raises:
        CompatError: there is nothing of that name.
    """
    roots = []
    for i, text in enumerate(wanted):
        release = requirement(text)
        folder = Path(text)
        if release is not None and not folder.is_dir():
            folder = scratch / str(i)
            folder.mkdir()
            folder = fetch(release, folder)
        roots += unpacked_roots(folder)
    return roots


def torch_of(root: Path, package: str) -> str | None:
    """The torch that an unpacked wheel is built for; None if it does not say."""
    for metadata in root.glob(f"{package}*.dist-info/METADATA"):
        found = re.search(r"^Requires-Dist: torch==(\S+)", metadata.read_text(), re.M)
        if found is not None:
            return found[1]
    return None


def fetch(wanted: str, folder: Path) -> Path:
    """Download a wheel with pip, and unpack what is Python of it.

    Args:
        wanted: as `requirement` says it.
    Raises:
        CompatError: there is none for this Python, or pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), wanted]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompatError(f"pip did not fetch {wanted} in {_TIMEOUT_S:g} s") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"exit status {done.returncode}"
        raise CompatError(f"pip cannot fetch {wanted}: {why}")
    return unpack(wheels[0], folder / "unpacked")


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel's Python files, and what tells its version."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".py", ".dist-info/METADATA")):
                archive.extract(name, folder)
    return folder
