"""What unfinished groups begin with is shared, whole chunks of it and nothing else."""

from __future__ import annotations

from array import array

from aseer.kv.sharing import PromptSharing, num_alike
from aseer.types import GroupId

A, B, C = (GroupId(name) for name in "abc")
SYSTEM = [7] * 8


def tokens(*ids: int) -> bytes:
    return array("i", ids).tobytes()


def test_a_prefix_is_shared_as_long_as_a_group_that_has_it_is_counted():
    sharing = PromptSharing(chunk_tokens=4)
    sharing.add(A, tokens(*SYSTEM, 1, 1, 1, 1))
    sharing.add(B, tokens(*SYSTEM, 2, 2, 2, 2))
    sharing.remove(A)
    assert sharing.num_shared(A, tokens(*SYSTEM, 1, 1, 1, 1)) == 8
    assert sharing.num_shared(B, tokens(*SYSTEM, 2, 2, 2, 2, 3, 3, 3, 3)) == 12
    sharing.remove(A)  # a second time changes nothing
    assert sharing.num_shared(A, tokens(*SYSTEM)) == 8
    sharing.remove(B)
    assert sharing.num_shared(B, tokens(*SYSTEM)) == 0
    assert len(sharing) == 0


def test_the_same_prompt_twice_is_shared_until_both_are_over():
    sharing = PromptSharing(chunk_tokens=4)
    sharing.add(A, tokens(*SYSTEM))
    sharing.add(B, tokens(*SYSTEM))
    assert len(sharing) == 2
    sharing.remove(A)
    assert sharing.num_shared(A, tokens(*SYSTEM, 1)) == 8


def test_what_does_not_fill_a_chunk_or_begins_elsewhere_is_not_shared():
    sharing = PromptSharing(chunk_tokens=4)
    sharing.add(A, tokens(1, 2, 3, 4, 5, 6))
    assert sharing.num_shared(B, tokens(1, 2, 3, 4, 5, 6)) == 4
    assert sharing.num_shared(B, tokens(1, 2, 3)) == 0
    assert sharing.num_shared(B, tokens(0, 0, 0, 0, 1, 2, 3, 4)) == 0
    sharing.add(B, tokens(9))
    sharing.add(C, b"")
    assert len(sharing) == 1


def test_a_prompt_that_goes_on_where_a_response_ends_keeps_its_kv():
    sharing = PromptSharing(chunk_tokens=4)
    sharing.add(A, tokens(*SYSTEM, 1, 1))
    sharing.add(B, tokens(*SYSTEM, 1, 1, 2, 2, 3, 3, 3, 3))  # A's response, and more
    assert sharing.num_shared(A, tokens(*SYSTEM, 1, 1, 2, 2, 9, 9, 9, 9)) == 12
    assert sharing.num_shared(A, tokens(*SYSTEM, 1, 1, 9, 9, 3, 3, 3, 3)) == 8


def test_siblings_are_alike_up_to_the_first_token_that_differs_from_all():
    one = array("i", range(40))
    assert num_alike(one, []) == 0
    assert num_alike(one, [array("i", [0, 1, 9]), array("i")]) == 2
    assert num_alike(one, [array("i", range(20)), array("i", range(50))]) == 40
    assert num_alike(array("i"), [one]) == 0
