"""Sampling settings: checked at the edge, taken over from vLLM, re-based for chunks."""

from __future__ import annotations

import itertools
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import pytest

from aseer.errors import ConfigError
from aseer.sampling import SamplingParams, chunk_seed, resolve_sampling

# What is wrong, and what the message must say is allowed.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "a number in [0, 2]"),
    ({"temperature": 2.1}, "a number in [0, 2]"),
    ({"temperature": float("nan")}, "a number in [0, 2]"),
    ({"temperature": "hot"}, "a number in [0, 2]"),
    ({"temperature": True}, "a number in [0, 2]"),
    ({"top_p": 0}, "a number in (0, 1]"),
    ({"top_p": 1.01}, "a number in (0, 1]"),
    ({"min_p": -1}, "a number in [0, 1]"),
    ({"min_p": 2}, "a number in [0, 1]"),
    ({"presence_penalty": 2.5}, "a number in [-2, 2]"),
    ({"frequency_penalty": -2.5}, "a number in [-2, 2]"),
    ({"repetition_penalty": 0}, "a number above 0"),
    ({"repetition_penalty": float("inf")}, "a number above 0"),
    ({"top_k": -2}, "an int from 1 to 2147483647; 0 or -1 keeps every token"),
    ({"top_k": 1.5}, "an int from 1"),
    ({"top_k": 1 << 31}, "an int from 1 to 2147483647"),
    ({"max_tokens": 0}, "an int >= 1 of 64 bits, or None for no limit"),
    ({"max_tokens": 1 << 63}, "an int >= 1 of 64 bits"),
    ({"max_tokens": True}, "an int >= 1"),
    ({"min_tokens": -1}, "an int from 0 to 2147483647"),
    ({"min_tokens": 10**30}, "an int from 0 to 2147483647"),
    ({"seed": 1.0}, "an int of 64 bits, or None for no seed"),
    ({"seed": 1 << 64}, "an int of 64 bits"),
    ({"seed": -(1 << 63) - 1}, "an int of 64 bits"),
    ({"stop": 5}, "a list"),
    ({"stop": [""]}, "non-empty strings"),
    ({"stop": ["a", None]}, "non-empty strings"),
    ({"bad_words": "damn"}, "a list"),
    ({"stop_token_ids": "12"}, "a list"),
    ({"stop_token_ids": [-1]}, "token ids >= 0"),
    ({"stop_token_ids": [True]}, "token ids >= 0"),
    ({"stop_token_ids": [1 << 31]}, "at most 2147483647"),
    ({"stop_token_ids": [1 << 64]}, "at most 2147483647"),
    ({"allowed_token_ids": []}, "at least one id, or None for all"),
    ({"ignore_eos": 1}, "True or False"),
    ({"skip_special_tokens": None}, "True or False"),
    ({"logit_bias": {"the": 1.0}}, "a mapping of token ids to numbers"),
    ({"logit_bias": {3: float("inf")}}, "a mapping of token ids to numbers"),
    ({"logit_bias": {3: 1e39}}, "numbers from -1e+20 to 1e+20"),
    ({"logit_bias": {3: -1e21}}, "numbers from -1e+20 to 1e+20"),
    ({"logit_bias": {1 << 70: 1.0}}, "a mapping of token ids to numbers"),
    ({"logit_bias": [(3, 1.0)]}, "a mapping of token ids to numbers"),
    ({"structured_outputs": "[0-9]+"}, "a mapping"),
    ({"structured_outputs": {}}, "a mapping"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "with one of"),
    ({"structured_outputs": {"disable_any_whitespace": True}}, "with one of"),
]
# Of structured outputs: what, and the name and words that the message has.
REFUSED_STRUCTURES: list[tuple[dict[str, Any], str]] = [
    ({"regexp": "a"}, "unknown keys ['regexp']; known are"),
    ({"regex": 5}, "['regex']=5 is not allowed; give a text"),
    ({"regex": ""}, "['regex']='' is not allowed; give a text that is not empty"),
    ({"regex": "a\0"}, "is not allowed; give a text that is not empty and has no NUL"),
    ({"grammar": " "}, "['grammar']=' ' is not allowed; give a text"),
    ({"choice": []}, "['choice']=[] is not allowed; give a list of non-empty texts"),
    ({"choice": ["a", 1]}, "is not allowed; give a list of non-empty texts"),
    ({"choice": "ab"}, "is not allowed; give a list of non-empty texts"),
    ({"json": "{"}, "['json']='{' is not allowed; give JSON ("),
    ({"json": 5}, "is not allowed; give a text that is not empty and has no NUL, or"),
    ({"json": {1: 2}}, "['json'] has the key 1; keys are texts"),
    ({"json": {"a": object}}, "['a']=<class 'object'> is a type, which other proc"),
    ({"json": {"a": float("nan")}}, "['a']=nan is not allowed; give finite numbers"),
    ({"json": {"a": 1 << 64}}, "is not allowed; give ints of 64 bits"),
    ({"json_object": 1}, "['json_object']=1 is not allowed; give True"),
    ({"structural_tag": "<a>"}, "['structural_tag']='<a>' is not allowed; give JSON"),
    ({"regex": "a", "whitespace_pattern": True}, "is not allowed; give a str"),
]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"a": schema}
    return schema


@pytest.mark.parametrize(("structure", "words"), REFUSED_STRUCTURES)
def test_structured_output_that_no_engine_takes_is_refused(
    structure: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(structured_outputs=structure)
    assert words in str(error.value)


def test_a_schema_nests_as_deep_as_vllm_takes_it() -> None:
    SamplingParams(structured_outputs={"json": nested(64)})
    with pytest.raises(ConfigError, match="nests at most 64 levels"):
        SamplingParams(structured_outputs={"json": nested(65)})
    with pytest.raises(ConfigError, match="more than 100 levels"):
        SamplingParams(structured_outputs={"json": nested(200)})


def test_what_is_switched_off_asks_for_no_structure() -> None:
    given = {"regex": "a", "json": None, "disable_any_whitespace": False}
    assert SamplingParams(structured_outputs=given).structured_outputs == {"regex": "a"}


def test_minus_one_is_no_seed_as_in_vllm() -> None:
    assert SamplingParams(seed=-1).seed is None


def test_no_biases_are_no_logit_bias() -> None:
    assert SamplingParams(logit_bias={}).logit_bias is None


def test_ids_of_biases_may_be_their_names_as_in_json() -> None:
    params = SamplingParams(logit_bias={"3": 1})  # type: ignore[dict-item]
    assert params.logit_bias == {3: 1.0}


def test_settings_do_not_change_with_what_they_were_made_of() -> None:
    given: dict[str, Any] = {"json": {"type": "object"}}
    params = SamplingParams(structured_outputs=given)
    given["json"]["type"] = object()
    assert params.structured_outputs == {"json": {"type": "object"}}


@pytest.mark.parametrize(
    "setting",
    [
        {"max_tokens": None, "stop": None, "bad_words": None, "seed": -1, "top_k": 0},
        {"n": 1, "best_of": None, "logprobs": 0, "prompt_logprobs": None},
        {"logprobs": 1, "flat_logprobs": True, "output_kind": 2, "skip_clone": True},
        {"routed_experts_prompt_start": 17},  # of verifiers, from its second turn on
        {"truncate_prompt_tokens": None, "extra_args": None, "temperature": None},
        {"thinking_token_budget": -1, "skip_special_tokens": None},
    ],
)
def test_vllms_settings_that_change_nothing_are_taken(setting: dict[str, Any]) -> None:
    assert resolve_sampling(setting) == SamplingParams()


@pytest.mark.parametrize(
    "setting",
    [
        {"logprobs": 5},
        {"prompt_logprobs": 0},
        {"truncate_prompt_tokens": 100},
        {"thinking_token_budget": 10},
        {"extra_args": {"a": 1}},
        {"logits_processors": ["mine"]},
        {"best_of": 2},
    ],
)
def test_vllms_settings_that_would_change_something_are_refused_by_name(
    setting: dict[str, Any],
) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError) as error:
        resolve_sampling(setting)
    assert f"sampling sets {name}={value!r}, which aseer does not" in str(error.value)


@pytest.mark.parametrize(("setting", "allowed"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_refused_value_is_named_with_what_is_allowed(
    setting: dict[str, Any], allowed: str
) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**setting)
    ((name, value),) = setting.items()
    message = str(error.value)
    assert name in message
    assert "is not allowed; give" in message
    assert allowed in message
    assert repr(value) in message


def test_more_min_tokens_than_max_tokens_contradict() -> None:
    with pytest.raises(ConfigError, match=r"min_tokens=9 .* at most max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_stop_strings_without_text_contradict() -> None:
    with pytest.raises(ConfigError, match=r"detokenize=False .* stop strings"):
        SamplingParams(stop=("x",), detokenize=False)


def test_a_refused_value_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(temperature=-1)


def test_the_ends_of_every_range_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=0, top_k=-1, presence_penalty=-2)
    SamplingParams(temperature=2, top_p=0.01, min_p=1, top_k=1, frequency_penalty=2)
    SamplingParams(min_tokens=8, max_tokens=8, seed=-1, stop_token_ids=(0,))


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_lists_are_kept_as_tuples() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1], bad_words=["b"])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.bad_words) == (
        ("a",),
        (1,),
        ("b",),
    )


def test_none_means_nothing_in_a_list_as_in_vllm() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None, bad_words=None)  # type: ignore[arg-type]
    assert params == SamplingParams()


@pytest.mark.parametrize(
    "setting",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"structured_outputs": {"regex": "[0-9]+"}},
        {"bad_words": ("damn it",)},
    ],
    ids=lambda s: next(iter(s)),
)
def test_what_looks_back_at_output_runs_undivided(setting: dict[str, Any]) -> None:
    assert SamplingParams(**setting).undivided_because() == next(iter(setting))


def test_what_survives_a_resume_is_divided() -> None:
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=50,
        min_p=0.1,
        repetition_penalty=1.2,
        logit_bias={3: 1.0},
        allowed_token_ids=(1, 2, 3),
        min_tokens=5,
        seed=3,
        stop=("x",),
    )
    assert params.undivided_because() is None


def test_plain_data_has_all_but_what_is_rebased_for_each_chunk() -> None:
    names = {f.name for f in fields(SamplingParams)}
    data = SamplingParams(max_tokens=9, min_tokens=3, seed=1, top_k=7).to_dict()
    assert set(data) == names - {"max_tokens", "min_tokens", "seed"}
    assert data["top_k"] == 7


# What a user may hand over


def test_nothing_is_the_default() -> None:
    default = SamplingParams(top_k=3)
    assert resolve_sampling(None) == SamplingParams()
    assert resolve_sampling(None, default=default) is default


def test_settings_are_taken_as_they_are() -> None:
    params = SamplingParams(top_k=3)
    assert resolve_sampling(params, default=SamplingParams(top_k=5)) is params


def test_a_mapping_of_fields_is_enough() -> None:
    given = MappingProxyType({"temperature": 0.5, "stop": "END", "n": 1})
    assert resolve_sampling(given) == SamplingParams(temperature=0.5, stop=("END",))


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"\['ngram', 'topp'\].*'top_p'"):
        resolve_sampling({"topp": 0.5, "ngram": 2})


def test_the_number_of_responses_is_the_groups() -> None:
    with pytest.raises(ConfigError, match=r"n=[48].*use Group"):
        resolve_sampling({"n": 4})


def test_anything_else_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"sampling=0\.7 is a float; give an aseer"):
        resolve_sampling(0.7)


class _VllmStructuredOutputs:
    def __init__(self, **settings: Any) -> None:
        self.json = None
        self.regex = None
        self.disable_fallback = False
        self._backend = "xgrammar"
        vars(self).update(settings)


def _vllm_params(**settings: Any) -> object:
    """An object as vLLM's, which unit tests do not import."""
    defaults = {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 16,
        "min_tokens": 0,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "bad_words": None,
        "structured_outputs": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "output_kind": 0,
        "extra_args": None,
        "_all_stop_token_ids": set(),
    }

    def init(self: object, **given: Any) -> None:
        vars(self).update(defaults | given)

    kind = type(
        "SamplingParams", (), {"__module__": "vllm.sampling_params", "__init__": init}
    )
    return kind(**settings)


def test_vllms_settings_mean_the_same_here() -> None:
    given = _vllm_params(
        temperature=0.6, top_k=20, max_tokens=512, stop=["END"], logprobs=1, seed=4
    )
    assert resolve_sampling(given) == SamplingParams(
        temperature=0.6, top_k=20, max_tokens=512, stop=("END",), seed=4
    )


def test_vllms_defaults_are_vllms() -> None:
    assert resolve_sampling(_vllm_params()).max_tokens == 16


def test_vllms_structured_output_becomes_the_settings_that_were_made() -> None:
    given = _vllm_params(structured_outputs=_VllmStructuredOutputs(regex="[0-9]+"))
    params = resolve_sampling(given)
    assert params.structured_outputs == {"regex": "[0-9]+"}
    assert params.undivided_because() == "structured_outputs"


def test_a_vllm_setting_that_cannot_be_honoured_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="sets prompt_logprobs=5, which aseer does"):
        resolve_sampling(_vllm_params(prompt_logprobs=5))


def test_vllms_n_is_refused_like_ours() -> None:
    with pytest.raises(ConfigError, match=r"n=[48].*use Group"):
        resolve_sampling(_vllm_params(n=8))


def test_a_vllm_object_is_checked_like_ours() -> None:
    with pytest.raises(ConfigError, match="top_k=-5"):
        resolve_sampling(_vllm_params(top_k=-5))


# Seeds


def test_streams_differ_by_seed_member_and_position() -> None:
    cases = list(itertools.product(range(10), range(16), range(0, 4096, 128)))
    assert len({chunk_seed(*case) for case in cases}) == len(cases)


def test_a_stream_is_repeated_by_the_same_seed_member_and_position() -> None:
    assert chunk_seed(1, 2, 3) == chunk_seed(1, 2, 3)


def test_a_chunks_seed_fits_what_engines_take() -> None:
    seeds = [chunk_seed(seed, 0, 0) for seed in (-1, 0, 2**200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
