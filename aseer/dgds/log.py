"""What every group has generated, as logs of tokens that only grow.

Every suffix tree is a function of such a log, and an engine whose copy has missed
something asks again from an offset. Pure: time is an argument. What requests generate
is not copied: the log reads it where the controller keeps it (`aseer.core.outputs`).

Ids are unique over the log's life: a group, or a request, of the same name in a later
rollout has another id. A group lives from its first request on until it is finished, or
until no engine has asked for the group for its ttl. The texts of finished groups are
kept, within bounds, for later groups with the same prompt; `forget_kept` drops them.

Source: Seer §3.4 (`update_cst`, `register_group`, `fetch_cst`). Differs: texts outlive
their group for the next one with the same prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from aseer.core._native import TokenLog as _Groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.core.outputs import Outputs

_TOKEN_BYTES = 4
# Of finished groups: 200 MB, at 4 bytes a token.
MAX_KEPT_TOKENS = 50_000_000
# Of a prompt, over all rollouts.
MAX_KEPT_TEXTS = 32


class TokenLog:
    """The logs of all groups.

    Args:
        max_kept_tokens: tokens of finished groups to keep; the oldest go first. 0 keeps
            none.
    """

    def __init__(self, *, max_kept_tokens: int = MAX_KEPT_TOKENS) -> None:
        self._max_kept_tokens = max_kept_tokens
        self._groups = _Groups()
        self._kept: OrderedDict[bytes, dict[str, bytes]] = OrderedDict()
        self._num_kept_tokens = 0

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._groups

    def __len__(self) -> int:
        return len(self._groups)

    def follow(
        self, group_id: str, request_id: str, outputs: Outputs, handle: int, now: float
    ) -> None:
        """A request's text is what it has generated, from now on whenever it is read.

        Args:
            outputs: that keep it, and share it with this log.
        """
        self._groups.follow(group_id, request_id, outputs, handle, now)

    def update_cst(
        self,
        group_id: str,
        request_id: str,
        prev_token_count: int,
        new_tokens: bytes,
        now: float,
    ) -> None:
        """Append tokens that follow the first `prev_token_count` of a request that is
        not followed.

        Tokens that are known already are skipped. Tokens that would leave a gap, and
        bytes that are no tokens, are ignored.
        """
        self._groups.append(group_id, request_id, prev_token_count, new_tokens, now)

    def register_group(
        self, group_id: str, prompt_key: bytes, ttl_s: float, now: float
    ) -> None:
        """Give a group its prompt's key, its ttl, and the texts kept for that key."""
        # A group that is not known is over, or has no request yet; then the engine asks
        # again.
        if self._groups.register(group_id, prompt_key, ttl_s, now):
            for request_id, text in self._kept.get(prompt_key, {}).items():
                self._groups.append(group_id, request_id, 0, text, now)

    def fetch_cst(self, cache_infos: bytes, now: float) -> bytes:
        """What each group has beyond what the asking engine has.

        Tokens beyond a bound for one answer come with the next fetch.

        Args:
            cache_infos: as `FetchCst` has them, in MessagePack.

        Returns:
            The answer, `Deltas`, in MessagePack.

        Raises:
            ValueError: the argument is malformed.
        """
        return self._groups.fetch(cache_infos, now)

    def finish_group(self, group_id: str) -> None:
        """Forget a group; its texts may be kept for the next with the same prompt."""
        prompt_key, finished = self._groups.finish(group_id)
        if not prompt_key or not self._max_kept_tokens:
            return
        texts = self._kept.get(prompt_key, {}) | finished
        self._drop_kept(prompt_key)
        if not texts:  # an entry without tokens would never be dropped
            return
        for name in list(texts)[:-MAX_KEPT_TEXTS]:
            del texts[name]
        self._kept[prompt_key] = texts
        self._num_kept_tokens += _num_tokens(texts)
        while self._num_kept_tokens > self._max_kept_tokens:
            self._drop_kept(next(iter(self._kept)))

    def forget_kept(self) -> None:
        """Drop the texts of finished groups."""
        self._kept.clear()
        self._num_kept_tokens = 0

    def expire(self, now: float) -> None:
        """Forget the groups that nobody has asked for or added to for their ttl."""
        self._groups.expire(now)

    def _drop_kept(self, prompt_key: bytes) -> None:
        texts = self._kept.pop(prompt_key, None)
        if texts is not None:
            self._num_kept_tokens -= _num_tokens(texts)


def _num_tokens(texts: Mapping[str, bytes]) -> int:
    return sum(map(len, texts.values())) // _TOKEN_BYTES
