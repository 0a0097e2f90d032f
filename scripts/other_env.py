"""Make an environment beside .venv, for tests that need one; do nothing if it is there.

    python scripts/other_env.py verl|skyrl|verifiers|megatron|oldest

It is .venv-NAME, with the packages of requirements/NAME.lock. Trainers that use aseer
have it from a wheel, as their users do, anew each time: the wheel is built from .venv,
which `make setup` has made and where engines run. In `oldest`, which has the oldest
vLLM that tests can run, engines run themselves, and aseer is the checkout's.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bootstrap
from bootstrap import ROOT, SetupError, must, pip, run, say

BUILDER = bootstrap.VENV_PYTHON
WHEELS = ROOT / "build" / "wheels"


@dataclass(frozen=True)
class Environment:
    """What an environment has beside its lock."""

    torch: bool = True
    aseer: Literal["wheel", "checkout", None] = "wheel"


ENVIRONMENTS = {
    "verl": Environment(),
    "skyrl": Environment(),
    "verifiers": Environment(torch=False, aseer=None),  # a client over HTTP
    "megatron": Environment(),
    "oldest": Environment(aseer="checkout"),
}


def use_environment(name: str) -> None:
    """Have the steps of `bootstrap` work on this environment, not on .venv."""
    bootstrap.VENV = ROOT / f".venv-{name}"
    bootstrap.VENV_PYTHON = bootstrap.VENV / "bin" / "python"
    bootstrap.STAMP = bootstrap.VENV / "aseer-setup.json"
    bootstrap.LOG = bootstrap.VENV / "aseer-setup.log"
    bootstrap.LOCK = ROOT / "requirements" / f"{name}.lock"


def set_up(environment: Environment) -> None:
    """Install the lock, if it is not there already, and aseer as it is now."""
    named = f"{sys.version_info[:2]} {bootstrap.TORCH}\n".encode()
    want = {"packages": hashlib.sha256(named + bootstrap.LOCK.read_bytes()).hexdigest()}
    if bootstrap.stamped() != want:
        bootstrap.make_venv()
        bootstrap.STAMP.unlink(missing_ok=True)
        bootstrap.drop_half_installed()
        if environment.torch:
            bootstrap.install_torch()
        bootstrap.install_packages()
        bootstrap.STAMP.write_text(json.dumps(want))
    if environment.aseer == "checkout":
        install_checkout()
    if environment.aseer == "wheel":
        install_wheel()
    say(f"{bootstrap.VENV.name} is ready")


def install_checkout() -> None:
    """Build the native module apart from .venv's; leave Python files in place."""
    build = f"build-dir=build/{bootstrap.VENV.name}"
    arguments = ["--no-deps", "--no-build-isolation", "--config-settings", build]
    must(pip("install", *arguments, "--editable", "."), "building aseer")


def install_wheel() -> None:
    """Install aseer from a wheel of this checkout."""
    for old in WHEELS.glob("aseer-*.whl"):
        old.unlink()
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(WHEELS), "."]
    must(run([str(BUILDER), "-m", "pip", *wheel]), "building a wheel of aseer")
    (built,) = WHEELS.glob("aseer-*.whl")
    must(
        pip("install", "--no-deps", "--force-reinstall", str(built)),
        "installing aseer",
    )


def main() -> int:
    """Set up, under the Python that .venv has."""
    if len(sys.argv) != 2 or sys.argv[1] not in ENVIRONMENTS:
        sys.stderr.write(f"usage: {sys.argv[0]} {'|'.join(ENVIRONMENTS)}\n")
        return 2
    if Path(sys.prefix) != BUILDER.parent.parent:
        return subprocess.call([str(BUILDER), *sys.argv])
    use_environment(sys.argv[1])
    try:
        set_up(ENVIRONMENTS[sys.argv[1]])
    except SetupError as error:
        sys.stderr.write(f"set-up failed: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
