"""What it takes to pull KV from one node to another, learnt of pulls so far. Pure."""

from __future__ import annotations

# What is not pulled by then is computed.
PULL_TIMEOUT_S = 2.0
# Nothing is pulled that is expected to take longer.
_LONGEST_PULL_S = 0.75 * PULL_TIMEOUT_S
# At once: what more would wait behind them.
MAX_PULLS = 8
# After a pull that brought nothing, none is tried for so long, and for twice as long
# after each further one: a node that is cut off is not asked for every request.
_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 120.0
# What did not pay is tried again.
_RETRY_S = 300.0
# Of the latest pull, in the mean.
_WEIGHT = 0.2


class Link:
    """The way from one node to another."""

    def __init__(self) -> None:
        self._num_pulls = 0
        self._token_s: float | None = None
        self._closed_until_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._tried_at_s = 0.0

    @property
    def token_s(self) -> float | None:
        """Time that pulling a token takes; None = not known yet."""
        return self._token_s

    def pays(
        self, num_tokens: int, compute_token_s: float | None, now_s: float
    ) -> bool:
        """Whether so many tokens' KV is to be pulled now, rather than computed.

        Args:
            compute_token_s: what computing one takes; None = not known.
        """
        if now_s < self._closed_until_s or self._num_pulls >= MAX_PULLS:
            return False
        if self._token_s is not None and now_s - self._tried_at_s < _RETRY_S:
            is_slow = compute_token_s is not None and self._token_s >= compute_token_s
            if is_slow or self._token_s * num_tokens > _LONGEST_PULL_S:
                return False
        return True

    def begin(self, now_s: float) -> None:
        """A pull begins."""
        self._num_pulls += 1
        self._tried_at_s = now_s

    def over(self, num_tokens: int, seconds: float, error: str, now_s: float) -> bool:
        """A pull is over; whether nothing is pulled for a while.

        Args:
            num_tokens: that came. error: why not all did; "" = they did.
        """
        self._num_pulls -= 1
        if num_tokens:
            token_s = seconds / num_tokens
            known = token_s if self._token_s is None else self._token_s
            self._token_s = known + _WEIGHT * (token_s - known)
        if not error or num_tokens:
            self._pause_s = _FIRST_PAUSE_S
            return False
        if now_s >= self._closed_until_s:  # else it failed for the same reason
            self._closed_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True
