"""What a running chunk reports, taken into its request once and in its place.

Tokens, their logprobs and text are streams that only grow, and a report says where in
each it begins. So reports may be lost, late, doubled, cut differently or overtaken:
what was taken before is skipped, and a report that does not follow on it is refused. A
refusal shows that another report is missing, or that the instance speaks nonsense;
either way the chunk is broken, and what it goes on to generate is of no use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array

    from aseer.types import ChunkProgress

_TOKEN_BYTES = 4  # and a logprob's


class Intake:
    """Takes one chunk's reports.

    Attributes:
        num_cached_tokens: the first that was reported; None until then.
        is_broken: a report was refused.
    """

    __slots__ = (
        "_logprobs",
        "_max_tokens",
        "_num_tokens",
        "_text",
        "_text_length",
        "_tokens",
        "is_broken",
        "num_cached_tokens",
    )

    def __init__(
        self,
        tokens: array[int],
        logprobs: array[float],
        text: list[str],
        max_tokens: int,
    ) -> None:
        """Take nothing yet.

        Args:
            tokens, logprobs, text: of earlier chunks; what is taken is appended.
            max_tokens: that this chunk may generate.
        """
        self._tokens = tokens
        self._logprobs = logprobs
        self._text = text
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._text_length = 0
        self.num_cached_tokens: int | None = None
        self.is_broken = False

    def extend(self, report: ChunkProgress) -> int:
        """Append the very next tokens, the usual case; how many they are.

        Returns:
            -1, and nothing is taken: it is not as simple as that, so `take` it.
        """
        tokens, logprobs = report.tokens, report.logprobs
        start, num_bytes = self._num_tokens, len(tokens)
        num = num_bytes // _TOKEN_BYTES
        end = start + num
        if (
            report.start != start
            or num_bytes != num * _TOKEN_BYTES
            or num_bytes != len(logprobs)
            or end > self._max_tokens
            or report.text_start != self._text_length
        ):
            return -1
        self._tokens.frombytes(tokens)
        self._logprobs.frombytes(logprobs)
        self._num_tokens = end
        if report.text:
            self._text.append(report.text)
            self._text_length += len(report.text)
        return num

    def take(self, report: ChunkProgress) -> bool:
        """Append what of a report is new; False, and nothing, if it is refused."""
        num = len(report.tokens) // _TOKEN_BYTES
        end = report.start + num
        follows = (
            len(report.tokens) == len(report.logprobs) == num * _TOKEN_BYTES
            and 0 <= report.start <= self._num_tokens
            and end <= self._max_tokens
            and 0 <= report.text_start <= self._text_length
        )
        if not follows:
            self.is_broken = True
            return False
        first = (self._num_tokens - report.start) * _TOKEN_BYTES
        self._tokens.frombytes(report.tokens[first:])
        self._logprobs.frombytes(report.logprobs[first:])
        self._num_tokens = max(self._num_tokens, end)
        text = report.text[self._text_length - report.text_start :]
        if text:
            self._text.append(text)
            self._text_length += len(text)
        if self.num_cached_tokens is None:
            self.num_cached_tokens = report.num_cached_tokens
        return True
