"""vLLM's token wire: what is read, what is refused by name, and what is answered."""

from __future__ import annotations

import json

import msgspec
import pytest

from aseer.errors import ConfigError
from aseer.server.wire import answer_to, ask_of, decode_request
from aseer.types import Response


def request_of(**fields):
    return decode_request(json.dumps({"token_ids": [5, 6], **fields}).encode())


def response_of(**fields):
    data = {
        "group_id": "g",
        "index": 0,
        "prompt_token_ids": [5, 6],
        "token_ids": [7, 8],
        "logprobs": [-0.5, -1.5],
        "text": "ab",
        "finish_reason": "stop",
        "stop_reason": 8,
        "weight_version": 3,
        "metrics": None,
    }
    return Response(**data | fields)


def test_a_request_is_read_as_vllm_reads_it():
    sampling = {"n": 4, "temperature": 0.7, "stop_token_ids": [2], "logprobs": 1}
    ask = ask_of(request_of(sampling_params=sampling, cache_salt="v3", priority=2))
    assert (ask.prompt, ask.n, ask.group, ask.wants_logprobs) == ([5, 6], 4, None, True)
    assert ask.sampling == {
        "temperature": 0.7,
        "stop_token_ids": [2],
        "logprobs": 1,
        "detokenize": False,  # nobody reads the text
    }


def test_text_is_decoded_where_it_is_asked_for_or_stops_a_response():
    stops = ask_of(request_of(sampling_params={"stop": ["x"]}))
    text = ask_of(request_of(output_mode="text"))
    assert "detokenize" not in stops.sampling
    assert "detokenize" not in text.sampling


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "no generate request"),
        (b"{}", "token_ids"),
        (b'{"token_ids": ["a"]}', r"Expected `int`, got `str` - at `\$.token_ids"),
        (b'{"token_ids": [1], "stream": true}', "stream=True is not supported"),
        (b'{"token_ids": [1], "features": {"mm_hashes": {}}}', "images cannot be sent"),
        (b'{"token_ids": [1], "output_mode": "video"}', "output_mode"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(body, message):
    with pytest.raises(ConfigError, match=message):
        decode_request(body)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2", 1 << 20])
def test_a_number_of_responses_that_cannot_be_is_refused(n):
    with pytest.raises(ConfigError, match=r"n=.* is not allowed; give an int from 1"):
        ask_of(request_of(sampling_params={"n": n}))


def test_logprobs_of_texts_are_refused():
    with pytest.raises(ConfigError, match="use output_mode='tokens'"):
        ask_of(request_of(output_mode="text", sampling_params={"logprobs": 0}))


def test_an_answer_has_what_a_trainer_needs():
    request = request_of(sampling_params={"logprobs": 1}, return_token_ids=True)
    both = [response_of(), response_of(index=1, finish_reason="aborted", token_ids=[7])]
    both[1].logprobs[:] = [-0.25]
    answer = answer_to(request, both, model="m", request_id="r", created=12)
    data = msgspec.json.decode(msgspec.json.encode(answer))
    first, second = data["choices"]
    assert data["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
    }
    assert data["prompt_token_ids"] == [5, 6]
    assert first["token_ids"] == [7, 8]
    assert [(e["token"], e["logprob"]) for e in first["logprobs"]["content"]] == [
        ("token_id:7", -0.5),
        ("token_id:8", -1.5),
    ]
    assert (first["finish_reason"], first["stop_reason"]) == ("stop", 8)
    assert first["weight_versions"] == [{"version": "3", "start": 0, "end": 2}]
    assert second["finish_reason"] == "abort"  # as vLLM calls it


def test_logprobs_and_text_come_only_when_asked_for():
    plain = answer_to(
        request_of(), [response_of()], model="m", request_id="r", created=1
    )
    text = request_of(output_mode="text")
    texts = answer_to(text, [response_of()], model="m", request_id="r", created=1)
    assert (plain.choices[0].logprobs, plain.choices[0].text) == (None, None)
    assert texts.choices[0].text == "ab"
