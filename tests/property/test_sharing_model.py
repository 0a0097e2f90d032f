"""Counted chunks against a model that keeps every unfinished prompt and compares."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from aseer.kv.sharing import PromptSharing, num_alike
from aseer.types import GroupId

CHUNK = 3
TOKENS = st.lists(st.integers(0, 1), max_size=13)
# A group comes with its prompt, or (None) goes.
STEPS = st.lists(st.tuples(st.integers(0, 4), st.none() | TOKENS), max_size=30)


def num_common(one: list[int], other: list[int]) -> int:
    num = 0
    while num < min(len(one), len(other)) and one[num] == other[num]:
        num += 1
    return num


@given(STEPS, st.integers(0, 4), TOKENS)
def test_a_prefix_is_shared_exactly_with_the_prompts_that_are_there(
    steps, asker, generated
):
    sharing, prompts = PromptSharing(CHUNK), {}
    for number, prompt in steps:
        group_id = GroupId(str(number))
        if prompt is None:
            sharing.remove(group_id)
            prompts.pop(number, None)
        elif number not in prompts:
            sharing.add(group_id, array("i", prompt).tobytes())
            prompts[number] = prompt
        asked = [*prompts.get(asker, []), *generated]
        expected = max((num_common(asked, p) for p in prompts.values()), default=0)
        found = sharing.num_shared(GroupId(str(asker)), array("i", asked).tobytes())
        assert found == expected // CHUNK * CHUNK
        # Nothing is kept for groups that are over.
        chunks = {tuple(p[:n]) for p in prompts.values() for n in ends(p)}
        assert len(sharing) == len(chunks)


def ends(prompt: list[int]) -> range:
    return range(CHUNK, len(prompt) + 1, CHUNK)


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 40), TOKENS), max_size=4))
def test_siblings_are_compared_token_by_token(num, others):
    one = [i % 5 for i in range(num)]
    written = [[i % 5 for i in range(same)] + tail for same, tail in others]
    expected = max((num_common(one, other) for other in written), default=0)
    assert num_alike(array("i", one), [array("i", w) for w in written]) == expected
