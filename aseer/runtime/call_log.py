"""The file of a rollout's calls (`runtime/calls.py`), written on the engine's loop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from aseer.controller import Controller
from aseer.runtime.calls import LoggedController

if TYPE_CHECKING:
    from pathlib import Path

    from aseer.runtime.calls import Settings

_log = logging.getLogger("aseer")


class CallLog:
    """A file that is written until it is closed or cannot be written any more.

    A log is no reason to end a rollout: the first error ends the log, with a warning.
    """

    def __init__(self, path: Path) -> None:
        """Begin a new file."""
        self._path = path
        self._file = None
        try:
            self._file = path.open("wb")
        except OSError as error:
            self._give_up(error)

    def write(self, data: bytes) -> None:
        """Append, buffered."""
        if self._file is not None:
            try:
                self._file.write(data)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Write what is buffered, and end. May be called again."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        _log.warning("the log of calls %s ends here: %s", self._path, error)


def controller_of(settings: Settings, log: CallLog | None) -> Controller:
    """A rollout's controller, whose calls are written to the log if there is one."""
    if log is None:
        return Controller(**msgspec.structs.asdict(settings))
    return LoggedController(settings, log.write)
