"""Groups are checked at the edge: an error names the group, the value, the way out."""

from __future__ import annotations

import sys
from array import array
from types import SimpleNamespace

import numpy as np
import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.groups import Group, GroupResolver, HuggingFaceTokenizer
from aseer.sampling import SamplingParams
from aseer.types import InstanceId, InstanceInfo

INFO = InstanceInfo(
    instance_id=InstanceId(0),
    num_kv_blocks=100,
    block_size=16,
    max_num_seqs=8,
    max_model_len=64,
    vocab_size=1000,
)


class WordTokenizer:
    """A token a word; a chat is its contents with a marker before each."""

    def encode_text(self, text):
        return [len(word) for word in text.split()]

    def encode_chat(self, messages):
        return [t for m in messages for t in (999, *self.encode_text(m["content"]))]


def resolver(**default):
    return GroupResolver(INFO, WordTokenizer(), SamplingParams(**default))


def tokens_of(task):
    return array("i", task.prompt).tolist()


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ((4, 5), [4, 5]),
        (np.array([6, 7]), [6, 7]),
        ("to be or", [2, 2, 2]),
        ([{"role": "user", "content": "to be"}], [999, 2, 2]),
    ],
)
def test_a_prompt_is_ids_or_text_or_messages(prompt, tokens):
    task = resolver().resolve(Group(prompt))
    assert tokens_of(task) == tokens
    assert task.num_prompt_tokens == len(tokens)
    assert task.num_requests == 8


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group([], group_id="a"), r"group 'a': its prompt is empty; give at least one"),
        (Group("", group_id="a"), r"group 'a': its prompt is empty"),
        (Group([1] * 64, group_id="a"), r"'a'.*64 tokens leaves no room.*len=64"),
        (Group([1], n=0, group_id="a"), r"'a': n=0 is not allowed; give an int >= 1"),
        (Group([1], n=True, group_id="a"), r"'a': n=True"),
        (Group([1, 1000], group_id="a"), r"'a'.*token id 1000.*0 to 999"),
        (Group([1, -1], group_id="a"), r"'a'.*token id -1"),
        (Group([1, "x"], group_id="a"), r"'a'.*'x' where a token id is expected"),
        (Group([{"role": "user"}], group_id="a"), r"'a'.*no 'role' or no 'content'"),
        (Group(7, group_id="a"), r"'a'.*prompt is a int; give token ids, a text"),
        (Group([1], sampling={"topp": 1}, group_id="a"), r"'a'.*\['topp'\]; known are"),
        (Group([1], sampling={"n": 2}, group_id="a"), r"'a'.*use Group\(prompt, n="),
        (Group([1], sampling=3, group_id="a"), r"'a'.*sampling=3 is a int; give"),
        (
            Group([1] * 60, sampling={"min_tokens": 5}, group_id="a"),
            r"'a': min_tokens=5 is more than the 4 tokens that fit",
        ),
        (Group([1], n=2, known_lengths=[1], group_id="a"), r"'a'.*1 entries for n=2"),
        (
            Group([1], n=1, known_lengths=[1.5], group_id="a"),
            r"'a'.*\[1.5\].*give 1 ints",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_words(group, message):
    with pytest.raises(ConfigError, match=message):
        resolver().resolve(group)


def test_what_is_not_a_group_is_refused():
    with pytest.raises(ConfigError, match=r"a group is an aseer.Group, not list"):
        resolver().resolve([1, 2])


def test_ids_are_unique_and_made_where_none_is_given():
    r = resolver()
    assert r.resolve(Group([1])).group_id == "group-0"
    assert r.resolve(Group([1], group_id="x")).group_id == "x"
    assert r.resolve(Group([1])).group_id == "group-2"
    with pytest.raises(ConfigError, match=r"'x' is in this rollout twice"):
        r.resolve(Group([1], group_id="x"))


@pytest.mark.parametrize(("max_tokens", "resolved"), [(None, 60), (10, 10), (1000, 60)])
def test_max_tokens_is_bounded_by_the_models_length(max_tokens, resolved):
    task = resolver().resolve(Group([1] * 4, sampling={"max_tokens": max_tokens}))
    assert task.max_tokens == resolved


def test_a_group_without_settings_has_the_engines():
    task = resolver(temperature=0.3, seed=9).resolve(Group([1]))
    assert task.sampling["temperature"] == 0.3
    assert task.seed == 9


def test_settings_that_look_back_over_a_chunks_beginning_forbid_dividing():
    for name, value in [
        ("presence_penalty", 0.1),
        ("frequency_penalty", 0.1),
        ("structured_outputs", {"regex": "a"}),
        ("bad_words", ["no way"]),
    ]:
        task = resolver().resolve(Group([1], sampling={name: value}))
        assert task.undivided_because == name
    task = resolver().resolve(Group([1], sampling={"repetition_penalty": 1.2}))
    assert task.undivided_because is None


@pytest.mark.parametrize("setting", [{"min_p": 0.1}, {"logit_bias": {1: 1.0}}])
def test_settings_that_speculation_cannot_honour_are_refused_with_it(setting):
    group = Group([1], sampling=setting)
    r = GroupResolver(INFO, WordTokenizer(), SamplingParams(), speculating=True)
    with pytest.raises(ConfigError, match="vLLM refuses while it speculates"):
        r.resolve(group)
    assert resolver().resolve(group).num_requests == 8


def test_lengths_may_be_numpys():
    task = resolver().resolve(Group([1], n=2, known_lengths=np.array([3, 4])))
    assert task.known_lengths == [3, 4]


def test_a_policy_that_goes_by_lengths_refuses_groups_without():
    r = GroupResolver(INFO, WordTokenizer(), SamplingParams(), needs_lengths=True)
    with pytest.raises(ConfigError, match=r"'a': .*'longest-first'.*known_lengths"):
        r.resolve(Group([1], group_id="a"))
    assert r.resolve(Group([1], n=2, known_lengths=[3, 4])).known_lengths == [3, 4]


class Loader:
    """In place of transformers: what it was asked to load, and how."""

    chat_template = True

    def from_pretrained(self, name, **how):
        self.name, self.how = name, how
        return self

    def encode(self, text, **_how):
        return list(text.encode())

    def apply_chat_template(self, messages, **_how):
        if not self.chat_template:
            raise ValueError("chat_template is not set")
        return "".join(m["content"] for m in messages)


@pytest.fixture
def loader(monkeypatch):
    loader = Loader()
    monkeypatch.setitem(
        sys.modules, "transformers", SimpleNamespace(AutoTokenizer=loader)
    )
    return loader


def test_the_tokenizer_is_the_one_that_the_engines_load(loader):
    args = {"trust_remote_code": True, "revision": "r1", "hf_token": "secret"}
    config = EngineConfig(model="m", engine_args=args)
    assert HuggingFaceTokenizer(config).encode_text("a") == [97]
    assert loader.name == "m"
    assert loader.how["trust_remote_code"] is True
    assert (loader.how["revision"], loader.how["token"]) == ("r1", "secret")
    args = {"revision": "r1", "tokenizer_revision": "r2"}
    config = EngineConfig(model="m", tokenizer="t", engine_args=args)
    HuggingFaceTokenizer(config).encode_text("a")
    assert (loader.name, loader.how["revision"]) == ("t", "r2")


def test_remote_code_is_refused_and_not_asked_about(loader):
    HuggingFaceTokenizer(EngineConfig(model="m")).encode_text("a")
    assert loader.how["trust_remote_code"] is False


def test_a_tokenizer_that_only_vllm_has_is_not_replaced_by_another(loader):
    config = EngineConfig(model="m", engine_args={"tokenizer_mode": "mistral"})
    with pytest.raises(ConfigError, match=r"tokenizer_mode='mistral'.*token ids"):
        HuggingFaceTokenizer(config).encode_text("a")


def test_a_chat_without_a_template_is_refused_with_words(loader):
    loader.chat_template = False
    r = GroupResolver(
        INFO, HuggingFaceTokenizer(EngineConfig(model="m")), SamplingParams()
    )
    group = Group([{"role": "user", "content": "hi"}], group_id="a")
    with pytest.raises(ConfigError, match=r"'a': the chat template of 'm'.*not set"):
        r.resolve(group)
