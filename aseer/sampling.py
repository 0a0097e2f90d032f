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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from aseer.errors import ConfigError
from aseer.inputs.fields import number, refusal, whole
from aseer.inputs.plain import INT32_MAX, INT64_MAX, unwrapped
from aseer.inputs.sampling import (
    biases,
    group_seed,
    some_token_ids,
    stops,
    structure,
    texts,
    token_ids,
)
from aseer.inputs.settings import check_fields, documented

_PREFIX = "sampling "  # of settings' names in messages


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a group's responses are sampled; names and meaning as in
    `vllm.SamplingParams`.

    Values are checked and kept as plain data: numpy's numbers, and lists of ids or
    texts as tuples, sets or arrays, are taken as well.
    """

    temperature: Annotated[
        float,
        number(0, 2, "a number in [0, 2]; 0 is greedy"),
        """divides the logits: below 1 likely tokens become likelier, above 1 less so; 0
        is greedy.""",
    ] = 1.0
    top_p: Annotated[
        float,
        number(1e-9, 1, "a number in (0, 1]; 1 keeps every token"),
        """only the likeliest tokens are sampled whose probabilities add up to it; 1
        keeps every token.""",
    ] = 1.0
    top_k: Annotated[
        int,
        whole(
            -1,
            allowed=f"an int from 1 to {INT32_MAX}; 0 or -1 keeps every token",
        ),
        "only so many of the likeliest tokens are sampled; 0 or -1 keeps every token.",
    ] = 0
    min_p: Annotated[
        float,
        number(0, 1, "a number in [0, 1]; 0 disables it"),
        """only tokens are sampled that have at least this share of the likeliest
        token's probability; 0 keeps every token.""",
    ] = 0.0
    max_tokens: Annotated[
        int | None,
        whole(1, INT64_MAX, allowed="an int >= 1 of 64 bits, or None for no limit"),
        "the most tokens to generate; None = up to the model's length.",
    ] = None
    min_tokens: Annotated[
        int,
        whole(0, allowed=f"an int from 0 to {INT32_MAX}"),
        """before so many tokens no end token, stop token or stop string ends a
        response.""",
    ] = 0
    seed: Annotated[
        int | None,
        group_seed,
        """seed of the group; each member has a random stream of its own, derived from
        the seed. None, or -1 as in vLLM, = no seed.""",
    ] = None
    stop: Annotated[
        tuple[str, ...],
        stops,
        """strings that end a response; the text ends before them unless
        `include_stop_str_in_output`, the token ids include them.""",
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...],
        token_ids,
        "tokens that end a response, besides the model's own end tokens.",
    ] = ()
    include_stop_str_in_output: Annotated[
        bool, "whether the text includes the stop string that ended it."
    ] = False
    ignore_eos: Annotated[
        bool, "whether generation goes on after the model's end tokens."
    ] = False
    presence_penalty: Annotated[
        float,
        number(-2, 2, "a number in [-2, 2]; 0 disables it"),
        """taken from the logits of tokens that were generated before. Requests with it
        run undivided.""",
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        number(-2, 2, "a number in [-2, 2]; 0 disables it"),
        """taken from the logits of tokens, as often as they were generated before.
        Requests with it run undivided.""",
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        number(1e-9, 1e9, "a number above 0, up to 1e9; 1 disables it"),
        """divides the logits of tokens that were in the prompt or generated before, or
        multiplies those below 0; 1 changes nothing.""",
    ] = 1.0
    logit_bias: Annotated[
        Mapping[int, float] | None,
        biases,
        "added to the logits of these token ids, from -1e20 to 1e20.",
    ] = None
    allowed_token_ids: Annotated[
        tuple[int, ...] | None,
        some_token_ids,
        "the only tokens that are sampled; None = all are.",
    ] = None
    bad_words: Annotated[
        tuple[str, ...],
        texts,
        "texts that are not generated. Requests with any run undivided.",
    ] = ()
    structured_outputs: Annotated[
        Mapping[str, Any] | None,
        structure,
        """vLLM's StructuredOutputsParams as a mapping, such as {"regex": "..."} or
        {"json": {...}}. Requests with it run undivided.""",
    ] = None
    skip_special_tokens: Annotated[
        bool, "whether the text leaves out special tokens, such as end tokens."
    ] = True
    spaces_between_special_tokens: Annotated[
        bool, "whether the text has spaces between special tokens."
    ] = True
    detokenize: Annotated[
        bool, "whether responses have a text; stop strings need it."
    ] = True

    def __post_init__(self) -> None:
        check_fields(self, _PREFIX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            allowed = f"at most max_tokens={self.max_tokens}"
            raise refusal(_PREFIX + "min_tokens", self.min_tokens, allowed)
        if self.stop and not self.detokenize:
            allowed = "True where stop strings are given"
            raise refusal(_PREFIX + "detokenize", False, allowed)

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


def check_is_sampling(name: str, given: object) -> SamplingParams:
    """Sampling settings, as `EngineConfig` takes them: no mapping of their fields.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(given, SamplingParams):
        raise refusal(name, given, "an aseer.SamplingParams")
    return given


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
