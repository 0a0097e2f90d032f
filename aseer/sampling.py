"""Sampling settings: vLLM's names, checked at the edge, and re-based for a resumed
chunk.

To the engine a resumed chunk is a new request, whose prompt is the prompt plus
everything generated so far. Most settings mean the same there. Settings that look back
at *output* tokens do not, so a request that uses one of them runs undivided
(`undivided_because`): presence and frequency penalties, structured output, bad words.
`min_tokens`, `max_tokens` and `seed` are re-based; `stop` strings are matched by the
instance over the whole response.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from aseer.errors import ConfigError
from aseer.inputs.plain import (
    INT32_MAX,
    INT64_MAX,
    as_bool,
    as_float,
    as_int,
    as_list,
    as_text,
    unwrapped,
)
from aseer.inputs.structured import check_structured_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a group's responses are sampled; names and meaning as in
    `vllm.SamplingParams`.

    Values are checked and kept as plain data: numpy's numbers, and lists of ids or
    texts as tuples, sets or arrays, are taken as well.

    Attributes:
        max_tokens: the most tokens to generate; None = up to the model's length.
        min_tokens: before so many tokens no end token, stop token or stop string ends
            a response.
        seed: seed of the group; each member has a random stream of its own, derived
            from the seed. None, or -1 as in vLLM, = no seed.
        stop: strings that end a response; the text ends before them unless
            `include_stop_str_in_output`, the token ids include them.
        logit_bias: added to the logits of these token ids, from -1e20 to 1e20.
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
        for name, value in _checked(self).items():
            object.__setattr__(self, name, value)

    def undivided_because(self) -> str | None:
        """Name of a setting that a resumed chunk would not honour; None if all are
        honoured.
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
    """A SamplingParams from what a user may give.

    Args:
        given: None (for `default`), an `aseer.SamplingParams`, a mapping of its fields,
            or a `vllm.SamplingParams`.
    Raises:
        ConfigError: a setting is unknown or contradicts another; the message says which
            one, and what is allowed.
    """
    if given is None:
        return default or SamplingParams()
    if isinstance(given, SamplingParams):
        return given
    if isinstance(given, Mapping):
        return _from_mapping(given)
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


_NAMES = tuple(f.name for f in fields(SamplingParams))
# Settings of vLLM's that aseer does not have, with the values that change nothing.
_CHANGE_NOTHING: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, 0, 1),  # of the sampled token, which responses always carry
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "logprob_token_ids": (None,),
    "extra_args": (None,),
    "logits_processors": (None,),
    "guided_decoding": (None,),
    "truncate_prompt_tokens": (None,),
    "thinking_token_budget": (None, -1),
    "repetition_detection": (None,),
    "trace_decode_token_ids": (None,),
}
# Settings of vLLM's that aseer sets itself, or that do not affect what is sampled.
_IGNORED = frozenset(
    {"output_kind", "skip_clone", "flat_logprobs", "stream_interval", "watermarking"}
    | {"output_text_buffer_length", "skip_reading_prefix_cache"}
    | {"routed_experts_prompt_start"}  # trims what responses do not carry
)
_INSTEAD = {
    "n": "the number of responses is the group's: use Group(prompt, n=...)",
    "logprobs": "responses carry the sampled tokens' logprobs: leave it out",
    "truncate_prompt_tokens": "shorten the prompt itself",
}


def _from_mapping(given: Mapping[Any, Any]) -> SamplingParams:
    """Take the settings that aseer has; refuse those it cannot honour or knows not."""
    taken = {}
    unknown = []
    for name, value in given.items():
        if name in _NAMES:
            if value is not None:  # as for vLLM, None is the default
                taken[name] = value
        elif name in _CHANGE_NOTHING:
            _check_changes_nothing(name, value, _CHANGE_NOTHING[name])
        elif name not in _IGNORED:
            unknown.append(name)
    if unknown:
        raise ConfigError(
            f"sampling has unknown settings {sorted(unknown, key=str)}; known are "
            f"{sorted(_NAMES)}"
        )
    return SamplingParams(**taken)


def _from_vllm(given: Any) -> SamplingParams:
    """Take every field that was set; refuse a field that aseer cannot honour."""
    default = type(given)()
    names = getattr(given, "__struct_fields__", None) or vars(given)
    taken: dict[str, Any] = {}
    for name in names:
        value = getattr(given, name)
        if name == "structured_outputs" and value is not None:
            value = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        if name in _NAMES or name in _CHANGE_NOTHING:
            taken[name] = value
        elif not name.startswith("_") and name not in _IGNORED:  # of another version
            _check_changes_nothing(name, value, (getattr(default, name),))
    return _from_mapping(taken)


def _check_changes_nothing(
    name: str, value: object, harmless: tuple[object, ...]
) -> None:
    plain = unwrapped(value)
    for other in harmless:
        if plain is other or (isinstance(plain, int | float | str) and plain == other):
            return
    instead = _INSTEAD.get(name, f"supported are {sorted(_NAMES)}")
    raise ConfigError(
        f"sampling sets {name}={value!r:.100}, which aseer does not support; {instead}"
    )


def _bad(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"sampling {name}={value!r:.300} is not allowed; give {allowed}")


# The least and the largest allowed value of each number, and words for the range.
_FLOATS = {
    "temperature": (0, 2, "a number in [0, 2]; 0 is greedy"),
    "top_p": (1e-9, 1, "a number in (0, 1]; 1 keeps every token"),
    "min_p": (0, 1, "a number in [0, 1]; 0 disables it"),
    "presence_penalty": (-2, 2, "a number in [-2, 2]; 0 disables it"),
    "frequency_penalty": (-2, 2, "a number in [-2, 2]; 0 disables it"),
    "repetition_penalty": (
        1e-9,
        1e9,
        "a number above 0, up to 1e9; 1 disables it",
    ),
}
_INTS = {
    "top_k": (
        -1,
        INT32_MAX,
        f"an int from 1 to {INT32_MAX}; 0 or -1 keeps every token",
    ),
    "min_tokens": (0, INT32_MAX, f"an int from 0 to {INT32_MAX}"),
}
_OPTIONAL_INTS = {
    "max_tokens": (1, INT64_MAX, "an int >= 1 of 64 bits, or None for no limit"),
    # Signed or unsigned, since the seed is hashed.
    "seed": (-(1 << 63), (1 << 64) - 1, "an int of 64 bits, or None for no seed"),
}
_TEXTS = ("stop", "bad_words")
_IDS = ("stop_token_ids", "allowed_token_ids")
_SWITCHES = (
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
)
# Engines compute in float32. A bias is multiplied by up to 1e9 (repetition_penalty) and
# divided by as little as 0.01 (vLLM's least temperature), and must stay finite.
_MAX_BIAS = 1e20
_ID_NAME = re.compile("[0-9]{1,10}")


def _checked(p: SamplingParams) -> dict[str, Any]:
    """Every field as plain data.

    Raises:
        ConfigError: a value that is not allowed, or two that contradict each other.
    """
    data: dict[str, Any] = {}
    for name, (least, most, allowed) in _FLOATS.items():
        number = as_float(getattr(p, name))
        if number is None or not least <= number <= most:
            raise _bad(name, getattr(p, name), allowed)
        data[name] = number
    for name, bounds in (_INTS | _OPTIONAL_INTS).items():
        value = getattr(p, name)
        is_left_out = value is None and name in _OPTIONAL_INTS
        data[name] = None if is_left_out else _int_in(name, value, *bounds)
    for name in _SWITCHES:
        data[name] = as_bool(getattr(p, name))
        if data[name] is None:
            raise _bad(name, getattr(p, name), "True or False")
    data |= {name: _texts(name, getattr(p, name)) for name in _TEXTS}
    data |= {name: _ids(name, getattr(p, name)) for name in _IDS}
    data["logit_bias"] = _biases(p.logit_bias)
    if p.structured_outputs is not None:
        data["structured_outputs"] = check_structured_outputs(p.structured_outputs)
    if data["seed"] == -1:
        data["seed"] = None
    if data["max_tokens"] is not None and data["min_tokens"] > data["max_tokens"]:
        most = data["max_tokens"]
        raise _bad("min_tokens", p.min_tokens, f"at most max_tokens={most}")
    if data["stop"] and not data["detokenize"]:
        raise _bad("detokenize", False, "True where stop strings are given")
    return data


def _int_in(name: str, value: object, least: int, most: int, allowed: str) -> int:
    number = as_int(value)
    if number is None or not least <= number <= most:
        raise _bad(name, value, allowed)
    return number


def _texts(name: str, given: object) -> tuple[str, ...]:
    if name == "stop" and isinstance(given, str):  # as vLLM takes it
        given = (given,)
    items = [] if given is None else as_list(given)
    if items is None:
        raise _bad(name, given, "a list of strings")
    texts = [as_text(item) for item in items]
    if not all(texts):
        raise _bad(name, given, "a list of non-empty strings")
    return tuple(text for text in texts if text)


def _ids(name: str, given: object) -> tuple[int, ...] | None:
    if given is None:
        return None if name == "allowed_token_ids" else ()
    items = as_list(given)
    if items is None:
        raise _bad(name, given, "a list of token ids")
    if name == "allowed_token_ids" and not items:
        raise _bad(name, given, "at least one id, or None for all")
    ids = [as_int(item) for item in items]
    if not all(i is not None and 0 <= i <= INT32_MAX for i in ids):
        raise _bad(name, given, f"a list of token ids >= 0, at most {INT32_MAX}")
    return tuple(i for i in ids if i is not None)


def _biases(given: object) -> dict[int, float] | None:
    if given is None:
        return None
    allowed = f"a mapping of token ids to numbers from -{_MAX_BIAS:g} to {_MAX_BIAS:g}"
    if not isinstance(given, Mapping):
        raise _bad("logit_bias", given, allowed)
    biases: dict[int, float] = {}
    for key, value in given.items():
        # Keys that come from JSON are texts.
        is_name = isinstance(key, str) and _ID_NAME.fullmatch(key)
        token, bias = as_int(int(key) if is_name else key), as_float(value)
        if token is None or not 0 <= token <= INT32_MAX:
            raise _bad("logit_bias", given, allowed)
        if bias is None or abs(bias) > _MAX_BIAS:
            raise _bad("logit_bias", given, allowed)
        biases[token] = bias
    return biases or None
