"""Whatever a rollout accepts can be sent to an engine and scheduled."""

from __future__ import annotations

from array import array
from enum import IntEnum, StrEnum
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
from hypothesis import given, settings

from aseer.buffer import RequestBuffer
from aseer.config import EngineConfig
from aseer.controller import Controller
from aseer.errors import ConfigError
from aseer.groups import Group, GroupResolver
from aseer.instance.messages import TO_INSTANCE, Run
from aseer.sampling import SamplingParams
from aseer.types import Assignment, InstanceId, InstanceInfo
from tests.unit.builders import chunks_in

INFO = InstanceInfo(
    instance_id=InstanceId(0),
    num_kv_blocks=64,
    block_size=16,
    max_num_seqs=4,
    max_model_len=256,
    vocab_size=1000,
)


class Word(str):
    """A text that is no plain `str`."""


class Colour(StrEnum):
    RED = "red"


class Number(IntEnum):
    THREE = 3


KEYS = (
    st.integers(-2, 1100)
    | st.sampled_from([1 << 31, (1 << 63) - 1, 1 << 64, -(1 << 64), Number.THREE])
    | st.integers(0, 90).map(np.int64)
    | st.integers(0, 90).map(np.uint8)
)
INTS = KEYS | st.integers(0, 90).map(np.array)
FLOATS = (
    st.floats(-3, 3)
    | st.floats(width=32).map(np.float32)
    | st.floats(0, 1).map(np.float64)
    | st.sampled_from([1, np.longdouble(0.5), np.array(0.5), Fraction(1, 2), 1e39])
)
BOOLS = st.sampled_from([True, False, np.True_, np.False_, np.array(True), 1])
TEXTS = st.text(max_size=4) | st.sampled_from(
    [Word("a"), Colour.RED, np.str_("b"), "\ud800", Word("\udfff")]
)


def lists_of(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(items, max_size=3)
    return lists | lists.map(tuple) | st.lists(TEXTS | st.integers(0, 9)).map(set)


ARRAYS = st.lists(st.integers(0, 1001), max_size=3).map(
    lambda ids: np.array(ids, dtype=np.int64)
) | st.sampled_from([array("i", [1, 2]), range(3), np.ones((2, 2)), b"ab"])
IDS = lists_of(INTS) | ARRAYS
SCHEMAS = st.recursive(
    INTS | FLOATS | BOOLS | TEXTS | st.none(),
    lambda inner: lists_of(inner) | st.dictionaries(TEXTS | KEYS, inner),
    max_leaves=5,
)
VALUES = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"),
        FLOATS,
    ),
    **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "seed"), INTS),
    **dict.fromkeys(("stop", "bad_words"), lists_of(TEXTS) | TEXTS),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), IDS),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "detokenize"), BOOLS),
    "logit_bias": st.dictionaries(KEYS, FLOATS, max_size=2),
    "structured_outputs": st.dictionaries(st.just("json"), SCHEMAS)
    | st.dictionaries(st.just("choice"), lists_of(TEXTS))
    | st.dictionaries(st.sampled_from(["regex", "json_object"]), TEXTS | BOOLS),
}
# One thing at a time, or what is refused would hide what is not.
SETTINGS = st.one_of(
    [VALUES[name].map(lambda value, name=name: {name: value}) for name in VALUES]
)
PROMPT = [1, 2, 3]
LENGTHS = st.lists(KEYS | st.just(1 << 66), min_size=2, max_size=2)
SIZES = st.sampled_from([1, 3, np.int64(2), Number.THREE, True, 0, 1 << 70])
GROUPS = (
    st.builds(Group, st.just(PROMPT), st.just(2), SETTINGS)
    | st.builds(Group, IDS, st.just(2))
    | st.builds(Group, st.just(PROMPT), SIZES)
    | st.builds(Group, st.just(PROMPT), st.just(2), group_id=TEXTS)
    | st.builds(Group, st.just(PROMPT), st.just(2), known_lengths=LENGTHS)
    | st.builds(Group, st.just(PROMPT), st.just(2), metadata=st.just(object()))
)


class NoTexts:
    def encode_text(self, text):
        return [len(text)]

    def encode_chat(self, messages, *, tools=None, template_kwargs=None):
        raise AssertionError


def accepted(groups: list[Group]):
    resolver = GroupResolver(INFO, NoTexts(), SamplingParams())
    tasks = []
    for group in groups:
        try:
            tasks.append(resolver.resolve(group))
        except ConfigError:
            continue
    return tasks


@settings(max_examples=3 * settings.default.max_examples)
@given(st.lists(GROUPS, max_size=4))
def test_what_is_accepted_can_be_sent_to_an_engine(groups):
    for task in accepted(groups):
        buffer = RequestBuffer(max_request_retries=0)
        (request, *_) = buffer.add_group(task, 0.0)
        where = Assignment(request.request_id, InstanceId(0), task.max_tokens, 1)
        chunk = buffer.start_chunk(where, 0.0)
        sent = msgspec.msgpack.encode(Run(chunk))
        received = TO_INSTANCE.decode(sent)
        assert msgspec.msgpack.encode(received) == sent


@settings(max_examples=3 * settings.default.max_examples)
@given(st.lists(GROUPS, max_size=4))
def test_what_is_accepted_can_be_scheduled_by_any_policy(groups):
    tasks = accepted(groups)
    with_lengths = [task for task in tasks if task.known_lengths is not None]
    for policy, some in (("context-aware", tasks), ("longest-first", with_lengths)):
        controller = Controller(policy=policy, chunk_size=32)
        controller.instance_up(INFO, 0.0)
        commands = controller.add_groups(some, 0.0)
        assert bool(chunks_in(commands)) == bool(some)
        controller.check_integrity()


@given(st.dictionaries(TEXTS | KEYS, SCHEMAS, max_size=3))
def test_engine_arguments_that_are_accepted_arrive_as_they_are(args):
    try:
        config = EngineConfig(model="m", engine_args=args)
    except ConfigError:
        return
    sent = msgspec.json.encode(config.engine_args)  # as processes are started with
    assert msgspec.json.decode(sent) == config.engine_args
