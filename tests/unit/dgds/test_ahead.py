"""Drafts for steps that were scheduled ahead, against a stand-in for vLLM's V2.

The stand-in's scheduler is one step ahead of its device: when step N + 1 is prepared,
the scheduler has had the tokens of step N - 1, and those of step N are on their way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aseer.dgds.ahead import Ahead, trimmed
from aseer.dgds.budget import FixedBudget
from aseer.dgds.replica import Replica, RequestKey
from aseer.dgds.rows import Rows
from aseer.dgds.steptime import StepTimeModel

PROMPT = [1, 2, 3]
LOOP = [5, 6, 7, 8, 9]
PLACEHOLDERS = 4
MAX_MODEL_LEN = 100


class Limited(FixedBudget):
    """Drafts all there is, up to `limit` tokens, which may change."""

    def __init__(self) -> None:
        super().__init__(PLACEHOLDERS)
        self.limit = PLACEHOLDERS
        self.learned: list[list[bool]] = []
        self.paid: list[int] = []

    def max_draft_tokens(self, num_rows: int) -> int:
        return self.limit

    def learn(self, outcome: Any) -> None:
        self.learned.append(outcome.survived.tolist())

    def pay(self, num_rows: int, look_s: float) -> None:
        self.paid.append(num_rows)


@dataclass
class Output:
    """vLLM's SchedulerOutput, as far as it is looked at."""

    scheduled_new_reqs: list[Any]
    scheduled_cached_reqs: Any
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: dict[str, list[int]]
    finished_req_ids: set[str]
    preempted_req_ids: set[str] | None = None


@dataclass
class Request:
    """A request of the stand-in: what it is, and how far scheduler and device are."""

    name: str
    new: Any
    text: list[int]  # of the device
    end: int  # tokens after which it stops
    known: int = 0  # tokens of the text that the scheduler has
    is_over: bool = False
    told_over: bool = False
    is_new: bool = True
    junk: list[int] = field(default_factory=list)


class Event:
    """Counts who waits for a copy that has not arrived."""

    def __init__(self) -> None:
        self.has_arrived = False
        self.was_awaited = False

    def synchronize(self) -> None:
        if not self.has_arrived:
            self.was_awaited = True


class Engine:
    """Scheduler and device. After 9 comes 5 again, for ever."""

    def __init__(self) -> None:
        self.budget = Limited()
        self.replica = Replica(ttl_s=600.0)
        self.model = StepTimeModel()
        self.rows = Rows(8, MAX_MODEL_LEN)
        self.uploaded: dict[str, list[int]] = {}
        self.ahead = Ahead(
            self.rows,
            self.replica,
            self.budget,
            self.model,
            2.0,
            MAX_MODEL_LEN,
            self.upload,
        )
        self.requests: dict[str, Request] = {}
        self.in_flight: list[tuple[Any, Any]] = []
        self.launches: list[dict[str, int]] = []
        self.events: list[Event] = []

    def add(
        self,
        name: str,
        generated: list[int],
        *,
        max_tokens: int = 50,
        group: str = "g",
        structured: Any = None,
        profile: int | None = None,
    ) -> None:
        told = {
            "group": group,
            "request": name,
            "prompt_tokens": len(PROMPT),
            "probe": False,
        }
        if profile is not None:
            told["profile"] = profile
        text = PROMPT + generated
        new = SimpleNamespace(
            req_id=name,
            prefill_token_ids=list(text),
            prompt_len=len(text),
            sampling_params=SimpleNamespace(
                extra_args={"aseer": told},
                max_tokens=max_tokens,
                min_tokens=0,
                structured_outputs=structured,
            ),
        )
        end = len(text) + max_tokens
        self.requests[name] = Request(name, new, text, end, known=len(text))

    def upload(self, req_ids: Any, drafts: Any) -> None:
        self.uploaded = dict(zip(req_ids, drafts.tolist(), strict=True))

    def schedule(self) -> Output:
        running = [r for r in self.requests.values() if not r.is_over]
        over = {r.name for r in self.requests.values() if r.is_over and not r.told_over}
        for name in over:
            self.requests[name].told_over = True
        spec = {r.name: [-1] * PLACEHOLDERS for r in running if not r.is_new}
        counts = {
            r.name: len(r.text) if r.is_new else 1 + PLACEHOLDERS for r in running
        }
        output = Output(
            [r.new for r in running if r.is_new],
            SimpleNamespace(req_ids=[r.name for r in running if not r.is_new]),
            counts,
            sum(counts.values()),
            spec,
            over,
        )
        for request in running:
            request.is_new = False
        return output

    def step(self) -> None:
        """Schedule and launch a step; then take in the one before."""
        output = self.schedule()
        before = {
            name: list(t) for name, t in output.scheduled_spec_decode_tokens.items()
        }
        self.uploaded = {}
        launched = self.ahead.prepare(output)
        self.ahead.launched()
        assert output.scheduled_spec_decode_tokens == before, "vLLM's own is kept"
        assert launched.total_num_scheduled_tokens == sum(
            launched.num_scheduled_tokens.values()
        )
        drafts = {
            name: self.uploaded[name][: len(tokens)]
            for name, tokens in launched.scheduled_spec_decode_tokens.items()
        }
        self.launches.append({name: len(d) for name, d in drafts.items()})
        names = list(launched.num_scheduled_tokens)
        rows = [self.sample(self.requests[n], drafts.get(n, [])) for n in names]
        widest = max(map(len, rows), default=1)
        tokens = np.full((len(rows), widest), 77, np.int64)
        for row, sampled in zip(tokens, rows, strict=True):
            row[: len(sampled)] = sampled
        event = Event()
        self.events.append(event)
        done = SimpleNamespace(
            model_runner_output=SimpleNamespace(
                req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}
            ),
            copy_event=event,
            sampled_token_ids=tokens,
            num_sampled_tokens_np=np.array([len(r) for r in rows], np.int32),
        )
        self.ahead.took(done)
        self.in_flight.append((names, rows, event))
        if len(self.in_flight) > 1:
            self.take_in(*self.in_flight.pop(0))

    def sample(self, request: Request, draft: list[int]) -> list[int]:
        """What the device samples, also for a request that is over by now."""
        sampled: list[int] = []
        for token in [*draft, None]:
            last = (request.text + sampled)[-1]
            sampled.append(last + 1 if last in LOOP[:-1] else LOOP[0])
            if sampled[-1] != token:
                break
        request.text += sampled
        return sampled

    def take_in(self, names: list[str], rows: list[list[int]], event: Event) -> None:
        event.has_arrived = True
        for name, sampled in zip(names, rows, strict=True):
            request = self.requests[name]
            if not request.is_over:
                request.known += len(sampled)
                request.is_over = request.known >= request.end

    def run(self) -> None:
        for _ in range(100):
            if all(r.told_over for r in self.requests.values()):
                return
            self.step()
        raise AssertionError("it does not end")

    def text(self, name: str) -> list[int]:
        return self.replica.text(RequestKey("g", name)).tolist()


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_only_drafted_tokens_are_launched():
    output = Output(
        [],
        SimpleNamespace(req_ids=["a", "b", "c"]),
        {"a": 5, "b": 5, "c": 7},
        17,
        {"a": [-1] * 4, "b": [-1] * 4},
        set(),
    )
    launched = trimmed(output, {"a": 2})
    assert launched.num_scheduled_tokens == {"a": 3, "b": 1, "c": 7}
    assert launched.total_num_scheduled_tokens == 11
    assert launched.scheduled_spec_decode_tokens == {"a": [-1, -1]}
    assert output.num_scheduled_tokens == {"a": 5, "b": 5, "c": 7}


def test_a_request_drafts_from_its_siblings_text_while_the_scheduler_is_ahead(engine):
    engine.add("a", LOOP * 2, max_tokens=20)
    engine.add("b", [], max_tokens=20)
    engine.run()
    assert sum(launch.get("b", 0) for launch in engine.launches) > 8
    # One step each for prompts, and for what was scheduled when all was over.
    assert len(engine.launches) < 2 + 20
    assert engine.text("b")[:12] == (LOOP * 4)[:12]
    # Of the last steps nothing was taken in.
    assert 0 <= sum(map(len, engine.launches)) - engine.ahead.num_drafts <= 2
    assert sum(engine.ahead.accepted) == sum(map(sum, engine.budget.learned))


def test_what_a_request_samples_when_it_is_over_gets_into_no_tree(engine):
    engine.add("a", LOOP, max_tokens=3)
    engine.add("b", [], max_tokens=30)
    engine.run()
    text = engine.text("a")
    assert len(text) <= len(LOOP) + 3
    assert engine.requests["a"].text != PROMPT + text, "it sampled on"
    assert engine.requests["a"].text[: len(PROMPT + text)] == PROMPT + text


def test_a_step_without_a_look_waits_for_nothing(engine):
    engine.add("a", LOOP, max_tokens=40)
    engine.budget.limit = 0
    for _ in range(8):
        engine.step()
    assert not any(event.was_awaited for event in engine.events)
    assert engine.launches[-1] == {}
    engine.budget.limit = PLACEHOLDERS
    engine.step()
    assert engine.events[-2].was_awaited
    assert engine.launches[-1] == {"a": PLACEHOLDERS}
    assert engine.text("a") == (LOOP * 4)[: len(LOOP) + 8], "all that was sampled"


def test_steps_are_timed_where_those_before_were_alike(engine):
    observed = []
    engine.ahead._model.observe = lambda num, *args, **kwargs: observed.append(num)
    engine.budget.limit = 0
    engine.add("a", LOOP, max_tokens=40)
    for _ in range(4):
        engine.step()
    engine.add("b", LOOP, max_tokens=40)  # its prompt shares a step with "a"
    for _ in range(4):
        engine.step()
    assert observed == [1, 1, 2]


def test_the_fate_of_drafts_is_learned_even_if_no_look_follows(engine):
    engine.add("a", LOOP, max_tokens=40)
    for _ in range(3):
        engine.step()
    assert engine.launches[-1] == {"a": PLACEHOLDERS}
    learned = len(engine.budget.learned)
    engine.budget.limit = 0
    engine.step()
    assert engine.events[-2].was_awaited
    assert engine.budget.learned[learned:] == [[True] * PLACEHOLDERS]
    engine.step()
    assert not engine.events[-2].was_awaited


def test_a_look_is_paid_by_its_rows(engine):
    engine.add("a", LOOP, max_tokens=40)
    engine.add("b", LOOP, max_tokens=40)
    for _ in range(4):
        engine.step()
    assert engine.budget.paid == [2, 2, 2]
    assert engine.ahead.draft_s > 0
    assert engine.ahead.step_s > 0
    assert sum(engine.ahead.share_buckets) == 2, "the first two are not whole steps"


def test_rows_with_a_grammar_get_no_drafts(engine):
    engine.add("a", LOOP, max_tokens=10)
    engine.add("b", LOOP, max_tokens=10, structured=object())
    engine.run()
    assert any("a" in launch for launch in engine.launches)
    assert not any("b" in launch for launch in engine.launches)


@pytest.mark.parametrize("num", [0, 3])
def test_a_profile_drafts_what_it_asks_for(engine, num):
    engine.add("a", [5], max_tokens=6, profile=num)
    for _ in range(4):
        engine.step()
    expected = {"a": num} if num else {}
    assert engine.launches[1:] == [expected] * 3
    assert engine.model.predict(1, 0, 10)[0] > 0


def test_a_request_that_was_preempted_goes_on_with_what_it_had(engine):
    engine.add("a", LOOP, max_tokens=40)
    for _ in range(4):
        engine.step()
    request = engine.requests["a"]
    # Its KV is dropped, and with it what is in flight; it begins again.
    engine.in_flight.clear()
    request.text = request.text[: request.known]
    request.new.prefill_token_ids = list(request.text)
    request.is_new = True
    known = request.text[len(PROMPT) :]
    for _ in range(3):
        engine.step()
    assert engine.launches[-1] == {"a": PLACEHOLDERS}
    text = engine.text("a")
    assert text[: len(known)] == known
    assert PROMPT + text == engine.requests["a"].text[: len(PROMPT + text)]


def test_rows_keep_their_texts_when_others_go():
    rows = Rows(4, 20)
    for name, text in (("a", [1, 2]), ("b", [3, 4, 5]), ("c", [6])):
        rows.add(
            SimpleNamespace(
                req_id=name,
                prefill_token_ids=text,
                prompt_len=len(text),
                sampling_params=None,
            )
        )
    tokens = np.array([[7, 8], [9, 0], [10, 11]])
    rows.append(["c", "a", "gone"], tokens, np.array([2, 1, 1], np.int32))
    rows.remove(["a", "unknown"])
    assert rows.req_ids == ["c", "b"]
    assert rows.places(["b", "gone", "c"]).tolist() == [1, -1, 0]
    assert rows.token_ids[0, :3].tolist() == [6, 7, 8]
    assert rows.token_ids[1, :3].tolist() == [3, 4, 5]
    assert rows.num_tokens[:2].tolist() == [3, 3]
    assert rows.num_prompt_tokens[:2].tolist() == [1, 3]
    assert set(rows.requests) == {"b", "c"}
