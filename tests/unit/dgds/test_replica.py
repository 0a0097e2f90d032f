"""The replica: chunks, migrations and what is freed."""

from __future__ import annotations

import numpy as np
import pytest

from aseer.dgds.messages import Deltas, GroupDelta, RequestDelta
from aseer.dgds.replica import Replica, RequestKey

PROMPT = np.array([1, 2, 3], np.int32)
KEY = RequestKey("g", "g/0")


def row(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def deltas(request: str, start: int, *tokens: int) -> Deltas:
    delta = RequestDelta(request, start, row(*tokens).tobytes())
    return Deltas([GroupDelta("g", True, [delta])])


GONE = Deltas([GroupDelta("g", False, [])])


@pytest.fixture
def replica() -> Replica:
    return Replica(ttl_s=10.0)


def test_a_resumed_chunk_brings_what_was_generated_elsewhere_once(replica):
    replica.begin(KEY, PROMPT, row(), now=0.0)
    replica.apply(deltas("g/1", 0, 7, 8))
    resumed = RequestKey("g", "g/1")
    replica.begin(resumed, PROMPT, row(7, 8, 9), now=0.0)
    assert replica.text(resumed).tolist() == [7, 8, 9]


def test_tokens_that_were_sampled_and_not_kept_are_forgotten(replica):
    handle = replica.begin(KEY, PROMPT, row(7), now=0.0)
    replica.forest.append(np.array([handle]), row(8, 9), np.array([0, 2]))
    again = replica.begin(KEY, PROMPT, row(7, 5), now=0.0)
    assert again != handle
    assert replica.text(KEY).tolist() == [7, 5]
    assert replica.forest.num_tokens == len(PROMPT) + 2


def test_a_running_requests_text_is_its_engines_to_write(replica):
    replica.begin(KEY, PROMPT, row(7), now=0.0)
    replica.apply(deltas("g/0", 1, 8))
    assert replica.text(KEY).tolist() == [7]


def test_what_is_fetched_says_how_much_of_each_request_is_here(replica):
    replica.begin(KEY, PROMPT, row(7), now=0.0)
    replica.apply(deltas("g/1", 0, 7, 8))
    assert replica.fetch().cache_infos == {"g": {"g/0": 1, "g/1": 2}}


def test_a_group_is_registered_once_and_again_if_the_server_forgot(replica):
    replica.begin(KEY, PROMPT, row(), now=0.0)
    (entry,) = replica.registration().groups
    assert entry.group_id == "g"
    assert replica.registration() is None
    replica.apply(GONE)
    assert replica.registration() is not None


def test_a_group_that_is_over_is_freed_when_nothing_of_it_runs(replica):
    replica.begin(KEY, PROMPT, row(7), now=0.0)
    replica.apply(GONE)
    assert replica.forest.num_groups == 1
    replica.end(KEY, now=0.0)
    replica.apply(GONE)
    assert replica.forest.num_groups == 0
    assert replica.fetch() is None
    replica.apply(deltas("g/1", 0, 7))  # late
    assert replica.forest.num_tokens == 0


def test_a_group_without_work_here_is_freed_after_its_ttl(replica):
    replica.begin(KEY, PROMPT, row(7), now=0.0)
    replica.end(KEY, now=5.0)
    replica.forget_unused(now=14.0)
    assert replica.forest.num_groups == 1
    replica.forget_unused(now=16.0)
    assert replica.forest.num_groups == 0


def test_prompts_of_equal_tokens_and_other_images_have_other_names() -> None:
    replica = Replica(ttl_s=60)
    for name, images in (("a", ""), ("b", "one"), ("c", "other"), ("d", "one")):
        replica.begin(RequestKey(name, f"{name}/0"), PROMPT, row(), 0.0, images)
    told = replica.registration()
    assert told is not None
    keys = {entry.group_id: entry.prompt_key for entry in told.groups}
    assert keys["b"] == keys["d"]
    assert len(set(keys.values())) == 3
