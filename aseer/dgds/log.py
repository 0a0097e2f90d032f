"""What every group has generated, as logs of tokens that only grow.

Every suffix tree is a function of such a log, and an engine whose copy has missed
something asks again from an offset. Pure: time is an argument.

Ids are unique over the log's life: a group, or a request, of the same name in a later
rollout has another id. A group lives from its first token until it is finished, or
until no engine has asked for the group for its ttl. The texts of finished groups are
kept, within bounds, for later groups with the same prompt; `forget_kept` drops them.

Source: Seer §3.4 (`update_cst`, `register_group`, `fetch_cst`). Differs: texts outlive
their group for the next one with the same prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aseer.dgds.messages import GroupDelta, RequestDelta

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOKEN_BYTES = 4
# Of a group that no engine has registered yet.
DEFAULT_TTL_S = 600.0
# Of finished groups: 200 MB, at 4 bytes a token.
MAX_KEPT_TOKENS = 50_000_000
# Of a prompt, over all rollouts.
MAX_KEPT_TEXTS = 32
# Of an answer, so that none takes long to make or to read.
MAX_DELTA_TOKENS = 65_536


@dataclass
class _Group:
    texts: dict[str, bytearray] = field(default_factory=dict)
    prompt_key: bytes = b""
    ttl_s: float = DEFAULT_TTL_S
    expires_at_s: float = 0.0


class TokenLog:
    """The logs of all groups.

    Args:
        max_kept_tokens: tokens of finished groups to keep; the oldest go first. 0 keeps
            none.
    """

    def __init__(self, *, max_kept_tokens: int = MAX_KEPT_TOKENS) -> None:
        self._max_kept_tokens = max_kept_tokens
        self._groups: dict[str, _Group] = {}
        self._kept: OrderedDict[bytes, dict[str, bytes]] = OrderedDict()
        self._num_kept_tokens = 0

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._groups

    def __len__(self) -> int:
        return len(self._groups)

    def update_cst(
        self,
        group_id: str,
        request_id: str,
        prev_token_count: int,
        new_tokens: bytes,
        now: float,
    ) -> None:
        """Append tokens that follow a request's first `prev_token_count`.

        Tokens that are known already are skipped. Tokens that would leave a gap, and
        bytes that are no tokens, are ignored.
        """
        if prev_token_count < 0 or len(new_tokens) % _TOKEN_BYTES:
            return
        text = self._touch(group_id, now).texts.setdefault(request_id, bytearray())
        known = len(text) - prev_token_count * _TOKEN_BYTES
        if 0 <= known < len(new_tokens):
            text += new_tokens[known:]

    def register_group(
        self, group_id: str, prompt_key: bytes, ttl_s: float, now: float
    ) -> None:
        """Give a group its prompt's key, its ttl, and the texts kept for that key."""
        # Over, or without a token yet: then the engine asks again.
        if group_id not in self._groups:
            return
        group = self._touch(group_id, now)
        group.prompt_key = prompt_key
        group.ttl_s = ttl_s
        group.expires_at_s = now + ttl_s
        for request_id, text in self._kept.get(prompt_key, {}).items():
            group.texts.setdefault(request_id, bytearray(text))

    def fetch_cst(
        self, cache_infos: Mapping[str, Mapping[str, int]], now: float
    ) -> list[GroupDelta]:
        """What each group has beyond what the asking engine has.

        At most `MAX_DELTA_TOKENS` tokens are given; the rest comes with the next fetch.
        """
        deltas = []
        room = MAX_DELTA_TOKENS
        for group_id, counts in cache_infos.items():
            if group_id not in self._groups:
                deltas.append(GroupDelta(group_id, False, []))
                continue
            requests = []
            for request_id, text in self._touch(group_id, now).texts.items():
                start = counts.get(request_id, 0)
                end = min(len(text) // _TOKEN_BYTES, start + room)
                if end > start:
                    tokens = text[start * _TOKEN_BYTES : end * _TOKEN_BYTES]
                    requests.append(RequestDelta(request_id, start, bytes(tokens)))
                    room -= end - start
            if requests:
                deltas.append(GroupDelta(group_id, True, requests))
        return deltas

    def finish_group(self, group_id: str) -> None:
        """Forget a group; its texts may be kept for the next with the same prompt."""
        group = self._groups.pop(group_id, None)
        if group is None or not group.prompt_key or not self._max_kept_tokens:
            return
        texts = dict(self._kept.get(group.prompt_key, {}))
        texts |= {name: bytes(text) for name, text in group.texts.items() if text}
        self._drop_kept(group.prompt_key)
        if not texts:  # an entry without tokens would never be dropped
            return
        for name in list(texts)[:-MAX_KEPT_TEXTS]:
            del texts[name]
        self._kept[group.prompt_key] = texts
        self._num_kept_tokens += _num_tokens(texts)
        while self._num_kept_tokens > self._max_kept_tokens:
            self._drop_kept(next(iter(self._kept)))

    def forget_kept(self) -> None:
        """Drop the texts of finished groups."""
        self._kept.clear()
        self._num_kept_tokens = 0

    def expire(self, now: float) -> None:
        """Forget the groups that nobody has asked for or added to for their ttl."""
        for group_id, group in list(self._groups.items()):
            if group.expires_at_s <= now:
                del self._groups[group_id]

    def _touch(self, group_id: str, now: float) -> _Group:
        group = self._groups.get(group_id)
        if group is None:
            self._groups[group_id] = group = _Group()
        group.expires_at_s = max(group.expires_at_s, now + group.ttl_s)
        return group

    def _drop_kept(self, prompt_key: bytes) -> None:
        texts = self._kept.pop(prompt_key, None)
        if texts is not None:
            self._num_kept_tokens -= _num_tokens(texts)


def _num_tokens(texts: Mapping[str, bytes]) -> int:
    return sum(map(len, texts.values())) // _TOKEN_BYTES
