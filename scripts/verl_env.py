"""Make .venv-verl what verl's trainer needs; do nothing, at once, if it already is.

aseer is installed there from a wheel, as its users have it, anew each time: the wheel
is built from .venv, which `make setup` has made and where engines run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import bootstrap
from bootstrap import ROOT, SetupError, must, pip, run, say

BUILDER = bootstrap.VENV_PYTHON
WHEELS = ROOT / "build" / "wheels"


def use_environment() -> None:
    """Have the steps of `bootstrap` work on this environment, not on .venv."""
    bootstrap.VENV = ROOT / ".venv-verl"
    bootstrap.VENV_PYTHON = bootstrap.VENV / "bin" / "python"
    bootstrap.STAMP = bootstrap.VENV / "aseer-setup.json"
    bootstrap.LOG = bootstrap.VENV / "aseer-setup.log"
    bootstrap.LOCK = ROOT / "requirements" / "verl.lock"


def set_up() -> None:
    """Install the lock, if it is not there already, and aseer as it is now."""
    named = f"{sys.version_info[:2]} {bootstrap.TORCH}\n".encode()
    want = {"packages": hashlib.sha256(named + bootstrap.LOCK.read_bytes()).hexdigest()}
    if bootstrap.stamped() != want:
        bootstrap.make_venv()
        bootstrap.STAMP.unlink(missing_ok=True)
        bootstrap.drop_half_installed()
        bootstrap.install_torch()
        bootstrap.install_packages()
        bootstrap.STAMP.write_text(json.dumps(want))
    for old in WHEELS.glob("aseer-*.whl"):
        old.unlink()
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(WHEELS), "."]
    must(run([str(BUILDER), "-m", "pip", *wheel]), "building a wheel of aseer")
    (built,) = WHEELS.glob("aseer-*.whl")
    must(
        pip("install", "--no-deps", "--force-reinstall", str(built)),
        "installing aseer",
    )
    say(f"{bootstrap.VENV.name} is ready")


def main() -> int:
    """Set up, under the Python that .venv has."""
    if Path(sys.prefix) != BUILDER.parent.parent:
        return subprocess.call([str(BUILDER), __file__])
    use_environment()
    try:
        set_up()
    except SetupError as error:
        sys.stderr.write(f"set-up failed: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
