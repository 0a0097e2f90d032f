"""No less is reserved for prompts than an engine keeps copies of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from aseer.core.prompts import SharedPrompts
from aseer.types import GroupId, InstanceId, RequestId

if TYPE_CHECKING:
    from collections.abc import Sequence

G, A = GroupId("g"), InstanceId(0)


@settings(max_examples=3 * settings.default.max_examples)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_every_copy_in_use_is_reserved(moves: Sequence[tuple[int, bool]]) -> None:
    """Four siblings start, have a first token, and end, in any order."""
    prompts = SharedPrompts()
    copies: dict[int, int] = {}  # by who runs; each is named by who made it and when
    begun: set[int] = set()
    findable: list[int] = []  # the engine finds the first that is still in use
    for now, (index, ends) in enumerate(moves):
        request_id = RequestId(f"g/{index}")
        if index not in copies:
            found = next((c for c in findable if c in copies.values()), None)
            is_found = prompts.start(G, A, request_id, 1)
            assert is_found == bool(begun)
            assert found is not None or not is_found
            copies[index] = now if found is None else found
        elif index not in begun and not ends:
            prompts.begin(G, A, request_id)
            begun.add(index)
            if copies[index] not in findable:
                findable.append(copies[index])
        else:
            before = prompts.num_blocks(A)
            assert prompts.end(G, A, request_id) == before - prompts.num_blocks(A)
            begun.discard(index)
            del copies[index]
            findable = [c for c in findable if c in copies.values()]
        assert len(set(copies.values())) <= prompts.num_blocks(A) <= len(copies)
