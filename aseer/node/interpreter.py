"""The Python that engine processes run on: ours, or one of another environment.

A trainer's packages and vLLM's may exclude each other. With `EngineConfig.python` the
engines, and the KV pool's servers, run on the interpreter of an environment of their
own, which has vLLM and the same release of aseer. What is installed there is asked of
that interpreter (`python -m aseer.node.interpreter` answers); nothing of vLLM's is
needed here.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.compat.versions import installed_packages
from aseer.errors import ConfigError
from aseer.node.children import inherited
from aseer.transport.base import PROTOCOL_VERSION
from aseer.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

# Starting an interpreter and importing aseer's own few packages takes a second; a cold
# network file system may take many.
_ANSWER_TIMEOUT_S = 120.0
# What points an interpreter at another environment's packages.
_OF_THIS_ENVIRONMENT = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "__PYVENV_LAUNCHER__",
)


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An interpreter, and what it can import.

    Attributes:
        python: its path.
        packages: versions of the distributions that aseer asks for, by name.
        is_ours: whether it is the one that this process runs on.
    """

    python: str
    packages: Mapping[str, str]
    is_ours: bool

    def command(self, module: str, *arguments: str) -> tuple[str, ...]:
        """What runs a module, whatever lies in the working directory."""
        return (self.python, "-P", "-m", module, *arguments)

    def environment(self) -> dict[str, str]:
        """What a process of it inherits of ours."""
        environ = inherited(os.environ, sys.path)
        if not self.is_ours:
            for name in _OF_THIS_ENVIRONMENT:
                environ.pop(name, None)
        return environ


def this_interpreter() -> Interpreter:
    """The one that this process runs on."""
    return Interpreter(sys.executable, installed_packages(), True)


def interpreter_at(python: str | None) -> Interpreter:
    """An interpreter that engines can run on; None = the one of this process.

    Raises:
        ConfigError: it cannot be run, or has not the aseer that this process has.
    """
    if python is None:
        return this_interpreter()
    bare = Interpreter(python, {}, False)
    said = _ask(bare)
    mine = _description()
    for name in ("aseer", "protocol"):
        if said.get(name) != mine[name]:
            raise ConfigError(
                f"python={python!r} has aseer {said.get('aseer')} (protocol "
                f"{said.get('protocol')}), and this process has {mine['aseer']} "
                f"(protocol {mine['protocol']}); install the same in both"
            )
    return Interpreter(python, said["packages"], False)


def _ask(interpreter: Interpreter) -> dict[str, Any]:
    python = interpreter.python
    try:
        done = subprocess.run(
            interpreter.command("aseer.node.interpreter"),
            capture_output=True,
            text=True,
            timeout=_ANSWER_TIMEOUT_S,
            env=interpreter.environment(),
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"python={python!r} cannot be run: {error}; give the path of an "
            "environment's interpreter, such as /opt/vllm/bin/python"
        ) from error
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(
            f"python={python!r} does not have aseer's {_description()['aseer']} "
            f"({last}); install it there: {python} -m pip install aseer"
        ) from None
    return dict(said)


def _description() -> dict[str, Any]:
    return {
        "aseer": __version__,
        "protocol": PROTOCOL_VERSION,
        "python": platform.python_version(),
        "packages": installed_packages(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_description()) + "\n")
