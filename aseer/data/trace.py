"""Recorded rollouts: prompts and the token ids of every response, in one JSON file.

A file is, plain or gzipped (".gz"), either the groups alone

    [{"prompt": [ids], "responses": [[ids], ...]}, ...]

or the groups with how they were made and a checksum, as `save` writes it:

    {"settings": {...}, "sha256": "...", "groups": [{"prompt": ...}, ...]}

A response that ended by itself has its end token last; one of `max_tokens` tokens
(a setting; else the longest response) was cut off. The checksum is over the groups
alone, so that both forms of the same rollout have the same one. It is verified whenever
a file that has it is read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Tokens = NDArray[np.int32]

_NUM_RESERVED = 3  # ids that a small model has for its special tokens


class TraceGroup(NamedTuple):
    """A prompt and its responses, each [num_tokens] int32."""

    prompt: Tokens
    responses: list[Tokens]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A recorded rollout.

    Attributes:
        settings: how it was made, as plain data; "max_tokens" and "temperature" are
            read.
    """

    groups: Sequence[TraceGroup]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("a trace has at least one group")
        for i, group in enumerate(self.groups):
            if not len(group.prompt) or not all(map(len, group.responses)):
                raise ConfigError(f"group {i} of the trace has an empty text")
            if not group.responses:
                raise ConfigError(f"group {i} of the trace has no response")
        if self.max_tokens < self._longest:
            raise ConfigError(
                f"a response of {self._longest} tokens is longer than the trace's "
                f"max_tokens={self.max_tokens}"
            )

    @property
    def num_requests(self) -> int:
        return sum(len(group.responses) for group in self.groups)

    @property
    def num_tokens(self) -> int:
        """Output tokens of the whole rollout."""
        return sum(map(len, self._responses()))

    @property
    def max_tokens(self) -> int:
        """That a response could have."""
        return int(self.settings.get("max_tokens") or self._longest)

    @property
    def sha256(self) -> str:
        """Of the groups' tokens."""
        groups = [[g["prompt"], g["responses"]] for g in self._plain_groups()]
        return _sha256(groups)

    @property
    def _longest(self) -> int:
        return max(map(len, self._responses()))

    def _responses(self) -> Iterator[Tokens]:
        for group in self.groups:
            yield from group.responses

    def _plain_groups(self) -> list[dict[str, Any]]:
        return [
            {
                "prompt": g.prompt.tolist(),
                "responses": [r.tolist() for r in g.responses],
            }
            for g in self.groups
        ]

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes."""
        return {
            "settings": dict(self.settings),
            "sha256": self.sha256,
            "groups": self._plain_groups(),
        }

    def part(self, num_groups: int | None, max_tokens: int | None = None) -> Trace:
        """The first groups, as with a smaller `max_tokens`; None = all there is."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        groups = [
            TraceGroup(group.prompt, [r[:limit] for r in group.responses])
            for group in self.groups[:num_groups]
        ]
        return Trace(groups=groups, settings={**self.settings, "max_tokens": limit})

    def by_rank(self, vocab_size: int, end_token: int) -> Trace:
        """The same texts in a smaller vocabulary: the most frequent token is the first.

        Tokens for which there is no id left share those of the rarer half, in turn, so
        that frequent ones stay apart. The first ids stay unused, as special tokens.
        """
        texts = [text for g in self.groups for text in (g.prompt, *g.responses)]
        counts = Counter(np.concatenate(texts).tolist())
        ids = [i for i in range(_NUM_RESERVED, vocab_size) if i != end_token]
        if len(ids) < 2:
            raise ConfigError(f"vocab_size={vocab_size} is too small for a trace")
        rarer = ids[len(ids) // 2 :]
        ranked = sorted(counts, key=lambda token: (-counts[token], token))
        new = np.zeros(max(ranked) + 1, np.int32)
        for rank, token in enumerate(ranked):
            late = rank - len(ids)
            new[token] = ids[rank] if late < 0 else rarer[late % len(rarer)]
        mapped = [
            TraceGroup(new[g.prompt], [new[r] for r in g.responses])
            for g in self.groups
        ]
        return Trace(groups=mapped, settings=self.settings).as_is(end_token)

    def end_token(self, default: int) -> int:
        """What responses that ended by themselves end with, mostly."""
        ends = Counter(
            int(r[-1]) for r in self._responses() if len(r) < self.max_tokens
        )
        return ends.most_common(1)[0][0] if ends else default

    def as_is(self, end_token: int) -> Trace:
        """The same tokens; every response that ended by itself ends with `end_token`.

        Raises:
            ConfigError: the end token stands within a response.
        """
        groups = []
        for group in self.groups:
            responses = []
            for response in group.responses:
                text = response.copy()
                if len(text) < self.max_tokens:
                    text[-1] = end_token
                if (text[:-1] == end_token).any():
                    raise ConfigError(
                        f"token {end_token} ends responses of the trace and stands "
                        "within others; map it to another vocabulary"
                    )
                responses.append(text)
            groups.append(TraceGroup(group.prompt, responses))
        settings = {**self.settings, "max_tokens": self.max_tokens}
        return Trace(groups=groups, settings=settings)


def read(path: Path | str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A file's groups and settings as plain data; the checksum is verified.

    Raises:
        ConfigError: it is not a trace, or its groups are not what the checksum says.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {error})"
        ) from error
    groups = content.get("groups") if isinstance(content, dict) else content
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise ConfigError(f"{path} is not a JSON list with an object a group")
    if not isinstance(content, dict):
        return groups, {}
    expected = content.get("sha256")
    found = _sha256([[g.get("prompt"), g.get("responses")] for g in groups])
    if expected is not None and found != expected:
        raise ConfigError(
            f"{path} was changed: its groups have the checksum {found}, and it says "
            f"{expected}; record it again"
        )
    return groups, content.get("settings") or {}


def load(path: Path | str) -> Trace:
    """Read a recorded rollout.

    Raises:
        ConfigError: the file is not one, or it was changed.
    """
    groups, settings = read(path)
    try:
        texts = [
            TraceGroup(_tokens(g["prompt"]), [_tokens(r) for r in g["responses"]])
            for g in groups
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path} is not a recorded rollout ({type(error).__name__}: {error}); give "
            'a JSON list with an object a group: {"prompt": [...], "responses": '
            "[[...], ...]}"
        ) from error
    return Trace(groups=texts, settings=settings)


def save(trace: Trace, path: Path | str) -> None:
    """Write a trace as `load` reads it, gzipped if the name ends in ".gz"."""
    path = Path(path)
    data = json.dumps(trace.to_dict(), separators=(",", ":")).encode()
    # Without a time stamp: the same trace is the same file.
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _sha256(groups: list[Any]) -> str:
    text = json.dumps(groups, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _tokens(ids: Sequence[int]) -> Tokens:
    tokens = np.array(ids, np.int32)
    if tokens.ndim != 1 or (tokens < 0).any():
        raise ValueError(f"{ids!r:.100} is not a list of token ids")
    return tokens
