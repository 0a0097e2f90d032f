"""Recorded rollouts: the file's forms, the checksum, and smaller vocabularies."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from aseer.data import trace
from aseer.data.trace import Trace, TraceGroup
from aseer.errors import ConfigError
from aseer.sim import workload

PLAIN = [
    {"prompt": [1, 2], "responses": [[3, 9], [4, 5, 6]]},
    {"prompt": [7], "responses": [[3, 9]]},
]


def trace_of(groups, **settings) -> Trace:
    return Trace(
        groups=[
            TraceGroup(
                np.array(g["prompt"], np.int32),
                [np.array(r, np.int32) for r in g["responses"]],
            )
            for g in groups
        ],
        settings=settings,
    )


def texts(found: Trace) -> list[list[int]]:
    return [r.tolist() for g in found.groups for r in (g.prompt, *g.responses)]


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_what_is_saved_is_loaded(tmp_path, name):
    saved = trace_of(PLAIN, max_tokens=8, temperature=0.5)
    trace.save(saved, tmp_path / name)
    found = trace.load(tmp_path / name)
    assert texts(found) == texts(saved)
    assert found.settings == {"max_tokens": 8, "temperature": 0.5}
    assert found.sha256 == saved.sha256
    assert (found.num_requests, found.num_tokens, found.max_tokens) == (3, 7, 8)


def test_the_same_trace_is_the_same_file(tmp_path):
    for name in ("a.json.gz", "b.json.gz"):
        trace.save(trace_of(PLAIN), tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (
        tmp_path / "b.json.gz"
    ).read_bytes()


def test_groups_alone_are_a_trace_with_the_same_checksum(tmp_path):
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(PLAIN))
    found = trace.load(path)
    assert found.sha256 == trace_of(PLAIN, max_tokens=8).sha256
    assert found.max_tokens == 3
    assert found.settings == {}


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_changed_token_is_refused_by_every_reader(tmp_path, name):
    path = tmp_path / name
    content = trace_of(PLAIN).to_dict()
    content["groups"][0]["responses"][1][0] += 1
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for load in (trace.load, workload.load):
        with pytest.raises(ConfigError, match="was changed"):
            load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "not a JSON list"),
        ("[3]", "not a JSON list"),
        ("[]", "at least one group"),
        ('[{"prompt": [1]}]', "KeyError"),
        ('[{"prompt": [1], "responses": [["a"]]}]', "not a recorded rollout"),
        ('[{"prompt": [1], "responses": [[-1]]}]', "not a list of token ids"),
        ('[{"prompt": [1], "responses": [[99999999999]]}]', "OverflowError"),
        ('[{"prompt": [1], "responses": []}]', "no response"),
        ('[{"prompt": [], "responses": [[1]]}]', "empty text"),
        ('[{"prompt": [1], "responses": [[]]}]', "empty text"),
    ],
)
def test_what_is_no_trace_is_explained(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        trace.load(path)


def test_no_response_is_longer_than_max_tokens():
    with pytest.raises(ConfigError, match="longer than"):
        trace_of(PLAIN, max_tokens=2)


def test_a_trace_is_a_workload_with_its_max_tokens(tmp_path):
    trace.save(trace_of(PLAIN, max_tokens=8), tmp_path / "t.json.gz")
    work = workload.load(tmp_path / "t.json.gz")
    assert (work.lengths, work.num_prompt_tokens) == ([[2, 3], [2]], [2, 1])
    assert work.max_tokens == 8


def test_the_first_groups_keep_what_responses_could_have_had():
    some = trace_of(PLAIN).part(1)
    assert (len(some.groups), some.max_tokens) == (1, 3)


def test_a_part_may_be_cut_off_earlier():
    some = trace_of(PLAIN, max_tokens=8).part(None, max_tokens=2)
    assert texts(some) == [[1, 2], [3, 9], [4, 5], [7], [3, 9]]
    assert some.max_tokens == 2
    assert trace_of(PLAIN).part(None, max_tokens=50).max_tokens == 3


def test_by_rank_keeps_the_texts_structure_and_ends():
    found = trace_of(PLAIN, max_tokens=3).by_rank(vocab_size=20, end_token=1)
    (first, short, cut, second, again) = texts(found)
    assert list(map(len, texts(found))) == list(map(len, texts(trace_of(PLAIN))))
    # 3 and 9 occur twice, the lower id first; the rest by id.
    assert (first, second) == ([5, 6], [10])
    assert short == again == [3, 1]
    assert cut == [7, 8, 9]
    assert 1 not in cut


def test_by_rank_keeps_frequent_tokens_apart():
    rng = np.random.default_rng(0)
    text = (rng.zipf(1.2, 4000) % 5000).astype(np.int32)
    found = Trace(groups=[TraceGroup(text[:9], [text])]).by_rank(64, end_token=1)
    new = found.groups[0].responses[0]
    assert new.min() >= 3
    assert new.max() < 64
    both = Counter(zip(text.tolist(), new.tolist(), strict=True))
    for token, _ in Counter(text.tolist()).most_common(30):
        (mapped,) = {b for a, b in both if a == token}
        assert {a for a, b in both if b == mapped} == {token}


def test_as_it_is_every_short_response_ends_with_the_end_token():
    found = trace_of(PLAIN, max_tokens=3).as_is(9)
    assert texts(found) == texts(trace_of(PLAIN))
    assert texts(trace_of(PLAIN, max_tokens=4).as_is(9))[2] == [4, 5, 9]


def test_an_end_token_within_a_response_is_refused():
    with pytest.raises(ConfigError, match="stands within"):
        trace_of([{"prompt": [1], "responses": [[9, 3, 9]]}], max_tokens=5).as_is(9)


def test_the_end_token_is_what_most_responses_end_with():
    assert trace_of(PLAIN, max_tokens=3).end_token(0) == 9
    assert trace_of(PLAIN[1:]).end_token(7) == 7  # all were cut off
