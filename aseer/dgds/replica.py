"""An engine's copy of its groups' suffix trees, and which request is which in it.

The token path (`begin`, `follow`, `draft`, `end`) works on the copy alone; a background
thread brings what siblings wrote on other engines (`fetch`, `apply`). Both may be
called at the same time. While a request runs here, only this engine writes the
request's text.

Whatever the order of messages, the trees end up the same: a tree is a function of its
texts, and a text only grows by tokens that follow what it has.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from aseer.dgds.cst import SuffixForest
from aseer.dgds.messages import FetchCst, GroupEntry, RegisterGroups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aseer.dgds.cst import Drafts, GroupHandle, RequestHandle
    from aseer.dgds.messages import Deltas, GroupDelta

# A tree is locked while it grows, and the token path must not wait long for the lock.
_MAX_APPENDED_AT_ONCE = 256


class RequestKey(NamedTuple):
    """Names a request uniquely over the engine's life."""

    group_id: str
    request_id: str


@dataclass
class _Group:
    handle: GroupHandle
    prompt_key: bytes
    last_used_s: float
    requests: dict[str, RequestHandle] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    is_registered: bool = False


class Replica:
    """Suffix trees of the groups that this engine works on.

    Args:
        ttl_s: a group that had no request here for so long is forgotten; if a request
            of the group comes later, the group's texts are fetched again.
    """

    def __init__(self, *, ttl_s: float, forest: SuffixForest | None = None) -> None:
        self.forest = forest or SuffixForest()
        self._ttl_s = ttl_s
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()  # over ids and handles; never while a tree grows

    # Token path

    def begin(
        self,
        key: RequestKey,
        prompt: NDArray[np.int32],
        generated: NDArray[np.int32],
        now: float,
        images: str = "",
    ) -> RequestHandle:
        """Begin a chunk of a request, with the tokens that earlier chunks generated.

        Args:
            images: tells apart prompts of the same tokens whose images differ.
        """
        with self._lock:
            group = self._groups.get(key.group_id)
            if group is None:
                handle = self.forest.open_group(prompt)
                group = _Group(handle, prompt_key_of(prompt, images), now)
                self._groups[key.group_id] = group
            group.running.add(key.request_id)
            group.last_used_s = now
            request = self._open_request(group, key.request_id)
        known = self.forest.tokens(request)
        if not np.array_equal(known[: len(generated)], generated[: len(known)]) or len(
            known
        ) > len(generated):
            # The text here has tokens that were sampled but not kept, for example by an
            # engine that died.
            request = self._reopen_request(group, key.request_id)
            known = known[:0]
        self._append(request, generated[len(known) :], len(known))
        return request

    def follow(
        self,
        requests: NDArray[np.int64],
        texts: NDArray[np.int32],
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        num_tokens: NDArray[np.int32],
    ) -> int:
        """See `SuffixForest.follow`."""
        return self.forest.follow(requests, texts, rows, starts, num_tokens)

    def draft(
        self,
        requests: NDArray[np.int64],
        max_draft_tokens: NDArray[np.int32],
        min_confidence: float,
    ) -> Drafts:
        """See `SuffixForest.draft`."""
        return self.forest.draft(
            requests, max_draft_tokens, min_confidence=min_confidence
        )

    def end(self, key: RequestKey, now: float) -> None:
        """A chunk is over; its text stays for its siblings."""
        with self._lock:
            group = self._groups.get(key.group_id)
            if group is not None:
                group.running.discard(key.request_id)
                group.last_used_s = now

    # Background

    def registration(self) -> RegisterGroups | None:
        """The groups that the server was not told of yet; None if there are none."""
        with self._lock:
            new = [g for g in self._groups.items() if not g[1].is_registered]
            for _, group in new:
                group.is_registered = True
        entries = [GroupEntry(i, g.prompt_key, self._ttl_s) for i, g in new]
        return RegisterGroups(entries) if entries else None

    def fetch(self) -> FetchCst | None:
        """The question for what is new; None if there is no group."""
        with self._lock:
            groups = {i: dict(g.requests) for i, g in self._groups.items()}
        if not groups:
            return None
        return FetchCst({i: self._counts(r) for i, r in groups.items()})

    def apply(self, deltas: Deltas) -> None:
        """Add what the server knows to the trees."""
        for delta in deltas.groups:
            if delta.is_known:
                self._apply(delta)
            else:
                self._forget(delta.group_id)

    def forget_unused(self, now: float) -> None:
        """Forget the groups that had no request here for their ttl."""
        for group_id, group in list(self._groups.items()):
            if not group.running and group.last_used_s + self._ttl_s < now:
                self._forget(group_id)

    def text(self, key: RequestKey) -> NDArray[np.int32]:
        """A request's tokens as they are known here."""
        return self.forest.tokens(self._groups[key.group_id].requests[key.request_id])

    def _apply(self, delta: GroupDelta) -> None:
        for row in delta.requests:
            with self._lock:
                group = self._groups.get(delta.group_id)
                if group is None:
                    return
                if row.request_id in group.running:
                    continue  # this engine knows the request's text better
                request = self._open_request(group, row.request_id)
            with suppress(KeyError):  # the request was reopened, or its group is gone
                self._append(request, np.frombuffer(row.tokens, np.int32), row.start)

    def _append(
        self, request: RequestHandle, tokens: NDArray[np.int32], start: int
    ) -> None:
        handle = np.array([request])
        for i in range(0, len(tokens), _MAX_APPENDED_AT_ONCE):
            some = np.ascontiguousarray(tokens[i : i + _MAX_APPENDED_AT_ONCE])
            self.forest.append(
                handle, some, np.array([0, len(some)]), np.array([start + i])
            )

    def _open_request(self, group: _Group, request_id: str) -> RequestHandle:
        handle = group.requests.get(request_id)
        if handle is None:
            handle = self.forest.open_request(group.handle)
            group.requests[request_id] = handle
        return handle

    def _reopen_request(self, group: _Group, request_id: str) -> RequestHandle:
        with self._lock:
            old = group.requests.pop(request_id)
            handle = self._open_request(group, request_id)
        self.forest.close_requests(np.array([old]))
        return handle

    def _counts(self, requests: dict[str, RequestHandle]) -> dict[str, int]:
        handles = np.fromiter(requests.values(), np.int64, len(requests))
        nothing = np.zeros(len(requests) + 1, np.int64)
        try:
            counts = self.forest.append(handles, np.empty(0, np.int32), nothing)
        except KeyError:  # one was reopened meanwhile
            return {}
        return dict(zip(requests, counts.tolist(), strict=True))

    def _forget(self, group_id: str) -> None:
        """Drop a group that is finished; register one again that still runs here."""
        with self._lock:
            group = self._groups.get(group_id)
            if group is None:
                return
            if group.running:
                group.is_registered = False
                return
            del self._groups[group_id]
        self.forest.close_group(group.handle)


def prompt_key_of(prompt: NDArray[np.int32], images: str = "") -> bytes:
    """A short name of a prompt's text and images."""
    whole = prompt.tobytes() + images.encode()
    return hashlib.blake2b(whole, digest_size=16).digest()
