"""Removes what an engine leaves, from outside of everything that is killed with it.

Each process of an engine removes what is left when its controller dies. A supervisor
such as Ray kills a process together with its children, so that none of them can. So
this one is nobody's child: its parent ends at once, and it waits for the controller's
end, or the engine's, by itself.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

from aseer.node.children import inherited
from aseer.node.leftovers import sweep_one
from aseer.node.lifeline import VARIABLE, Lifeline, opened

# How often it is seen whether the engine was closed, and then whether its processes,
# which end by themselves, are all dead.
_POLL_S = 1.0
# After that many seconds it gives up: then processes live on that the next engine's
# sweep will not disturb either.
_PATIENCE_S = 120.0


def start_janitor(run_dir: Path) -> None:
    """Start one for an engine of this process; it ends when the engine has.

    Raises:
        OSError: no process can be started.
        subprocess.SubprocessError: it failed.
    """
    lifeline = Lifeline.to_this_process(run_dir)
    subprocess.run(
        [sys.executable, "-P", "-m", "aseer.node.janitor"],
        env=inherited(os.environ, sys.path) | lifeline.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
        timeout=_PATIENCE_S,
    )


def wait_and_clean(lifeline: Lifeline) -> bool:
    """Wait for the end of the engine; whether all that it left is gone."""
    run_dir = Path(lifeline.run_dir)
    with opened(lifeline) as process:
        while lifeline.is_intact() and run_dir.exists():
            if process is None:
                time.sleep(_POLL_S)
            else:
                select.select([process], [], [], _POLL_S)
    deadline = time.monotonic() + _PATIENCE_S
    while run_dir.exists() and time.monotonic() < deadline:
        if not sweep_one(run_dir):
            time.sleep(_POLL_S / 10)
    return not run_dir.exists()


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)  # or whoever reads to its end would wait for this process
    wait_and_clean(Lifeline.of_this_process({VARIABLE: os.environ[VARIABLE]}))
