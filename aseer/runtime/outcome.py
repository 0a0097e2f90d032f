"""What a rollout's reader is told at the end: nothing, or why not all went well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.errors import EngineClosedError, InstanceLostError, RolloutError

if TYPE_CHECKING:
    from aseer.types import Response


class Outcome:
    """What became of a rollout, as far as its reader has to know."""

    def __init__(self) -> None:
        #: Why no instance is left, once none is.
        self.fatal: str | None = None
        #: Whether the engine was closed under the rollout.
        self.engine_closed = False
        self._num_errors = 0
        self._first_error = ""

    def count(self, response: Response) -> None:
        """A response is there; one that is an error counts."""
        if response.finish_reason == "error":
            self._num_errors += 1
            self._first_error = (
                self._first_error or f"{response.request_id}: {response.error}"
            )

    def error(self, num_finished: int, *, was_left: bool) -> Exception | None:
        """What is raised at the end of the responses.

        Args:
            num_finished: requests, of which the errors are a part.
            was_left: whoever left the rollout is told neither of a closed engine nor of
                requests that failed.
        """
        if self.fatal is not None:
            return InstanceLostError(self.fatal)
        if self.engine_closed and not was_left:
            return EngineClosedError(
                "the engine was closed while this rollout was in progress"
            )
        if self._num_errors and not was_left:
            return RolloutError(
                f"{self._num_errors} of {num_finished} requests ended in an error "
                f"(their Responses say which); the first: {self._first_error}"
            )
        return None
