"""The suffix forest in plain Python: slow, and right by inspection.

`ReferenceForest` answers like `cst.SuffixForest` and keeps nothing but the texts: every
question is answered by reading all texts. Tests compare the native forest with it. Both
arguments and results are Python lists, one row for each request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from aseer.dgds.cst import DEFAULT_MAX_MATCH, PROMPT_WRITER, Continuation, Order

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROMPT_SLOT = -1

# The constants of csrc/blend.cc, which must be the same.
# Orders that vote. The walk to shorter ones ends at an order in which the same token
# followed every time, `SURE` times or more.
MAX_ORDERS = 3
SURE = 2
# Continuations of an order that are candidates.
RANKED = 3
# Pseudo-count of the shorter orders, and how much more of it, divided by the match.
STRENGTH = 2.0
SHORT_STRENGTH = 4.0
# Extra votes for what the request itself wrote: a request repeats itself.
OWN_BONUS = 2.0
# Frequency of a token before any order.
FLOOR = 1e-3
# Rates of learning: of the features' weights, of those of single tokens, and of the
# share of a request's forecasts that came true lately.
RATE = 0.0005
TOKEN_RATE = 0.1
RECENT_RATE = 0.05
# Tokens are hashed to so many bits.
PLACE_BITS = 12
# The features' weights at the start, fitted on recorded responses.
FITTED = (-1.268, 0.728, 0.388, 0.218, 0.217, 0.214, 0.542, -0.426, -0.686, 1.075)


class Place(NamedTuple):
    """Where a token is: the `position`-th of a group's text `slot`, prompt included."""

    slot: int
    position: int


class TreeNode(NamedTuple):
    """A drafted token, its parent's position (-1: none) and its path's confidence."""

    token: int
    parent: int
    confidence: float


@dataclass
class GroupTexts:
    """A prompt, and the texts that follow it by slot; None where a slot is free."""

    prompt: list[int]
    texts: list[list[int] | None] = field(default_factory=list)

    def places(self) -> Iterator[tuple[Place, list[int]]]:
        """Yield every token's place, with the text up to and including it.

        The prompt's tokens have one place each, however many requests follow it.
        """
        for i in range(len(self.prompt)):
            yield Place(PROMPT_SLOT, i), self.prompt[: i + 1]
        for slot, text in enumerate(self.texts):
            for i in range(len(text or ())):
                whole = self.prompt + (text or [])[: i + 1]
                yield Place(slot, len(whole) - 1), whole

    def orders(self, context: Sequence[int]) -> list[Order]:
        """List what followed each suffix of `context`, longest first.

        Suffixes that end at the same places are one order, named by the longest.
        """
        orders = []
        everywhere = list(self.places())
        known: set[Place] = set()
        for size in range(len(context), 0, -1):
            suffix = list(context[-size:])
            ends = {place for place, text in everywhere if text[-size:] == suffix}
            if ends == known:
                continue
            known = ends
            followers: dict[int, Continuation] = {}
            for place, text in everywhere:
                if text[-size - 1 : -1] == suffix:
                    _, count, writers = followers.get(text[-1], (0, 0, 0))
                    writers |= writer_bit(place.slot)
                    followers[text[-1]] = Continuation(text[-1], count + 1, writers)
            if followers:
                ranked = sorted(followers.values(), key=lambda c: (-c.times, c.token))
                orders.append(Order(size, ranked))
        return orders


class Prediction(NamedTuple):
    """A token, the context it continues, and how likely it is to be accepted."""

    token: int
    match_length: int
    probability: float
    features: list[float]
    places: tuple[int, int]


@dataclass
class Reader:
    """The request that is predicted for: its bit, and the share of late that was."""

    writer: int
    recent: float = 0.5


@dataclass
class Candidate:
    """A token that an order proposes; `order` is the longest that does."""

    continuation: Continuation
    order: int
    firsts: int = 0
    frequency: float = FLOOR


class Blend:
    """What csrc/blend.h describes."""

    def __init__(self) -> None:
        self.weights = list(FITTED)
        self.token_weights = [0.0] * (2 << PLACE_BITS)

    def predict(
        self, orders: Sequence[Order], reader: Reader, last: int
    ) -> list[Prediction]:
        """Rank what may come next after the token `last`, likeliest first."""
        orders = self._longest(orders)
        candidates = self._nominate(orders)
        for order in reversed(orders):
            counts = {
                c.token: c.times + (OWN_BONUS if c.writers & reader.writer else 0.0)
                for c in order.continuations[:RANKED]
            }
            unranked = sum(c.times for c in order.continuations[RANKED:])
            total = sum(counts.values()) + unranked
            strength = STRENGTH + SHORT_STRENGTH / order.match_length
            for token, candidate in candidates.items():
                count = counts.get(token, 0.0)
                candidate.frequency = (count + strength * candidate.frequency) * (
                    1 / (total + strength)
                )
        ranked = sorted(
            candidates.items(), key=lambda item: (-item[1].frequency, item[0])
        )
        predictions = []
        for token, candidate in ranked:
            features = self._describe(candidate, orders, reader)
            match_length = orders[candidate.order].match_length
            places = (place_of(token), place_of(last) + (1 << PLACE_BITS))
            probability = self._probability(features, places)
            predictions.append(
                Prediction(token, match_length, probability, features, places)
            )
        return predictions

    def _longest(self, orders: Sequence[Order]) -> list[Order]:
        """Those that have a say."""
        longest = []
        for order in orders[:MAX_ORDERS]:
            longest.append(order)
            if len(order.continuations) == 1 and order.continuations[0].times >= SURE:
                break
        return longest

    def _nominate(self, orders: Sequence[Order]) -> dict[int, Candidate]:
        candidates: dict[int, Candidate] = {}
        for i, order in enumerate(orders):
            for k, continuation in enumerate(order.continuations[:RANKED]):
                token = continuation.token
                candidate = candidates.setdefault(token, Candidate(continuation, i))
                candidate.firsts += k == 0
        return candidates

    def _describe(
        self, candidate: Candidate, orders: Sequence[Order], reader: Reader
    ) -> list[float]:
        _, count, writers = candidate.continuation
        order = orders[candidate.order]
        frequency = min(candidate.frequency, 1 - 1e-6)
        siblings = writers & ~reader.writer & ~PROMPT_WRITER
        return [
            1.0,
            math.log(frequency / (1 - frequency)),
            math.log1p(order.match_length),
            math.log1p(count),
            float(writers & reader.writer != 0),
            math.log1p(siblings.bit_count()),
            candidate.firsts / len(orders),
            math.log1p(sum(c.times for c in order.continuations)),
            math.log(len(orders)),
            reader.recent,
        ]

    def _probability(self, features: Sequence[float], places: Sequence[int]) -> float:
        score = sum(w * x for w, x in zip(self.weights, features, strict=True))
        score += sum(self.token_weights[place] for place in places)
        return 1 / (1 + math.exp(-score))

    def learn(self, prediction: Prediction, reader: Reader, *, right: bool) -> None:
        """Follow a prediction's fate."""
        reader.recent += RECENT_RATE * (float(right) - reader.recent)
        error = float(right) - prediction.probability
        for i, x in enumerate(prediction.features):
            self.weights[i] += RATE * error * x
        for place in prediction.places:
            self.token_weights[place] += TOKEN_RATE * error


@dataclass
class OpenRequest:
    """A request's place in its group, and what was forecast for it.

    Attributes:
        forecasts: of the tokens to come.
        after: the context behind them, if there are any.
    """

    group: GroupTexts
    slot: int
    reader: Reader
    forecasts: list[Prediction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        """Its tokens, prompt excluded; the list itself."""
        text = self.group.texts[self.slot]
        assert text is not None
        return text


class ReferenceForest:
    """`cst.SuffixForest` over lists; its docstrings say what each method does."""

    def __init__(self, *, max_match: int = DEFAULT_MAX_MATCH) -> None:
        self.max_match = max_match
        self.groups: dict[int, GroupTexts] = {}
        self.opened: dict[int, OpenRequest] = {}
        self.blend = Blend()
        self._next_handle = 1

    def _new_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle - 1

    def open_group(self, prompt: Sequence[int]) -> int:
        handle = self._new_handle()
        self.groups[handle] = GroupTexts(list(prompt))
        return handle

    def open_request(self, group: int) -> int:
        handle = self._new_handle()
        texts = self.groups[group].texts
        slot = texts.index(None) if None in texts else len(texts)
        texts[slot : slot + 1] = [[]]
        self.opened[handle] = OpenRequest(
            self.groups[group], slot, Reader(writer_bit(slot))
        )
        return handle

    def close_requests(self, requests: Sequence[int]) -> None:
        for handle in requests:
            closed = self.opened.pop(handle)
            closed.group.texts[closed.slot] = None
            for request in self.opened.values():
                if request.group is closed.group:
                    request.forecasts = []

    def append(
        self,
        requests: Sequence[int],
        rows: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
    ) -> list[int]:
        for i, (handle, row) in enumerate(zip(requests, rows, strict=True)):
            request = self.opened[handle]
            skip = 0 if starts is None else len(request.text) - starts[i]
            if 0 <= skip < len(row):
                self._learn(request, row[skip:])
                request.text.extend(row[skip:])
        return [len(self.opened[handle].text) for handle in requests]

    def _learn(self, request: OpenRequest, tokens: Sequence[int]) -> None:
        for token in tokens[: len(request.forecasts)]:
            forecast = request.forecasts.pop(0)
            right = forecast.token == token
            self.blend.learn(forecast, request.reader, right=right)
            if not right:
                request.forecasts = []
                break

    def orders(self, request: int) -> list[Order]:
        opened = self.opened[request]
        return opened.group.orders(self._context(opened))

    def tokens(self, request: int) -> list[int]:
        return list(self.opened[request].text)

    def draft(
        self,
        requests: Sequence[int],
        max_draft_tokens: Sequence[int],
        *,
        min_confidence: float = 0.0,
    ) -> list[list[tuple[int, float]]]:
        return [
            self._draft_row(self.opened[handle], limit, min_confidence)
            for handle, limit in zip(requests, max_draft_tokens, strict=True)
        ]

    def _draft_row(
        self, request: OpenRequest, limit: int, min_confidence: float
    ) -> list[tuple[int, float]]:
        row: list[tuple[int, float]] = []
        confidence = 1.0
        for i in range(limit):
            if i == len(request.forecasts) and not self._forecast(request):
                break
            confidence *= request.forecasts[i].probability
            if confidence < min_confidence:
                break
            row.append((request.forecasts[i].token, confidence))
        return row

    def _forecast(self, request: OpenRequest) -> bool:
        """Forecast one token more, if anything is known."""
        if not request.forecasts:
            request.after = self._context(request)
        ranked = self._predict(request, request.after)
        if ranked:
            request.forecasts.append(ranked[0])
            request.after = self._advance(request.after, ranked[0])
        return bool(ranked)

    def draft_tree(
        self,
        request: int,
        max_draft_tokens: int,
        *,
        top_k: int,
        min_confidence: float = 0.0,
    ) -> list[TreeNode]:
        opened = self.opened[request]
        nodes: list[TreeNode] = []
        beam = [(self._context(opened), -1, 1.0)]
        for _ in range(max_draft_tokens):
            wider = [
                (self._advance(context, best), node, best, confidence)
                for context, node, so_far in beam
                for best in self._predict(opened, context)[:top_k]
                if (confidence := so_far * best.probability) >= min_confidence
            ]
            wider.sort(key=lambda path: -np.float32(path[3]))
            beam = []
            for context, parent, best, confidence in wider[:top_k]:
                nodes.append(TreeNode(best.token, parent, confidence))
                beam.append((context, len(nodes) - 1, confidence))
        return nodes

    def _context(self, request: OpenRequest) -> list[int]:
        return (request.group.prompt + request.text)[-self.max_match :]

    def _advance(self, context: list[int], step: Prediction) -> list[int]:
        return [*context[-step.match_length :], step.token][-self.max_match :]

    def _predict(self, request: OpenRequest, context: list[int]) -> list[Prediction]:
        orders = request.group.orders(context)
        last = context[-1] if context else -1
        return self.blend.predict(orders, request.reader, last)


def place_of(token: int) -> int:
    """Where a token's weight is."""
    return (token * 2654435761 & 0xFFFFFFFF) >> (32 - PLACE_BITS)


def writer_bit(slot: int) -> int:
    """Bit of a writer in `Continuation.writers`."""
    return PROMPT_WRITER if slot == PROMPT_SLOT else 1 << slot % 31
