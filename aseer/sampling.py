"""Sampling settings: vLLM's names, checked at the edge, and re-based for a resumed
chunk.

A resumed chunk is a new engine request whose prompt is the prompt plus everything
generated so far. Most settings survive that untouched. Those that look back at *output*
tokens would not, so a request that uses one runs undivided (`undivided_because`):
presence and frequency penalties, structured output, and bad words of several tokens.
`min_tokens`, `max_tokens` and `seed` are re-based; `stop` strings are matched by the
instance over the whole response.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from aseer.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a group's responses are sampled; names and meaning as in
    `vllm.SamplingParams`.

    Attributes:
        max_tokens: the most tokens to generate; None = up to the model's length.
        min_tokens: no end token, stop token or stop string counts before that many.
        seed: the group's; each member draws from its own stream derived from it.
        stop: strings that end a response; the text ends before them unless
            `include_stop_str_in_output`, the token ids include them.
        structured_outputs: vLLM's StructuredOutputsParams as a mapping, such as
            {"regex": "..."} or {"json": {...}}.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    structured_outputs: Mapping[str, Any] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):  # as vLLM takes it
            object.__setattr__(self, "stop", (stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence | None):
                raise _bad(name, value, "a list")
            if value is None and name != "allowed_token_ids":
                value = ()  # as vLLM takes it
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        _check(self)

    def undivided_because(self) -> str | None:
        """The setting that a resumed chunk would silently change; None if there is
        none.
        """
        if self.presence_penalty:
            return "presence_penalty"
        if self.frequency_penalty:
            return "frequency_penalty"
        if self.structured_outputs is not None:
            return "structured_outputs"
        if self.bad_words:
            return "bad_words"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the fields that are re-based for each chunk."""
        data = asdict(self)
        for name in ("max_tokens", "min_tokens", "seed"):
            del data[name]
        return data


def resolve_sampling(
    given: object, *, default: SamplingParams | None = None
) -> SamplingParams:
    """A SamplingParams from what a user may hand over.

    Args:
        given: None (the default), an `aseer.SamplingParams`, a mapping of its fields,
            or a `vllm.SamplingParams`.
    Raises:
        ConfigError: an unknown or contradictory setting; it says which and what is
            allowed.
    """
    if given is None:
        return default or SamplingParams()
    if isinstance(given, SamplingParams):
        return given
    if isinstance(given, Mapping):
        return _from_mapping(dict(given))
    if type(given).__module__.startswith("vllm.") and type(given).__name__ == (
        "SamplingParams"
    ):
        return _from_vllm(given)
    raise ConfigError(
        f"sampling={given!r} is a {type(given).__name__}; give an "
        "aseer.SamplingParams, a dict of its fields, or a vllm.SamplingParams"
    )


def chunk_seed(seed: int, index: int, num_generated: int) -> int:
    """The seed of a chunk's random stream, a 63-bit number.

    A function of (group's seed, member, tokens so far) only, so that members differ, no
    stream is used twice within a response, and a repeated rollout repeats its samples.
    """
    text = f"{seed}:{index}:{num_generated}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


_SWITCHES = (
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
)
_NAMES = tuple(f.name for f in fields(SamplingParams))
# Settings of vLLM's that change nothing here, or that aseer sets itself.
_VLLM_IGNORED = frozenset(
    {"n", "output_kind", "skip_clone", "logprobs", "flat_logprobs", "stream_interval"}
    | {"output_text_buffer_length", "skip_reading_prefix_cache", "watermarking"}
)


def _from_mapping(given: dict[str, Any]) -> SamplingParams:
    if given.pop("n", 1) != 1:
        raise ConfigError(
            "sampling has n > 1: the number of responses is the group's; "
            "use Group(prompt, n=...)"
        )
    unknown = sorted(set(given) - set(_NAMES))
    if unknown:
        raise ConfigError(
            f"sampling has unknown settings {unknown}; known are {sorted(_NAMES)}"
        )
    return SamplingParams(**given)


def _from_vllm(given: Any) -> SamplingParams:
    """Take over every field that was set; refuse one that aseer cannot honour."""
    default = type(given)()
    names = getattr(given, "__struct_fields__", None) or vars(given)
    taken: dict[str, Any] = {}
    for name in names:
        value = getattr(given, name)
        if name.startswith("_") or name in _VLLM_IGNORED:
            continue
        if name in _NAMES:
            if name == "structured_outputs" and value is not None:
                value = {
                    k: v
                    for k, v in vars(value).items()
                    if not k.startswith("_") and v not in (None, False)
                }
            if value is not None:
                taken[name] = value
        elif value != getattr(default, name):
            raise ConfigError(
                f"sampling sets {name}={value!r}, which aseer does not support; "
                f"supported are {sorted(_NAMES)}"
            )
    if given.n != 1:
        taken["n"] = given.n
    return _from_mapping(taken)


def _bad(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"sampling {name}={value!r} is not allowed; give {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bias(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_int(token)
        and token >= 0
        and isinstance(bias, int | float)
        and math.isfinite(bias)
        for token, bias in value.items()
    )


def _in_range(p: SamplingParams, name: str, low: float, high: float, text: str) -> None:
    value = getattr(p, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _bad(name, value, text)
    if not (math.isfinite(value) and low <= value <= high):
        raise _bad(name, value, text)


def _check(p: SamplingParams) -> None:
    _in_range(p, "temperature", 0, 2, "a number in [0, 2]; 0 is greedy")
    _in_range(p, "top_p", 1e-9, 1, "a number in (0, 1]; 1 keeps every token")
    _in_range(p, "min_p", 0, 1, "a number in [0, 1]; 0 disables it")
    _in_range(p, "presence_penalty", -2, 2, "a number in [-2, 2]; 0 disables it")
    _in_range(p, "frequency_penalty", -2, 2, "a number in [-2, 2]; 0 disables it")
    _in_range(p, "repetition_penalty", 1e-9, 1e9, "a number above 0; 1 disables it")
    if not _is_int(p.top_k) or p.top_k < -1:
        raise _bad("top_k", p.top_k, "an int >= 1; 0 or -1 keeps every token")
    if p.max_tokens is not None and (not _is_int(p.max_tokens) or p.max_tokens < 1):
        raise _bad("max_tokens", p.max_tokens, "an int >= 1, or None for no limit")
    if not _is_int(p.min_tokens) or p.min_tokens < 0:
        raise _bad("min_tokens", p.min_tokens, "an int >= 0")
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise _bad("min_tokens", p.min_tokens, f"at most max_tokens={p.max_tokens}")
    if p.seed is not None and not _is_int(p.seed):
        raise _bad("seed", p.seed, "an int, or None for no seed")
    if not all(isinstance(s, str) and s for s in (*p.stop, *p.bad_words)):
        raise _bad("stop/bad_words", (p.stop, p.bad_words), "non-empty strings")
    ids = (*p.stop_token_ids, *(p.allowed_token_ids or ()))
    if not all(_is_int(t) and t >= 0 for t in ids):
        raise _bad("stop_token_ids/allowed_token_ids", ids, "token ids >= 0")
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        raise _bad("allowed_token_ids", (), "at least one id, or None for all")
    for name in _SWITCHES:
        if not isinstance(getattr(p, name), bool):
            raise _bad(name, getattr(p, name), "True or False")
    if p.logit_bias is not None and not _is_bias(p.logit_bias):
        raise _bad("logit_bias", p.logit_bias, "a mapping of token ids to numbers")
    structured: object = p.structured_outputs
    if structured is not None and not (structured and isinstance(structured, Mapping)):
        raise _bad("structured_outputs", structured, 'a mapping such as {"regex": ...}')
    if p.stop and not p.detokenize:
        raise _bad("detokenize", False, "True where stop strings are given")
