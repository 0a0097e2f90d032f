"""vLLM's token wire: what `POST /inference/v1/generate` takes and gives. Pure.

Source: `vllm/entrypoints/scale_out/token_in_token_out/protocol.py` (0.32). Differs:

- `group` and `group_size`, which vLLM does not have, name the requests that belong
  together; without them, equal requests that come together do.
- Of logprobs there is the sampled token's only.
- Each choice has `weight_version`, too.
- What cannot be honoured is refused by name; `cache_salt` and `priority` are taken and
  not used: KV is never shared between weights, and aseer orders requests by length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.types import Response

# Requests of a call; vLLM's own bound.
MAX_N = 16_384


class GenerateRequest(msgspec.Struct, kw_only=True):
    """A request's body; fields that are not named here are ignored, as by vLLM."""

    token_ids: list[int]
    sampling_params: dict[str, Any] = {}
    request_id: str = ""
    model: str | None = None
    output_mode: Literal["tokens", "text"] = "tokens"
    return_token_ids: bool | None = None
    group: str | None = None
    group_size: int | None = None
    # Not honoured, and refused if they ask for anything.
    stream: bool | None = None
    features: Any = None
    content_parts: Any = None
    reasoning_ended: bool | None = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None


class Logprob(msgspec.Struct, frozen=True):
    """A sampled token's; `token` is how older releases of vLLM name it."""

    token_id: int
    token: str
    logprob: float
    rank: None = None
    top_logprobs: tuple[()] = ()


class Logprobs(msgspec.Struct, frozen=True):
    """One entry a token."""

    content: list[Logprob]


class WeightVersionSpan(msgspec.Struct, frozen=True):
    """Output tokens [start, end) were sampled by weights of `version`."""

    version: str
    start: int
    end: int


class Choice(msgspec.Struct, frozen=True):
    """One response."""

    index: int
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | str | None
    token_ids: list[int]
    logprobs: Logprobs | None
    text: str | None
    weight_version: int
    weight_versions: list[WeightVersionSpan]


class Usage(msgspec.Struct, frozen=True):
    """Of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateResponse(msgspec.Struct, frozen=True):
    """An answer's body."""

    request_id: str
    model: str
    created: int
    output_mode: Literal["tokens", "text"]
    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[int] | None


class Ask(msgspec.Struct, frozen=True):
    """What a request asks for, in aseer's words."""

    prompt: list[int]
    sampling: dict[str, Any]
    n: int
    group: str | None
    group_size: int | None
    wants_logprobs: bool


_DECODER = msgspec.json.Decoder(GenerateRequest)
_REFUSED = {
    "stream": "responses come whole; leave it out",
    "features": "images cannot be sent over this wire; give token ids only",
    "content_parts": "images cannot be sent over this wire; give token ids only",
    "reasoning_ended": "there is no reasoning parser here; leave it out",
    "kv_transfer_params": "aseer moves KV itself; leave it out",
    "ec_transfer_params": "aseer has no encoder cache to share; leave it out",
}


def decode_request(body: bytes) -> GenerateRequest:
    """A request from its bytes.

    Raises:
        ConfigError: it is no such request, or asks for what aseer does not have.
    """
    try:
        request = _DECODER.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:  # it nests too deep
        raise ConfigError(f"the body is no generate request: {error}") from None
    for name, instead in _REFUSED.items():
        value = getattr(request, name)
        if value is not None and value is not False:
            raise ConfigError(f"{name}={value!r:.100} is not supported: {instead}")
    return request


def ask_of(request: GenerateRequest) -> Ask:
    """What is to be sampled.

    Raises:
        ConfigError: settings contradict each other.
    """
    sampling = dict(request.sampling_params)
    n = sampling.pop("n", None)
    n = 1 if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_N:
        raise ConfigError(
            f"sampling_params: n={n!r} is not allowed; give an int from 1 to {MAX_N}"
        )
    wants_logprobs = sampling.get("logprobs") is not None
    if request.output_mode == "tokens":
        if not sampling.get("stop"):
            sampling["detokenize"] = False
    elif wants_logprobs:
        raise ConfigError(
            "sampling_params: logprobs cannot be had with output_mode='text', where "
            "they are by decoded tokens; use output_mode='tokens'"
        )
    return Ask(
        request.token_ids,
        sampling,
        n,
        request.group,
        request.group_size,
        wants_logprobs,
    )


def answer_to(
    request: GenerateRequest,
    responses: Sequence[Response],
    *,
    model: str,
    request_id: str,
    created: int,
) -> GenerateResponse:
    """The answer to a request whose responses are all there, none of them an error.

    Args:
        created: seconds since 1970.
    """
    with_logprobs = request.sampling_params.get("logprobs") is not None
    is_text = request.output_mode == "text"
    prompt_tokens = len(request.token_ids)
    completion_tokens = sum(len(response.token_ids) for response in responses)
    return GenerateResponse(
        request_id=request_id,
        model=model,
        created=created,
        output_mode=request.output_mode,
        choices=[
            _choice(i, response, with_logprobs, is_text)
            for i, response in enumerate(responses)
        ],
        usage=Usage(
            prompt_tokens, completion_tokens, prompt_tokens + completion_tokens
        ),
        prompt_token_ids=request.token_ids if request.return_token_ids else None,
    )


def _choice(
    index: int, response: Response, with_logprobs: bool, is_text: bool
) -> Choice:
    reason = response.finish_reason
    assert reason != "error"
    tokens = response.token_ids
    version = response.weight_version
    logprobs = None
    if with_logprobs:
        pairs = zip(tokens, response.logprobs, strict=True)
        logprobs = Logprobs([Logprob(t, f"token_id:{t}", p) for t, p in pairs])
    return Choice(
        index=index,
        finish_reason="abort" if reason == "aborted" else reason,
        stop_reason=response.stop_reason,
        token_ids=tokens,
        logprobs=logprobs,
        text=response.text if is_text else None,
        weight_version=version,
        weight_versions=[WeightVersionSpan(str(version), 0, len(tokens))],
    )
