"""`aseer`, with a thread that writes every few seconds how many objects it has.

python -m tests.integration.counted node --controller tcp://head:5557
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

_INTERVAL_S = 10.0


def begin_to_count() -> None:
    """Write to this process's `counts_file`, from now on."""
    path = counts_file(Path(tempfile.gettempdir()), os.getpid())
    threading.Thread(target=_count, args=(path,), daemon=True).start()


def counts_file(folder: Path, pid: int) -> Path:
    """Where a process whose temporary files go to a folder writes it."""
    return folder / f"objects-{pid}"


def _count(path: Path) -> None:
    new = path.with_suffix(".new")
    while True:
        gc.collect()
        with suppress(OSError):
            new.write_text(str(len(gc.get_objects())))
            new.replace(path)
        time.sleep(_INTERVAL_S)


if __name__ == "__main__":
    from aseer.cli.main import main

    begin_to_count()
    sys.exit(main())
