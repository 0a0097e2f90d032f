"""Draft replicas converge whatever happens to messages; the budget never overspends."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aseer.core.columns import columns_of
from aseer.core.outputs import Outputs
from aseer.dgds.budget import spend
from aseer.dgds.calibration import rising_fit
from aseer.dgds.cst import SuffixForest
from aseer.dgds.log import TokenLog
from aseer.dgds.messages import TO_CLIENT, Deltas, FetchCst, RegisterGroups
from aseer.dgds.replica import Replica, RequestKey
from aseer.dgds.steptime import StepTimeModel
from aseer.types import ChunkEnd, ChunkId, ChunkProgress

REQUESTS = [RequestKey(group, f"{group}/{i}") for group in "gh" for i in range(3)]
PROMPTS = {"g": np.array([1, 2, 3, 1, 2], np.int32), "h": np.array([2, 2], np.int32)}
NUM_ENGINES = 3
TEXT = st.lists(st.integers(1, 3), min_size=1, max_size=12)


class LossyExchange(RuleBasedStateMachine):
    """Engines generate, requests migrate, messages are lost, late, doubled, ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.log = TokenLog()
        self.outputs = Outputs()
        self.handles = {key: self.outputs.open() for key in REQUESTS}
        self.followed: set[RequestKey] = set()
        self.num_chunks = 0
        self.replicas = [Replica(ttl_s=1e9) for _ in range(NUM_ENGINES)]
        self.texts: dict[RequestKey, list[int]] = {key: [] for key in REQUESTS}
        self.where: dict[RequestKey, tuple[int, int]] = {}  # engine, handle
        self.reports: list[tuple[RequestKey, int, list[int]]] = []
        self.to_server: list[tuple[int, Any]] = []
        self.to_client: list[tuple[int, Deltas]] = []

    @rule(key=st.sampled_from(REQUESTS), engine=st.integers(0, NUM_ENGINES - 1))
    def start_chunk(self, key: RequestKey, engine: int) -> None:
        """The controller has all tokens before it dispatches the next chunk."""
        self.end_chunk(key)
        self.deliver_reports()
        if key not in self.followed:
            self.followed.add(key)
            self.outputs.share(self.handles[key])
            self.log.follow(*key, self.outputs, self.handles[key], 0.0)
        handle = self.replicas[engine].begin(
            key, PROMPTS[key.group_id], np.array(self.texts[key], np.int32), now=0.0
        )
        self.where[key] = (engine, handle)

    @rule(key=st.sampled_from(REQUESTS))
    def end_chunk(self, key: RequestKey) -> None:
        if key in self.where:
            self.replicas[self.where.pop(key)[0]].end(key, now=0.0)

    @rule(text=TEXT)
    def generate(self, text: list[int]) -> None:
        for key, (engine, handle) in self.where.items():
            start = len(self.texts[key])
            self.texts[key] += text
            self.follow(engine, handle, self.texts[key])
            self.reports.append((key, start, text))

    @rule(text=TEXT, key=st.sampled_from(REQUESTS))
    def sample_and_die(self, text: list[int], key: RequestKey) -> None:
        """Tokens that were never reported: the request goes on without them."""
        if key in self.where:
            engine, handle = self.where.pop(key)
            self.follow(engine, handle, self.texts[key] + text)
            self.start_chunk(key, engine)

    def follow(self, engine: int, handle: int, text: list[int]) -> None:
        """Sample up to here."""
        num_lost = self.replicas[engine].follow(
            np.array([handle]),
            np.array([text], np.int32),
            np.array([0]),
            np.array([0]),
            np.array([len(text)], np.int32),
        )
        assert num_lost == 0

    @rule()
    def deliver_reports(self) -> None:
        for key, start, text in self.reports:
            handle = self.handles[key]
            assert start == self.outputs.num_tokens(handle)
            self.num_chunks += 1
            self.outputs.begin(self.num_chunks, handle, len(text))
            tokens = np.array(text, np.int32).tobytes()
            report = ChunkProgress(
                chunk_id=ChunkId(self.num_chunks),
                start=0,
                tokens=tokens,
                logprobs=tokens,
                end=ChunkEnd(reason="length"),
            )
            self.outputs.take_columns(columns_of([report]))
        self.reports.clear()

    @rule(engine=st.integers(0, NUM_ENGINES - 1))
    def ask(self, engine: int) -> None:
        replica = self.replicas[engine]
        for message in (replica.registration(), replica.fetch()):
            if message is not None:
                self.to_server.append((engine, message))

    @rule(data=st.data(), keep=st.booleans())
    def server_hears(self, data: st.DataObject, keep: bool) -> None:
        if self.to_server:
            place = data.draw(st.integers(0, len(self.to_server) - 1))
            engine, message = self.to_server[place]
            self._serve(engine, message)
            if not keep:
                del self.to_server[place]

    @rule(data=st.data(), keep=st.booleans())
    def client_hears(self, data: st.DataObject, keep: bool) -> None:
        if self.to_client:
            place = data.draw(st.integers(0, len(self.to_client) - 1))
            engine, message = self.to_client[place]
            self.replicas[engine].apply(message)
            if not keep:
                del self.to_client[place]

    @rule()
    def lose_all(self) -> None:
        self.to_server.clear()
        self.to_client.clear()

    def _serve(self, engine: int, message: Any) -> None:
        match message:
            case RegisterGroups(groups):
                for group in groups:
                    self.log.register_group(
                        group.group_id, group.prompt_key, group.ttl_s, 0.0
                    )
            case FetchCst(cache_infos):
                packed = self.log.fetch_cst(msgspec.msgpack.encode(cache_infos), 0.0)
                self.to_client.append((engine, TO_CLIENT.decode(packed)))

    @invariant()
    def running_requests_have_their_own_tokens(self) -> None:
        for key, (engine, _) in self.where.items():
            assert self.replicas[engine].text(key).tolist() == self.texts[key]

    def teardown(self) -> None:
        """With messages that arrive, all know all, in equal trees."""
        for key in REQUESTS:
            self.end_chunk(key)
        self.deliver_reports()
        self.lose_all()
        reference = {group: grown(group, self.texts) for group in PROMPTS}
        for engine, replica in enumerate(self.replicas):
            for _ in range(2):
                self.ask(engine)
                while self.to_server:
                    self._serve(*self.to_server.pop(0))
                while self.to_client:
                    replica.apply(self.to_client.pop(0)[1])
            question = replica.fetch()
            held = question.cache_infos if question else {}
            for key in REQUESTS:
                if key.group_id in held and self.texts[key]:
                    assert replica.text(key).tolist() == self.texts[key]
                    forest, handles = reference[key.group_id]
                    assert answers(
                        replica.forest, replica._groups[key.group_id].requests, key
                    ) == answers(forest, handles, key)


def grown(group: str, texts: dict[RequestKey, list[int]]) -> tuple[SuffixForest, Any]:
    """A tree of the group's texts, appended one after the other."""
    forest = SuffixForest()
    handle = forest.open_group(PROMPTS[group])
    handles = {}
    for key, text in texts.items():
        if key.group_id == group:
            handles[key.request_id] = request = forest.open_request(handle)
            row = np.array(text, np.int32)
            forest.append(np.array([request]), row, np.array([0, len(row)]))
    return forest, handles


def answers(forest: SuffixForest, handles: dict[str, Any], key: RequestKey) -> Any:
    """What a tree knows of a request's future, less who wrote it: slots differ."""
    return [
        (order.match_length, [(c.token, c.times) for c in order.continuations])
        for order in forest.orders(handles[key.request_id])
    ]


TestLossyExchange = LossyExchange.TestCase
TestLossyExchange.settings = settings(stateful_step_count=30)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Any, ...]:
    """Rows of falling survivals, weights, and any step times."""
    rows = draw(
        st.lists(
            st.lists(st.floats(0, 1), max_size=8).map(lambda r: sorted(r)[::-1]),
            min_size=1,
            max_size=8,
        )
    )
    num = sum(map(len, rows))
    step_s = draw(hnp.arrays(np.float64, num + 1, elements=st.floats(1e-4, 1.0)))
    weights = draw(
        hnp.arrays(np.float64, len(rows), elements=st.sampled_from([1.0, 2.0]))
    )
    return rows, weights, np.maximum.accumulate(step_s)


@given(situations())
def test_a_step_with_drafts_yields_more_tokens_a_second_than_one_without(situation):
    rows, weights, step_s = situation
    flat = np.array([s for row in rows for s in row])
    offsets = np.cumsum([0, *map(len, rows)])
    lengths, saved_s = spend(flat, offsets, weights, step_s)
    num = int(lengths.sum())
    assert all(0 <= n <= len(row) for n, row in zip(lengths, rows, strict=True))
    gain = sum(sum(row[:n]) for row, n in zip(rows, lengths, strict=True))
    if num:
        rate, plain = (len(rows) + gain) / step_s[num], len(rows) / step_s[0]
        assert rate >= plain * 1.02 * (1 - 1e-9)
        assert saved_s == pytest.approx((len(rows) + gain) / plain - step_s[num])
    else:
        assert saved_s == 0


@given(situations())
def test_what_is_spent_is_worth_most_of_what_is_admitted(situation):
    rows, weights, step_s = situation
    flat = np.array([s for row in rows for s in row])
    offsets = np.cumsum([0, *map(len, rows)])
    row_of = np.repeat(np.arange(len(rows)), np.diff(offsets))
    worths = flat * weights[row_of]
    order = np.argsort(-worths, kind="stable")
    tokens = len(rows) + np.cumsum(flat[order])
    is_admitted = tokens / step_s[1:] >= len(rows) / step_s[0] * 1.05
    rates = (weights.sum() + np.cumsum(worths[order])) / step_s[1:] * is_admitted
    num = int(spend(flat, offsets, weights, step_s, margin=0.05).lengths.sum())
    if num:
        assert is_admitted[num - 1]
        assert rates[num - 1] == pytest.approx(rates.max())
    else:
        assert not is_admitted.any()


@given(situations())
def test_no_share_of_the_same_size_is_worth_more(situation):
    rows, weights, step_s = situation
    flat = np.array([s for row in rows for s in row])
    offsets = np.cumsum([0, *map(len, rows)])
    lengths = spend(flat, offsets, weights, step_s).lengths
    worths = [w * s for w, row in zip(weights, rows, strict=True) for s in row]
    taken = [
        w * s for w, row, n in zip(weights, rows, lengths, strict=True) for s in row[:n]
    ]
    best = sorted(worths)[::-1][: len(taken)]
    assert sum(taken) == pytest.approx(sum(best))


@given(hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)), st.data())
def test_the_rising_fit_rises_and_keeps_the_mean(values, data):
    weights = data.draw(
        hnp.arrays(np.float64, len(values), elements=st.floats(0.1, 10))
    )
    fitted = rising_fit(values, weights)
    assert (np.diff(fitted) >= 0).all()
    assert np.average(fitted, weights=weights) == pytest.approx(
        np.average(values, weights=weights)
    )
    assert rising_fit(fitted, weights) == pytest.approx(fitted)


@given(
    st.integers(1, 300),
    st.integers(1, 600),
    st.floats(0, 0.02),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 8)), max_size=40),
    st.integers(0, 2**32 - 1),
)
def test_predicted_steps_rise_and_jump_nowhere_but_behind_the_graphs(
    num_rows, graph_tokens, jump_s, steps, seed
):
    """Whatever was measured: elsewhere each token adds what the one before did, or
    more.
    """
    rng = np.random.default_rng(seed)
    model = StepTimeModel(graph_tokens)
    for rows, each in [(1, 0), *steps]:
        tokens = rows * (1 + each)
        step_s = 0.008 + 2e-5 * tokens + jump_s * (tokens > graph_tokens)
        model.observe(rows, rows * each, rows, step_s * rng.lognormal(0, 0.2))
    rises = np.diff(model.predict(num_rows, 700, num_rows))
    assert (rises >= -1e-12).all()
    # The first drafted token has the cost of verification, too.
    jump = graph_tokens - num_rows
    smooth = np.delete(rises, [0, jump] if 0 < jump < len(rises) else [0])
    assert (np.diff(smooth) >= -1e-12).all()


@given(situations(), st.integers(0, 63), st.floats(0, 2.0))
def test_drafts_go_past_a_jump_only_for_more_tokens_a_second(situation, room, jump_s):
    rows, weights, step_s = situation
    step_s = step_s + jump_s * (np.arange(len(step_s)) > room)
    flat = np.array([s for row in rows for s in row])
    offsets = np.cumsum([0, *map(len, rows)])
    row_of = np.repeat(np.arange(len(rows)), np.diff(offsets))
    worths = np.sort(flat * weights[row_of])[::-1]
    num = int(spend(flat, offsets, weights, step_s).lengths.sum())
    if num > room:
        rates = (weights.sum() + np.concatenate(([0], np.cumsum(worths)))) / step_s
        order = np.argsort(-flat * weights[row_of], kind="stable")
        tokens = len(rows) + np.concatenate(([0], np.cumsum(flat[order])))
        is_admitted = tokens / step_s >= 1.05 * tokens[0] / step_s[0]
        within = (rates * is_admitted)[: room + 1]
        assert rates[num] >= within.max() * (1 - 1e-9)
