"""What a process wrote to its log, and the cause it gives for its end."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# A child that has run for weeks may have written more than is worth reading at its end.
_LOG_BYTES = 4 << 20
# What vLLM says after the real cause, and what follows from a death rather than causing
# it.
_NOT_A_CAUSE = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineDeadError",
    "died unexpectedly",
)
_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)): ?(.*)")


class Log:
    """What a child has written to its log."""

    def __init__(self, path: Path, start: int) -> None:
        """`start` is where it begins, in bytes; before it is what others wrote."""
        self._path = path
        self._start = start

    def text(self) -> str:
        """Its last megabytes; empty if it is gone."""
        try:
            with self._path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._start, end - _LOG_BYTES))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def tail(self, num_lines: int) -> str:
        """The last lines."""
        return "\n".join(self.text().splitlines()[-num_lines:])


def cause_from_log(text: str) -> str | None:
    """The last error in a log that is a cause and not a consequence."""
    cause = None
    for line in text.splitlines():
        match = _ERROR_LINE.search(line)
        if match and not any(text in line for text in _NOT_A_CAUSE):
            cause = f"{match[1]}: {match[2]}".rstrip(": ")
    return cause
