"""What must be the same for a journal to be gone on with, and words for what is not.

A group is known by the id that its user gave and by its content: prompt, size, and all
that decides how it is sampled. Without an id it is known by its content alone, and
groups of equal content are told apart by their order, which changes nothing of what
they sample. So groups with ids may come in any order.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import ConfigError
from aseer.types import GroupKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aseer.types import Task

_DIGEST_BYTES = 16
_SORTED = msgspec.msgpack.Encoder(order="deterministic")
_MAX_NAMED = 3


class KeyMaker:
    """Makes the keys of a rollout's groups, in the order in which they come."""

    def __init__(self) -> None:
        self._num_alike: Counter[GroupKey] = Counter()

    def key_of(self, task: Task, *, has_own_id: bool) -> GroupKey:
        """The group's key.

        Args:
            has_own_id: whether the user gave the id, or it was made.
        """
        settings = [task.max_tokens, task.min_tokens, task.seed, task.sampling]
        key = GroupKey(
            task.group_id if has_own_id else "",
            _digest(task.prompt_key),
            _digest(_SORTED.encode(settings)),
            task.num_requests,
        )
        if has_own_id:
            return key
        occurrence = self._num_alike[key]
        self._num_alike[key] += 1
        return key._replace(occurrence=occurrence)


def digest_of(keys: Iterable[GroupKey]) -> bytes:
    """Of all groups of a rollout, in any order."""
    return _digest(_SORTED.encode(sorted(keys)))


class Known:
    """A journal's groups, to compare with."""

    def __init__(self, keys: Iterable[GroupKey], digest: bytes | None) -> None:
        """`digest` is of all the groups, if they were known from the start."""
        self._keys = frozenset(keys)
        self._named = {key.group_id: key for key in self._keys if key.group_id}
        self._digest = digest

    def check(self, key: GroupKey) -> None:
        """See that a group is the one that the journal knows by its id, if it does.

        Raises:
            ConfigError: it has another prompt, size or other settings.
        """
        known = self._named.get(key.group_id)
        if known is not None and known != key:
            raise ConfigError(f"group {key.group_id!r} has {_difference(known, key)}")

    def check_all(self, keys: Iterable[GroupKey]) -> None:
        """See that a whole rollout's groups are the journal's.

        Raises:
            ConfigError: they are not.
        """
        keys = list(keys)
        for key in keys:
            self.check(key)
        if missing := self._keys.difference(keys):
            raise ConfigError(
                f"it has {_names(missing)}, which this rollout has not; groups without "
                "an id of their own are told by their content"
            )
        if self._digest is not None and self._digest != digest_of(keys):
            raise ConfigError(
                f"this rollout has other groups than it, such as "
                f"{_names(set(keys) - self._keys or keys)}"
            )


def check_model(known: Mapping[str, str], now: Mapping[str, str]) -> None:
    """See that a journal is of the same model.

    Raises:
        ConfigError: it is of another one.
    """
    for name in sorted(known.keys() | now.keys()):
        before, after = known.get(name, "none"), now.get(name, "none")
        if before != after:
            raise ConfigError(
                f"it is of a model with {name}={before}, and this engine's has "
                f"{name}={after}"
            )


def seed_of(nonce: bytes, life: int, key: GroupKey) -> int:
    """A group's seed in one life of a journaled rollout; of 63 bits."""
    text = _SORTED.encode([nonce, life, key])
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def _difference(known: GroupKey, key: GroupKey) -> str:
    if known.num_requests != key.num_requests:
        return f"n={key.num_requests} here, and n={known.num_requests} there"
    if known.prompt != key.prompt:
        return "another prompt here than there"
    return "other sampling settings here than there"


def _names(keys: Iterable[GroupKey]) -> str:
    """Some groups, for a sentence."""
    keys = sorted(keys)
    names = [
        f"group {key.group_id!r}"
        if key.group_id
        else f"a group of n={key.num_requests}"
        for key in keys[:_MAX_NAMED]
    ]
    more = len(keys) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()
