"""The native forest answers what the plain-Python reference answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    rule,
)

from aseer.dgds.cst import SuffixForest
from aseer.dgds.reference import ReferenceForest

# Few symbols make long repeats, many make wide nodes.
ALPHABETS = st.sampled_from([1, 2, 3, 40])


def flat(rows: list[list[int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Lay rows out one after the other: tokens, offsets."""
    tokens = np.array([token for row in rows for token in row], np.int32)
    return tokens, np.cumsum([0, *map(len, rows)])


class ForestComparison(RuleBasedStateMachine):
    """Do everything twice, and compare every answer."""

    groups = Bundle("groups")
    requests = Bundle("requests")

    @initialize(
        target=requests,
        max_match=st.integers(1, 12),
        alphabet=ALPHABETS,
        data=st.data(),
    )
    def start(
        self, max_match: int, alphabet: int, data: st.DataObject
    ) -> tuple[int, int]:
        self.native = SuffixForest(max_match=max_match)
        self.reference = ReferenceForest(max_match=max_match)
        self.texts = st.lists(st.integers(0, alphabet - 1), max_size=12)
        return self.open_request(self.open_group(data))

    @rule(target=groups, data=st.data())
    def plant(self, data: st.DataObject) -> tuple[int, int]:
        return self.open_group(data)

    def open_group(self, data: st.DataObject) -> tuple[int, int]:
        prompt = data.draw(self.texts)
        return (
            self.native.open_group(np.array(prompt, np.int32)),
            self.reference.open_group(prompt),
        )

    @rule(target=requests, group=groups)
    def join(self, group: Any) -> tuple[int, int]:
        return self.open_request(group)

    def open_request(self, group: Any) -> tuple[int, int]:
        return (
            self.native.open_request(group[0]),
            self.reference.open_request(group[1]),
        )

    @rule(chosen=st.lists(requests, min_size=1, max_size=4), data=st.data())
    def append(self, chosen: list[Any], data: st.DataObject) -> None:
        rows = [data.draw(self.texts) for _ in chosen]
        lengths = self.native.append(np.array([r[0] for r in chosen]), *flat(rows))
        assert lengths.tolist() == self.reference.append([r[1] for r in chosen], rows)

    @rule(request=requests, data=st.data(), start=st.integers(0, 20))
    def append_from(self, request: Any, data: st.DataObject, start: int) -> None:
        row = data.draw(self.texts)
        tokens, offsets = flat([row])
        lengths = self.native.append(
            np.array([request[0]]), tokens, offsets, np.array([start])
        )
        assert lengths.tolist() == self.reference.append([request[1]], [row], [start])

    @rule(
        chosen=st.lists(requests, min_size=1, max_size=4, unique=True),
        start=st.integers(0, 3),
        data=st.data(),
    )
    def follow(self, chosen: list[Any], start: int, data: st.DataObject) -> None:
        rows = [data.draw(self.texts) for _ in chosen]
        width = start + max(
            len(self.reference.tokens(request[1])) + len(row)
            for request, row in zip(chosen, rows, strict=True)
        )
        table = np.full((len(chosen), width + 2), -1, np.int32)[:, :width]
        num_tokens = np.zeros(len(chosen), np.int32)
        places = np.arange(len(chosen))[::-1].copy()
        for place, request, row in zip(places, chosen, rows, strict=True):
            text = [*self.reference.tokens(request[1]), *row]
            table[place, start : start + len(text)] = text
            num_tokens[place] = start + len(text)
        handles = np.array([r[0] for r in chosen])
        starts = np.full(len(chosen), start)
        num_lost = self.native.follow(handles, table, places, starts, num_tokens)
        assert num_lost == 0
        self.reference.append([r[1] for r in chosen], rows)

    @rule(
        chosen=st.lists(requests, min_size=1, max_size=4, unique=True),
        max_draft_tokens=st.integers(0, 10),
        min_confidence=st.sampled_from([0.0, 0.1, 0.4]),
    )
    def draft(
        self, chosen: list[Any], max_draft_tokens: int, min_confidence: float
    ) -> None:
        drafts = self.native.draft(
            np.array([r[0] for r in chosen]),
            np.full(len(chosen), max_draft_tokens, np.int32),
            min_confidence=min_confidence,
        )
        expected = self.reference.draft(
            [r[1] for r in chosen],
            [max_draft_tokens] * len(chosen),
            min_confidence=min_confidence,
        )
        for i, row in enumerate(expected):
            span = slice(drafts.offsets[i], drafts.offsets[i + 1])
            assert drafts.tokens[span].tolist() == [token for token, _ in row]
            assert drafts.confidences[span].tolist() == pytest.approx(
                [confidence for _, confidence in row], rel=1e-4
            )

    @rule(request=requests, depth=st.integers(0, 6), top_k=st.integers(1, 4))
    def draft_tree(self, request: Any, depth: int, top_k: int) -> None:
        trees = self.native.draft_tree(
            np.array([request[0]]),
            np.array([depth], np.int32),
            top_k=top_k,
            min_confidence=0.01,
        )
        expected = self.reference.draft_tree(
            request[1], depth, top_k=top_k, min_confidence=0.01
        )
        nodes = list(zip(trees.tokens.tolist(), trees.parents.tolist(), strict=True))
        assert nodes == [node[:2] for node in expected]
        assert trees.confidences.tolist() == pytest.approx(
            [node[2] for node in expected], rel=1e-4
        )

    @rule(request=consumes(requests))
    def close_request(self, request: Any) -> None:
        self.native.close_requests(np.array([request[0]]))
        self.reference.close_requests([request[1]])

    @rule(request=requests)
    def orders(self, request: Any) -> None:
        assert self.native.orders(request[0]) == self.reference.orders(request[1])

    @rule(request=requests, start=st.integers(0, 3))
    def tokens(self, request: Any, start: int) -> None:
        text = self.reference.tokens(request[1])
        if start <= len(text):
            assert self.native.tokens(request[0], start).tolist() == text[start:]


ForestComparison.TestCase.settings = settings(stateful_step_count=30)
TestForestComparison = ForestComparison.TestCase
