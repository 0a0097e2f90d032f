"""Make an environment beside .venv, for tests that need one; do nothing if it is there.

    python scripts/other_env.py verl|skyrl|verifiers|megatron|oldest

It is .venv-NAME, with the packages of requirements/NAME.lock. Trainers that use aseer
have it from a wheel, as their users do, anew each time: the wheel is built from .venv,
which `make setup` has made and where engines run. In `oldest`, which has the oldest
vLLM that aseer works with, engines run themselves, and aseer is the checkout's.
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
    """What an environment has beside its lock.

    Attributes:
        torch: the version of its CPU build; None = none.
        gpu_torch: a lock with torch's build for GPUs, and the libraries without which
            that cannot be imported, for where no CPU build of this version can be had.
            The two compute alike on a CPU.
    """

    torch: str | None = bootstrap.TORCH
    gpu_torch: str | None = None
    aseer: Literal["wheel", "checkout", None] = "wheel"


ENVIRONMENTS = {
    "verl": Environment(),
    "skyrl": Environment(),
    "verifiers": Environment(torch=None, aseer=None),  # a client over HTTP
    "megatron": Environment(),
    "oldest": Environment(
        torch="2.11.0", gpu_torch="oldest-torch.lock", aseer="checkout"
    ),
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
    named = f"{sys.version_info[:2]} {environment.torch}\n".encode()
    want = {"packages": hashlib.sha256(named + bootstrap.LOCK.read_bytes()).hexdigest()}
    if bootstrap.stamped() != want:
        bootstrap.make_venv()
        bootstrap.STAMP.unlink(missing_ok=True)
        bootstrap.drop_half_installed()
        install_torch(environment)
        bootstrap.install_packages()
        bootstrap.STAMP.write_text(json.dumps(want))
    if environment.aseer == "checkout":
        install_checkout()
    if environment.aseer == "wheel":
        install_wheel()
    say(f"{bootstrap.VENV.name} is ready")


def install_torch(environment: Environment) -> None:
    """Install the torch of an environment, if it has one."""
    if environment.torch is None:
        return
    bootstrap.TORCH = environment.torch
    try:
        bootstrap.install_torch()
    except SetupError:
        if environment.gpu_torch is None:
            raise
        lock = ROOT / "requirements" / environment.gpu_torch
        say(f"  there is none; installing the build for GPUs of {lock.name}, 4 GB")
        arguments = ["--no-deps", "--progress-bar", "off", "-r", str(lock)]
        must(pip("install", *arguments), "installing torch's build for GPUs")


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
