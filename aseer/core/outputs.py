"""What the requests of a rollout have generated, and the chunks that add to it.

Tokens, logprobs and text are kept in C++ (`csrc/outputs.h`), by handles, and a report
of all of an instance's chunks is taken in one call: a large cluster reports a million
times a second. Which parts of a report are taken, `columns.py` says.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from aseer.core._native import Outputs as _Outputs
from aseer.core._native import untracked

if TYPE_CHECKING:
    from aseer.core.columns import Columns
    from aseer.types import Past

__all__ = ["Outputs", "numbers_of"]

_RESTORED = (1 << 63) - 1  # the id of no other chunk
_ZERO = bytes(4)


class Outputs(_Outputs):
    """Tokens, logprobs and text by request."""

    def take_columns(self, report: Columns) -> tuple[int, list[int]]:
        """See `take`."""
        return self.take(
            report.chunk_ids,
            report.starts,
            report.counts,
            report.tokens,
            report.logprobs,
            report.text_starts,
            report.text_counts,
            report.text,
            [place for place, _ in report.ends],
        )

    def restore(self, request: int, past: Past) -> None:
        """Give a request that has nothing what it had in an earlier run."""
        num = array("i", [past.num_tokens]).tobytes()
        num_text = array("i", [len(past.text)]).tobytes()
        self.begin(_RESTORED, request, past.num_tokens)
        self.take(
            array("q", [_RESTORED]).tobytes(),
            _ZERO,
            num,
            past.tokens,
            past.logprobs,
            _ZERO,
            num_text,
            past.text,
            [],
        )
        self.end(_RESTORED)

    def token_ids(self, request: int) -> list[int]:
        """A request's tokens as numbers."""
        return numbers_of("i", self.tokens(request))

    def logprobs_of_tokens(self, request: int) -> list[float]:
        """A request's logprobs as numbers, one a token."""
        return numbers_of("f", self.logprobs(request))


def numbers_of(typecode: str, data: bytes) -> list[Any]:
    """Decode 32-bit numbers into a list that Python's garbage collector does not
    traverse.

    Trainers keep lists of ten thousand long responses. To traverse them takes each full
    collection a second.

    Args:
        typecode: `array`'s.
    """
    return untracked(array(typecode, data).tolist())
