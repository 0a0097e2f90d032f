"""The token log: what counts as new, what is given out, what is kept."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import numpy as np
import pytest

from aseer.core.columns import columns_of
from aseer.core.outputs import Outputs
from aseer.dgds.log import MAX_KEPT_TEXTS, TokenLog
from aseer.dgds.messages import TO_CLIENT, GroupDelta
from aseer.types import ChunkId, ChunkProgress

MAX_FETCHED = 65_536


def tokens(*ids: int) -> bytes:
    return np.array(ids, np.int32).tobytes()


def ask(log: TokenLog, cache_infos: Any, now: float = 0.0) -> list[GroupDelta]:
    """The answer to a fetch."""
    packed = log.fetch_cst(msgspec.msgpack.encode(cache_infos), now)
    return TO_CLIENT.decode(packed).groups


def given(log: TokenLog, counts: dict[str, int], group: str = "g") -> dict[str, list]:
    """What a fetch brings: request -> [start, tokens]."""
    (delta,) = ask(log, {group: counts}) or [None]
    return (
        {
            r.request_id: [r.start, list(np.frombuffer(r.tokens, np.int32))]
            for r in delta.requests
        }
        if delta
        else {}
    )


@pytest.fixture
def log() -> TokenLog:
    log = TokenLog()
    log.update_cst("g", "a", 0, tokens(1, 2, 3), now=0.0)
    return log


def test_tokens_that_are_known_are_skipped_and_gaps_ignored(log):
    log.update_cst("g", "a", 1, tokens(2, 3, 4), now=0.0)
    log.update_cst("g", "a", 0, tokens(1, 2), now=0.0)
    log.update_cst("g", "a", 6, tokens(7), now=0.0)
    assert given(log, {}) == {"a": [0, [1, 2, 3, 4]]}


def test_a_fetch_brings_what_lies_beyond_the_askers_offsets(log):
    log.update_cst("g", "b", 0, tokens(9), now=0.0)
    assert given(log, {"a": 2}) == {"a": [2, [3]], "b": [0, [9]]}
    assert given(log, {"a": 3, "b": 1}) == {}
    assert given(log, {"a": 7, "b": 1}) == {}  # the asker is ahead


def test_a_large_fetch_comes_in_parts(log):
    long = np.arange(MAX_FETCHED + 5, dtype=np.int32)
    log.update_cst("g", "long", 0, long.tobytes(), now=0.0)
    have = {"a": 3, "long": 0}
    while part := given(log, have).get("long"):
        assert part[1] == list(range(have["long"], have["long"] + len(part[1])))
        have["long"] += len(part[1])
    assert have["long"] == len(long)


def test_an_unknown_group_is_said_to_be_unknown(log):
    log.finish_group("g")
    (delta,) = ask(log, {"g": {}})
    assert not delta.is_known


def test_a_group_lives_for_its_ttl_after_it_was_last_asked_for(log):
    log.register_group("g", b"key", ttl_s=1000.0, now=0.0)
    ask(log, {"g": {}}, now=500.0)
    log.expire(now=1499.0)
    assert "g" in log
    log.expire(now=1500.0)
    assert "g" not in log


def test_texts_of_a_finished_group_serve_the_next_with_its_prompt(log):
    log.register_group("g", b"key", ttl_s=10.0, now=0.0)
    log.finish_group("g")
    for name, key in [("h", b"key"), ("other", b"another key")]:
        log.update_cst(name, "new", 0, tokens(5), now=0.0)
        log.register_group(name, key, ttl_s=10.0, now=0.0)
    assert given(log, {}, "h") == {"a": [0, [1, 2, 3]], "new": [0, [5]]}
    assert given(log, {}, "other") == {"new": [0, [5]]}


def kept(log: TokenLog, key: str) -> set[str]:
    """Requests whose texts a new group with that prompt is given."""
    log.update_cst(f"later {key}", "new", 0, tokens(5), now=0.0)
    log.register_group(f"later {key}", key.encode(), ttl_s=10.0, now=0.0)
    return set(given(log, {}, f"later {key}")) - {"new"}


def keep(log: TokenLog, *names: str) -> None:
    """Groups of two tokens each that are finished."""
    for name in names:
        log.update_cst(name, name, 0, tokens(1, 2), now=0.0)
        log.register_group(name, name.encode(), ttl_s=10.0, now=0.0)
        log.finish_group(name)


def test_kept_texts_can_be_dropped_which_makes_room():
    log = TokenLog(max_kept_tokens=5)
    keep(log, "a", "b")
    log.forget_kept()
    keep(log, "c", "d")
    assert [kept(log, key) for key in "abcd"] == [set(), set(), {"c"}, {"d"}]


def test_what_is_kept_is_bounded_and_the_oldest_goes_first():
    log = TokenLog(max_kept_tokens=5)
    keep(log, "a", "b", "c")
    assert [kept(log, key) for key in "abc"] == [set(), {"b"}, {"c"}]


def test_a_prompt_keeps_its_latest_texts():
    log = TokenLog()
    for i in range(MAX_KEPT_TEXTS + 3):
        log.update_cst(f"g{i}", f"r{i}", 0, tokens(i), now=0.0)
        log.register_group(f"g{i}", b"key", ttl_s=10.0, now=0.0)
        log.finish_group(f"g{i}")
    log.update_cst("g", "new", 0, tokens(5), now=0.0)
    log.register_group("g", b"key", ttl_s=10.0, now=0.0)
    kept = {f"r{i}" for i in range(3, MAX_KEPT_TEXTS + 3)}
    assert set(given(log, {})) == {"new"} | kept


def test_registering_a_group_that_is_over_does_not_revive_it(log):
    log.finish_group("g")
    log.register_group("g", b"key", ttl_s=10.0, now=0.0)
    assert len(log) == 0


def test_what_is_no_tokens_is_ignored(log):
    log.update_cst("g", "a", 3, b"abc", now=0.0)
    log.update_cst("g", "a", -1, tokens(0, 1, 2, 3, 4), now=0.0)
    log.update_cst("g", "a", 3, tokens(4), now=0.0)
    assert given(log, {}) == {"a": [0, [1, 2, 3, 4]]}


def test_a_group_without_a_text_leaves_nothing(log):
    log.register_group("g", b"key", ttl_s=10.0, now=0.0)
    for i in range(3):
        log.update_cst(f"h{i}", "a", 5, tokens(1), now=0.0)  # its beginning was lost
        log.register_group(f"h{i}", b"key %d" % i, ttl_s=10.0, now=0.0)
        log.finish_group(f"h{i}")
    assert not log._kept
    log.finish_group("g")
    assert list(log._kept) == [b"key"]


class Writing:
    """A request that generates, and is followed by a log from its first token on."""

    def __init__(self, log: TokenLog, request: str) -> None:
        self.outputs = Outputs()
        self.handle = self.outputs.open()
        self.outputs.share(self.handle)
        log.follow("g", request, self.outputs, self.handle, 0.0)
        self.outputs.begin(1, self.handle, 1 << 30)
        self._num = 0

    def write(self, *ids: int) -> None:
        """Generate tokens."""
        values = array("i", ids).tobytes()
        report = ChunkProgress(
            chunk_id=ChunkId(1), start=self._num, tokens=values, logprobs=values
        )
        assert self.outputs.take_columns(columns_of([report])) == (len(ids), [])
        self._num += len(ids)

    def finish(self) -> None:
        """Its response is the user's."""
        self.outputs.end(1)
        self.outputs.close(self.handle)


def test_a_request_that_is_followed_is_read_as_it_grows_and_after_its_end(log):
    writing = Writing(log, "b")
    assert given(log, {"a": 3}) == {}
    writing.write(7, 8)
    assert given(log, {"a": 3}) == {"b": [0, [7, 8]]}
    writing.write(9)
    assert given(log, {"a": 3, "b": 2}) == {"b": [2, [9]]}
    log.update_cst("g", "b", 0, tokens(1, 1, 1, 1), now=0.0)  # it is known better
    writing.finish()
    assert given(log, {"a": 3, "b": 1}) == {"b": [1, [8, 9]]}
    log.register_group("g", b"key", ttl_s=10.0, now=0.0)
    log.finish_group("g")
    assert len(writing.outputs) == 0
    assert kept(log, "key") == {"a", "b"}


def test_a_request_that_is_still_written_is_not_dropped_with_its_group(log):
    writing = Writing(log, "b")
    writing.write(7)
    log.finish_group("g")
    writing.write(8)
    assert writing.outputs.token_ids(writing.handle) == [7, 8]
    writing.finish()
    assert len(writing.outputs) == 0


def test_a_log_that_is_gone_gives_back_what_it_followed():
    log = TokenLog()
    writing = Writing(log, "b")
    writing.write(7)
    writing.finish()
    assert len(writing.outputs) == 1
    del log
    assert len(writing.outputs) == 0


@pytest.mark.parametrize("num", [3, 200, 70_000])
def test_questions_of_any_size_are_understood(log, num):
    name = "r" * min(num, 1000)
    counts = {name + str(i): i for i in range(num)} | {"a": 1}
    assert given(log, counts) == {"a": [1, [2, 3]]}
    log.update_cst("g" * num, name, 0, tokens(5), now=0.0)
    assert given(log, {}, "g" * num) == {name: [0, [5]]}


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"\xc0",
        b"\x81",
        b"\x81\xa1g\x81\xa1a\xff",
        b"\x81\xa1g\x81\xa1a\xa1b",
        b"\xdf\xff\xff\xff\xff\xa1g\x80",
        b"\x81\xdb\xff\xff\xff\xffg\x80",
        b"\x80\x80",
    ],
)
def test_a_malformed_question_is_refused(log, question):
    with pytest.raises(ValueError, match=r"question|count"):
        log.fetch_cst(question, 0.0)
    assert given(log, {"a": 2}) == {"a": [2, [3]]}
