"""Groups are checked at the edge: an error names the group, the value, the way out."""

from __future__ import annotations

import sys
import threading
from array import array
from types import SimpleNamespace

import numpy as np
import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.groups import Group, GroupResolver, check_group_id, check_groups
from aseer.inputs.tokenizer import HuggingFaceTokenizer
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


CHAT = [{"role": "user", "content": "to be"}]


class WordTokenizer:
    """A token a word; a chat is its contents with a marker before each."""

    def encode_text(self, text):
        return [len(word) for word in text.split()]

    def encode_chat(self, messages, *, tools=None, template_kwargs=None):
        self.rendered_with = (tools, template_kwargs)
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
        ([np.int64(6), np.array(7)], [6, 7]),
        (range(3), [0, 1, 2]),
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
        (
            Group([1], n=0, group_id="a"),
            r"'a': n=0 is not allowed; give an int from 1 to 1000000",
        ),
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
        (Group([1], n=10**30, group_id="a"), r"'a': n=1000.* an int from 1 to 1000000"),
        (
            Group(b"abc", group_id="a"),
            r"'a'.*prompt is a bytes; give token ids, a text",
        ),
        (Group({1, 2}, group_id="a"), r"'a'.*prompt is a set; give token ids"),
        (Group([True], group_id="a"), r"'a'.*True where a token id is expected"),
        (
            Group(np.ones((1, 3), int), group_id="a"),
            r"'a'.*shape \(1, 3\).*prompt\[0\]",
        ),
        (
            Group({"input_ids": [1]}, group_id="a"),
            r"'a'.*a dict.*prompt\['input_ids'\]",
        ),
        (Group("\ud800", group_id="a"), r"'a': its prompt is no valid Unicode"),
        (
            Group([1], sampling={"stop": ["\ud800"]}, group_id="a"),
            r"'a': stop=.*Unicode",
        ),
        (
            Group([1], group_id="\ud800"),
            r"group_id='.ud800' cannot be told to an engine",
        ),
        (
            Group([1], sampling={"stop_token_ids": [3, 1000]}, group_id="a"),
            r"'a': sampling stop_token_ids has token id 1000.*0 to 999",
        ),
        (
            Group([1], sampling={"allowed_token_ids": [5000, 1]}, group_id="a"),
            r"'a': sampling allowed_token_ids has token id 5000.*0 to 999",
        ),
        (
            Group([1], sampling={"logit_bias": {1000: 1.0}}, group_id="a"),
            r"'a': sampling logit_bias has token id 1000.*0 to 999",
        ),
        (
            Group([1], tools=[{}], group_id="a"),
            r"'a': its tools.*no list of chat messages",
        ),
        (
            Group(CHAT, chat_template_kwargs={"tokenize": True}, group_id="a"),
            r"'a': chat_template_kwargs has \['tokenize'\]",
        ),
        (Group(CHAT, chat_template_kwargs=7, group_id="a"), r"'a'.*=7.*a mapping"),
        (
            Group(CHAT, chat_template_kwargs=np.ones(2), group_id="a"),
            r"'a': chat_template_kwargs=array.*a mapping",
        ),
        (Group(CHAT, tools=np.ones(2), group_id="a"), r"'a': tools=array.*a list"),
        (Group(CHAT, tools="search", group_id="a"), r"'a': tools='search'.*a list"),
        (Group([1], n=2, known_lengths=[1], group_id="a"), r"'a'.*1 entries for n=2"),
        (
            Group([1], n=1, known_lengths=[1 << 31], group_id="a"),
            r"'a'.*known_lengths=\[2147483648\].*1 ints from 0 to 2147483647",
        ),
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


def test_made_ids_differ_from_those_that_others_bring():
    groups = [Group([1], group_id="group-1"), Group([1]), Group([1])]
    for order in (groups, groups[::-1]):
        tasks = resolver().resolve_all(order)
        assert len({task.group_id for task in tasks}) == 3
    r = resolver()
    assert r.resolve(groups[0]).group_id == "group-1"
    assert r.resolve(Group([1])).group_id == "group-1-2"


def test_a_made_id_that_a_later_group_brings_is_refused_with_words():
    r = resolver()
    r.resolve(Group([1]))
    with pytest.raises(ConfigError, match=r"'group-0' was made for an earlier group"):
        r.resolve(Group([1], group_id="group-0"))


@pytest.mark.parametrize(
    "wrong", [Group([], group_id="x"), Group([1], group_id="b"), 7]
)
def test_a_list_is_taken_whole_or_not_at_all(wrong):
    r = resolver()
    good = [Group([1], group_id="a"), Group([1], group_id="b"), Group([1])]
    with pytest.raises(ConfigError):
        r.resolve_all([*good, wrong])
    ids = [task.group_id for task in r.resolve_all(good)]
    assert ids == ["a", "b", "group-2"]


@pytest.mark.parametrize("group_id", [7, np.int64(7), b"7", True])
def test_an_id_is_a_text_for_groups_and_for_cancelling(group_id):
    with pytest.raises(ConfigError, match=r"group_id=.* give a str, such as"):
        check_group_id(group_id)
    with pytest.raises(ConfigError, match=r"group_id=.* give a str, such as"):
        resolver().resolve(Group([1], group_id=group_id))


def test_an_id_is_plain_text():
    (task,) = resolver().resolve_all([Group([1], group_id=np.str_("a"))])
    assert type(task.group_id) is str


@pytest.mark.parametrize(
    ("groups", "advice"),
    [
        (Group([1]), r"not a Group .*give \[group\]"),
        (None, r"not a NoneType .*give a list or an iterator"),
        ("to be", r"not a str .*give \[aseer.Group\(prompt\)\]"),
        ({"prompt": [1]}, r"not a dict .*give a list or an iterator"),
        (lambda: [], r"not a function .*call it"),
        (np.float32(2), r"not a float32 .*give a list or an iterator"),
    ],
)
def test_what_is_no_source_of_groups_is_refused_with_what_to_give(groups, advice):
    with pytest.raises(ConfigError, match=advice):
        check_groups(groups)


def test_lists_and_iterators_are_sources_of_groups():
    async def some():
        yield Group([1])

    for groups in ([], (), iter([]), some(), {Group("a", group_id="a")}):
        assert check_groups(groups) is groups


class Tensor:
    """As one of torch's on the device "meta"."""

    shape = (3,)

    def tolist(self):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")


def test_a_tensor_without_values_is_refused_with_words():
    with pytest.raises(ConfigError, match=r"'a': its prompt is a tensor without value"):
        resolver().resolve(Group(Tensor(), group_id="a"))


def test_settings_in_the_arrays_of_numpy_are_plain_in_the_task():
    settings = {
        "temperature": np.float64(0.8),
        "top_k": np.int64(3),
        "ignore_eos": np.True_,
        "stop": np.array(["a"]),
        "stop_token_ids": {5, 4},
        "logit_bias": {np.int32(7): np.float32(1)},
        "structured_outputs": {"json": {"maximum": np.int64(9), "enum": ("a", None)}},
    }
    sampling = resolver().resolve(Group([1], sampling=settings)).sampling
    assert sampling["temperature"] == 0.8
    assert sampling["stop_token_ids"] == (4, 5)
    assert sampling["structured_outputs"]["json"] == {"maximum": 9, "enum": ["a", None]}
    for value in (sampling["temperature"], *sampling["logit_bias"].values()):
        assert type(value) is float
    for value in (sampling["top_k"], *sampling["logit_bias"]):
        assert type(value) is int
    assert sampling["ignore_eos"] is True
    assert type(sampling["stop"][0]) is str


@pytest.mark.parametrize("prompt", ["x" * 1000, [CHAT[0] | {"content": "x" * 1000}]])
def test_ids_that_a_tokenizer_makes_are_the_models_too(prompt):
    with pytest.raises(
        ConfigError, match=r"'a': its prompt has token id 1000; this mo"
    ):
        resolver().resolve(Group(prompt, group_id="a"))


def test_what_a_chat_is_rendered_with_is_the_groups():
    r = resolver()
    tools = [{"type": "function"}]
    r.resolve(Group(CHAT, tools=tools, chat_template_kwargs={"enable_thinking": False}))
    assert r._encoder._tokenizer.rendered_with == (tools, {"enable_thinking": False})


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

    def apply_chat_template(self, messages, **how):
        self.rendered = how
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


def test_the_log_says_that_a_tokenizer_is_waited_for_if_that_takes_long(
    loader, monkeypatch
):
    said, is_told = [], threading.Event()

    def tell(*words):
        said.append(words)
        is_told.set()

    monkeypatch.setattr("aseer.inputs.tokenizer._log.warning", tell)
    HuggingFaceTokenizer(EngineConfig(model="m")).encode_text("a")
    assert not said
    monkeypatch.setattr("aseer.inputs.tokenizer._LONG_LOAD_S", 0.0)
    monkeypatch.setattr(
        loader, "from_pretrained", lambda *_, **__: is_told.wait(20) and loader
    )
    assert HuggingFaceTokenizer(EngineConfig(model="m")).encode_text("a") == [97]
    ((form, *words),) = said
    assert "the tokenizer of 'm' is still being loaded" in form % tuple(words)


def test_a_tokenizer_that_only_vllm_has_is_not_replaced_by_another(loader):
    config = EngineConfig(model="m", engine_args={"tokenizer_mode": "mistral"})
    with pytest.raises(ConfigError, match=r"tokenizer_mode='mistral'.*token ids"):
        HuggingFaceTokenizer(config).encode_text("a")


def test_a_chat_is_rendered_with_its_own_settings(loader):
    tokenizer = HuggingFaceTokenizer(EngineConfig(model="m"))
    tools = [{"type": "function"}]
    settings = {"enable_thinking": False, "add_generation_prompt": False}
    tokenizer.encode_chat(CHAT, tools=tools, template_kwargs=settings)
    assert loader.rendered == {"tools": tools, "tokenize": False, **settings}
    tokenizer.encode_chat(CHAT, tools=[])
    expected = {"tools": None, "tokenize": False, "add_generation_prompt": True}
    assert loader.rendered == expected


def test_a_chat_without_a_template_is_refused_with_words(loader):
    loader.chat_template = False
    r = GroupResolver(
        INFO, HuggingFaceTokenizer(EngineConfig(model="m")), SamplingParams()
    )
    group = Group([{"role": "user", "content": "hi"}], group_id="a")
    with pytest.raises(ConfigError, match=r"'a': the chat template of 'm'.*not set"):
        r.resolve(group)
